"""An agent's certificate in a cluster: its key is made here and stays here; podferry's controller signs for the name of the node.

Certificates on disk that will do are used without asking anybody, so that an agent can take up what an earlier one
left while the API server is away.
"""

from __future__ import annotations

import base64
import datetime
import secrets
from pathlib import Path

import anyio
import structlog
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from podferry.errors import Failed, PodferryError, TimedOut
from podferry.fs.private import private_directory
from podferry.fs.replacing import replace_file
from podferry.kube.client import CONFIGMAPS, SIGNING_REQUESTS, Api
from podferry.wire.pki import AGENT_LIFE, BACKDATED, CA_CERTIFICATE, NODE_CERTIFICATE, NODE_KEY

SIGNER, BUNDLE = "podferry.dev/agent", "podferry-ca"
RENEW = AGENT_LIFE * 2 / 3
"""Time left at which a certificate is renewed: a controller may be away for days, and nobody notices."""
OVERLAP = datetime.timedelta(hours=1)
"""How long a new authority is trusted before a certificate of it is shown: by then every agent trusts it."""
PATIENCE = 120.0
POLL_AGAIN = 0.5
CHECK_EVERY = 300.0


async def ensure(api: Api, namespace: str, node: str, directory: Path) -> None:
    """See that `directory` holds a certificate for `node` that will do. Raises `Failed` where none can be had."""
    if usable(directory, node) is None:
        return None
    with anyio.move_on_after(PATIENCE):
        while True:
            try:
                return await obtain(api, namespace, node, directory)
            except PodferryError as error:
                structlog.get_logger().warning("no certificate yet", error=str(error))
                await anyio.sleep(2 * POLL_AGAIN)
    raise TimedOut(
        f"podferry-controller issued no certificate for {node} within {PATIENCE:.0f} s",
        remedy="check that podferry-controller runs, and see kubectl get csr and kubectl describe csr",
    )


async def keep(api: Api, namespace: str, node: str, directory: Path) -> None:
    """Trust whom the controller publishes, and renew the certificate in time. For ever; connections read the files anew.

    A change of the authority overlaps: both are trusted at once, and only then a certificate of the new one is asked for.
    """
    log = structlog.get_logger()
    while True:
        try:
            authorities = await bundle(api, namespace)
            _trust(directory, authorities)
            if (why := usable(directory, node, authorities)) is not None:
                log.info("a new certificate", reason=why)
                await obtain(api, namespace, node, directory)
        except PodferryError as error:
            log.warning("the certificate cannot be renewed now", error=str(error))
        await anyio.sleep(CHECK_EVERY)


def _trust(directory: Path, authorities: bytes) -> None:
    try:
        x509.load_pem_x509_certificates(authorities)
    except ValueError as wrong:
        raise Failed.because("the ConfigMap podferry-ca holds no valid certificate authority", wrong) from wrong
    place = directory / CA_CERTIFICATE
    if place.exists() and place.read_bytes() != authorities:
        replace_file(place, authorities, mode=0o600)


def usable(directory: Path, node: str, authorities: bytes | None = None) -> str | None:
    """Why what `directory` holds will not do; None where it does. `authorities` are those published, the current one first."""
    try:
        trusted = x509.load_pem_x509_certificates((directory / CA_CERTIFICATE).read_bytes())
        certificate = x509.load_pem_x509_certificate((directory / NODE_CERTIFICATE).read_bytes())
        key = serialization.load_pem_private_key((directory / NODE_KEY).read_bytes(), password=None)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        issuers = trusted if authorities is None else x509.load_pem_x509_certificates(authorities)
    except OSError:
        return "there is none"
    except (ValueError, TypeError, x509.ExtensionNotFound) as cause:
        return f"it is damaged: {cause}"
    now = datetime.datetime.now(datetime.UTC)
    signed = [one for one in issuers if _signed_by(certificate, one)]
    long_trusted = issuers[0].not_valid_before_utc + BACKDATED + OVERLAP < now
    wrong = {
        "the authority has changed": not signed
        or (authorities is not None and signed[0] != issuers[0] and long_trusted),
        "the key is not the certificate's": key.public_key() != certificate.public_key(),
        "it is another node's": names.get_values_for_type(x509.DNSName) != [node],
        "it ends soon": certificate.not_valid_after_utc - RENEW < now,
    }
    return next((why for why, so in wrong.items() if so), None)


def _signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


async def bundle(api: Api, namespace: str) -> bytes:
    """podferry's authorities, as the controller publishes them, the current one first."""
    published = await api.get(CONFIGMAPS, BUNDLE, namespace)
    return str(published["data"]["ca.crt"]).encode()


async def obtain(api: Api, namespace: str, node: str, directory: Path) -> None:
    """Make a key, have it signed, and put both down."""
    authority = await bundle(api, namespace)
    key = ec.generate_private_key(ec.SECP256R1())
    body = {
        "metadata": {"name": f"podferry-{node[:200]}-{secrets.token_hex(4)}"},
        "spec": {
            "signerName": SIGNER,
            "request": base64.b64encode(request(node, key)).decode(),
            "usages": ["digital signature", "server auth", "client auth"],
        },
    }
    made = await api.create(SIGNING_REQUESTS, body)
    name = made["metadata"]["name"]
    with anyio.move_on_after(PATIENCE):
        while True:
            status = (await api.get(SIGNING_REQUESTS, name)).get("status") or {}
            if certificate := status.get("certificate"):
                break
            for one in status.get("conditions") or []:
                if one["type"] in ("Denied", "Failed"):
                    raise Failed(f"the certificate request {name} was denied", why=one.get("message", ""))
            await anyio.sleep(POLL_AGAIN)
        private_directory(directory, below=directory.parent)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        replace_file(directory / CA_CERTIFICATE, authority, mode=0o600)
        replace_file(directory / NODE_KEY, private, mode=0o600)
        replace_file(directory / NODE_CERTIFICATE, base64.b64decode(certificate), mode=0o600)
        return
    raise TimedOut(
        f"podferry-controller did not sign the certificate request {name} within {PATIENCE:.0f} s",
        remedy=f"check that podferry-controller runs, and see kubectl describe csr {name}",
    )


def request(node: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A signing request for the name of the node."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node[:64])]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(node)]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
