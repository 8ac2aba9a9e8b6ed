"""Certificates for the agents: a CertificateSigningRequest with signerName `podferry.dev/agent`, signed by podferry's
own authority.

An agent's key never leaves its node. Who asks is known from the API server, not from the request: the user must be
the agents' service account, and the node that its token is bound to (Kubernetes 1.32) must be the name that it asks
for. The addresses are the Node object's; a node that is gone gets no certificate, and the one that it has ends within a week.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
from typing import Any

import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from podferry.errors import Refused
from podferry.kube.api_errors import ObjectAlreadyExists
from podferry.kube.client import CONFIGMAPS, NODES, SECRETS, SIGNING_REQUESTS, Api
from podferry.kube.quantities import timestamp
from podferry.wire.pki import AGENT_LIFE, Authority, with_former

Json = dict[str, Any]

SIGNER = "podferry.dev/agent"
AGENT_ACCOUNT = "podferry-agent"
SECRET = BUNDLE = "podferry-ca"
NODE_EXTRA = "authentication.kubernetes.io/node-name"
NODE_UID_EXTRA = "authentication.kubernetes.io/node-uid"
USAGES = frozenset({"digital signature", "key encipherment", "server auth", "client auth"})


async def authority(api: Api, namespace: str) -> Authority:
    """podferry's authority in this cluster, made where there is none yet; its certificate is published for the agents."""
    secret = await api.find(SECRETS, SECRET, namespace)
    if secret is None:
        certificate, key = Authority.new().to_pem()
        data = {"tls.crt": _encode(certificate), "tls.key": _encode(key)}
        try:
            body = {"metadata": {"name": SECRET}, "type": "kubernetes.io/tls", "data": data}
            secret = await api.create(SECRETS, body, namespace)
        except ObjectAlreadyExists:
            secret = await api.get(SECRETS, SECRET, namespace)
    certificate, key = (base64.b64decode(secret["data"][name]) for name in ("tls.crt", "tls.key"))
    found = Authority.from_pem(certificate, key, f"the Secret {namespace}/{SECRET} holds no usable authority")
    bundle = await api.find(CONFIGMAPS, BUNDLE, namespace)
    public = {"ca.crt": with_former(certificate, str(((bundle or {}).get("data") or {}).get("ca.crt", "")))}
    if bundle is None:
        with contextlib.suppress(ObjectAlreadyExists):
            await api.create(CONFIGMAPS, {"metadata": {"name": BUNDLE}, "data": public}, namespace)
    elif bundle.get("data") != public:
        await api.replace(CONFIGMAPS, {**bundle, "data": public})
    return found


_UNREADABLE = (
    *(ValueError, TypeError, KeyError, UnsupportedAlgorithm),
    *(x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, x509.InvalidVersion),
)
"""What a request that somebody has made up by hand ends in."""


class Signer:
    """Approves and signs what agents ask for, and denies what they may not have."""

    def __init__(self, api: Api, namespace: str, authority: Authority) -> None:
        self._api, self._authority = api, authority
        self._account = f"system:serviceaccount:{namespace}:{AGENT_ACCOUNT}"
        self._log = structlog.get_logger()

    async def step(self, name: str) -> None:
        """Decide about one request, if that is not done yet."""
        request = await self._api.find(SIGNING_REQUESTS, name)
        if (
            request is None
            or request["spec"]["signerName"] != SIGNER
            or (request.get("status") or {}).get("certificate")
        ):
            return
        said = {one["type"] for one in (request.get("status") or {}).get("conditions") or []}
        if said & {"Denied", "Failed"}:
            return
        try:
            node, key = self.judge(request["spec"])
            found = await self._node(node, request["spec"])
        except Refused as refusal:
            self._log.warning("a certificate was denied", request=name, error=str(refusal))
            if "Approved" not in said:
                await self._decide(request, "Denied", "NotAnAgent", str(refusal))
            return
        addresses = [
            one["address"]
            for one in (found.get("status") or {}).get("addresses") or []
            if one["type"] in ("InternalIP", "ExternalIP")
        ]
        if "Approved" not in said:
            request = await self._decide(request, "Approved", "AgentOfItsNode", f"the agent of node {node}")
        certificate = self._authority.certify(
            node, addresses, key, not_after=datetime.datetime.now(datetime.UTC) + AGENT_LIFE
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        status = {**(request.get("status") or {}), "certificate": _encode(pem)}
        await self._api.replace(SIGNING_REQUESTS, {**request, "status": status}, "status")
        self._log.info("a certificate was signed", node=node)

    async def _node(self, name: str, spec: Json) -> Json:
        """The node as it is now. Raises `Refused` where it is gone, or another one has its name."""
        found = await self._api.find(NODES, name)
        if found is None:
            raise Refused(f"the cluster has no node {name}")
        told = (spec.get("extra") or {}).get(NODE_UID_EXTRA) or []
        if told and told != [found["metadata"]["uid"]]:
            raise Refused(f"the agent belonged to another node of the name {name}")
        return found

    def judge(self, spec: Json) -> tuple[str, ec.EllipticCurvePublicKey]:
        """The node and the key that a request may be signed for. Raises `Refused` saying what is wrong."""
        if spec.get("username") != self._account:
            raise Refused("this user may have no agent's certificate", why=str(spec.get("username")))
        bound = (spec.get("extra") or {}).get(NODE_EXTRA) or []
        if len(bound) != 1:
            raise Refused("the token is not bound to a node", why="Kubernetes 1.32 or later binds the tokens of pods")
        if extra := sorted(set(spec.get("usages") or []) - USAGES):
            raise Refused("the certificate request asks for more than an agent may have", why=", ".join(extra))
        try:
            request = x509.load_pem_x509_csr(base64.b64decode(spec["request"]))
            names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            asked, key = names.get_values_for_type(x509.DNSName), request.public_key()
            signed = request.is_signature_valid
        except _UNREADABLE as wrong:
            raise Refused.because("the certificate request cannot be read", wrong) from wrong
        if not signed or not isinstance(key, ec.EllipticCurvePublicKey):
            raise Refused(
                "the key of the certificate request cannot be used",
                why="podferry signs only elliptic-curve keys whose request has a valid signature",
            )
        if asked != bound:
            raise Refused(f"the agent of {bound[0]} asks for another node's name", why=", ".join(asked))
        return str(bound[0]), key

    async def _decide(self, request: Json, type: str, reason: str, message: str) -> Json:
        status = request.get("status") or {}
        said = {"type": type, "status": "True", "reason": reason, "message": message, "lastUpdateTime": timestamp()}
        changed = {**request, "status": {**status, "conditions": [*(status.get("conditions") or []), said]}}
        return await self._api.replace(SIGNING_REQUESTS, changed, "approval")


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()
