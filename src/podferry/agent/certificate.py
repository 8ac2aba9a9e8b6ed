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
from podferry.kube.client import CONFIGMAPS, SIGNING_REQUESTS, Api
from podferry.wire.pki import CA_CERTIFICATE, NODE_CERTIFICATE, NODE_KEY

SIGNER, BUNDLE = "podferry.dev/agent", "podferry-ca"
RENEW = datetime.timedelta(days=90)
PATIENCE = 120.0
LOOK_AGAIN = 0.5
CHECK_EVERY = 3600.0


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
                await anyio.sleep(2 * LOOK_AGAIN)
    raise TimedOut("no certificate was had", remedy="is podferry-controller running? kubectl get csr")


async def keep(api: Api, namespace: str, node: str, directory: Path) -> None:
    """Renew it in time, and when the authority has changed. For ever; connections read the files anew."""
    log = structlog.get_logger()
    while True:
        try:
            authority = await bundle(api, namespace)
            if (why := usable(directory, node, authority)) is not None:
                log.info("a new certificate", reason=why)
                await obtain(api, namespace, node, directory)
        except PodferryError as error:
            log.warning("the certificate cannot be renewed now", error=str(error))
        await anyio.sleep(CHECK_EVERY)


def usable(directory: Path, node: str, authority: bytes | None = None) -> str | None:
    """Why what `directory` holds will not do; None where it does."""
    try:
        authorities = (directory / CA_CERTIFICATE).read_bytes()
        root = x509.load_pem_x509_certificate(authorities)
        certificate = x509.load_pem_x509_certificate((directory / NODE_CERTIFICATE).read_bytes())
        key = serialization.load_pem_private_key((directory / NODE_KEY).read_bytes(), password=None)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        certificate.verify_directly_issued_by(root)
    except OSError:
        return "there is none"
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as cause:
        return f"it is damaged: {cause}"
    wrong = {
        "the authority has changed": authority is not None and authority != authorities,
        "the key is not the certificate's": key.public_key() != certificate.public_key(),
        "it is another node's": names.get_values_for_type(x509.DNSName) != [node],
        "it ends soon": certificate.not_valid_after_utc - RENEW < datetime.datetime.now(datetime.UTC),
    }
    return next((why for why, so in wrong.items() if so), None)


async def bundle(api: Api, namespace: str) -> bytes:
    """podferry's authority, as the controller publishes it."""
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
                    raise Failed("the certificate was denied", why=one.get("message", ""))
            await anyio.sleep(LOOK_AGAIN)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _write(directory / CA_CERTIFICATE, authority)
        _write(directory / NODE_KEY, private)
        _write(directory / NODE_CERTIFICATE, base64.b64decode(certificate))
        return
    raise TimedOut("nobody signed the certificate", why=name, remedy="is podferry-controller running?")


def request(node: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A signing request for the name of the node."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node[:64])]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(node)]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.touch(mode=0o600)
    temporary.write_bytes(content)
    temporary.replace(path)
