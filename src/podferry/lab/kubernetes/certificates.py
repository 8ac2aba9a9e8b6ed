"""The certificates and kubeconfigs of a lab's Kubernetes, as its documentation asks for them.

https://kubernetes.io/docs/setup/best-practices/certificates/
"""

from __future__ import annotations

import datetime
import ipaddress
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from podferry.lab.kubernetes.pod_network import API_PORT, API_SERVICE
from podferry.lab.state import CONTROL, STORAGE
from podferry.wire.pki import CA_CERTIFICATE, CA_KEY, Authority

LIFE = datetime.timedelta(days=365)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, PEM."""

    certificate: bytes
    key: bytes


def issue(home: Path, addresses: Mapping[str, str]) -> None:
    """Write what is missing of the cluster's certificates below a lab's `home`; what is there stays."""
    directory = home / "pki-kubernetes"
    made = (directory / CA_KEY).exists()
    authority = Authority.load(directory) if made else Authority.create(directory, name="kubernetes")
    ca = (directory / CA_CERTIFICATE).read_bytes()
    server = f"https://{addresses[CONTROL]}:{API_PORT}"

    def kubeconfig(path: Path, user: str, group: str = "") -> None:
        if not path.exists():
            _write(path, _kubeconfig(server, ca, _sign(authority, user, group)).encode())

    kubeconfig(home / "kubeconfig", "kubernetes-admin", "system:masters")
    control = _etc(home, CONTROL)
    for component in ("kube-controller-manager", "kube-scheduler"):
        kubeconfig(control / f"{component}.kubeconfig", f"system:{component}")
    _pair(control, "apiserver", authority, CONTROL, names=_API_NAMES, addresses=[addresses[CONTROL], *_API_ADDRESSES])
    _pair(control, "kubelet-client", authority, "kube-apiserver-kubelet-client", "system:masters")
    _service_account_keys(control)
    _write(control / CA_CERTIFICATE, ca)
    for node, address in addresses.items():
        if node in (STORAGE, CONTROL):
            continue
        kubeconfig(_etc(home, node) / "kubelet.kubeconfig", f"system:node:{node}", "system:nodes")
        _pair(_etc(home, node), "kubelet", authority, node, names=[node], addresses=[address])
        _write(_etc(home, node) / CA_CERTIFICATE, ca)


_API_NAMES = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost", CONTROL]
_API_ADDRESSES = [API_SERVICE, "127.0.0.1"]


def _etc(home: Path, machine: str) -> Path:
    return home / "machines" / machine / "etc" / "kubernetes"


def _pair(
    directory: Path,
    name: str,
    authority: Authority,
    user: str,
    group: str = "",
    *,
    names: Sequence[str] = (),
    addresses: Sequence[str] = (),
) -> None:
    if not (directory / f"{name}.crt").exists():
        pair = _sign(authority, user, group, names=names, addresses=addresses)
        _write(directory / f"{name}.key", pair.key)
        _write(directory / f"{name}.crt", pair.certificate)


def _service_account_keys(directory: Path) -> None:
    if (directory / "service-account.pub").exists():
        return
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    _write(directory / "service-account.key", _pem(key))
    _write(directory / "service-account.pub", public)


def _sign(
    authority: Authority, user: str, group: str = "", *, names: Sequence[str] = (), addresses: Sequence[str] = ()
) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, user)]
    if group:
        subject.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, group))
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(subject))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + LIFE)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    known = [*map(x509.DNSName, names), *(x509.IPAddress(ipaddress.ip_address(one)) for one in addresses)]
    if known:
        builder = builder.add_extension(x509.SubjectAlternativeName(known), critical=False)
    certificate = builder.sign(authority.key, hashes.SHA256())
    return Pair(certificate.public_bytes(serialization.Encoding.PEM), _pem(key))


def _kubeconfig(server: str, ca: bytes, pair: Pair) -> str:
    """A kubeconfig is YAML, and JSON is YAML."""

    def data(pem: bytes) -> str:
        return b64encode(pem).decode()

    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "lab", "cluster": {"server": server, "certificate-authority-data": data(ca)}},
            ],
            "users": [
                {
                    "name": "lab",
                    "user": {"client-certificate-data": data(pair.certificate), "client-key-data": data(pair.key)},
                }
            ],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
            "current-context": "lab",
        },
        indent=2,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(content)
