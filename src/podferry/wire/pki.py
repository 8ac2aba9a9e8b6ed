"""A small certificate authority, for the lab, for tests and for nodes without a PKI of their own.

A node's certificate carries the node's name as DNS name, since peers check that name and not merely who signed (I6),
and serves both roles, since a node dials and is dialled. ECDSA P-256: small handshakes, supported everywhere.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from podferry.errors import Failed, UsageError
from podferry.fs.private import private_directory
from podferry.fs.replacing import replace_file

CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
NODE_CERTIFICATE, NODE_KEY = "node.crt", "node.key"

AUTHORITY_LIFE = datetime.timedelta(days=3650)
NODE_LIFE = datetime.timedelta(days=365)
AGENT_LIFE = datetime.timedelta(days=7)
"""Of certificates that are renewed by themselves, as in a cluster: that of a node that is gone is soon worth nothing."""
MOST_AUTHORITIES = 3
BACKDATED = datetime.timedelta(hours=1)
"""Certificates begin this much in the past, so that a node whose clock is late can use them at once."""

# RFC 1123 as Kubernetes applies it to node names: lower case, labels of at most 63 characters, 253 in all. A last
# label of digits alone is left out: TLS would take such a name for an IP address.
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NODE_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)*(?!\d+\Z){_LABEL}\Z")


def check_node_name(name: str) -> str:
    """`name` itself if it can be a node's; else `UsageError`."""
    if not _NODE_NAME.match(name):
        raise UsageError(
            f"{name[:300]!r} cannot be a node's name",
            why="it must be a DNS name in lower case (RFC 1123) and not an IP address",
        )
    return name


@dataclass(frozen=True)
class Authority:
    """A certificate authority. Its key stays in the directory that it was made in."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, directory: Path, *, name: str = "podferry") -> Authority:
        """Make an authority in `directory`. Raises `UsageError` where one exists: a new one would orphan its nodes."""
        private_directory(directory, below=directory)
        if (directory / CA_KEY).exists():
            raise UsageError(f"{directory} holds an authority already", remedy="load it, or remove the directory")
        authority = cls.new(name)
        certificate, key = authority.to_pem()
        _write(directory / CA_CERTIFICATE, certificate, 0o644)
        _write(directory / CA_KEY, key, 0o600)
        return authority

    @classmethod
    def new(cls, name: str = "podferry") -> Authority:
        """An authority that is nowhere but in memory."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority")])
        now = _now()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(now + AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    def to_pem(self) -> tuple[bytes, bytes]:
        """Certificate and key."""
        return self.certificate.public_bytes(serialization.Encoding.PEM), _pem(self.key)

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """The authority that `create` made in `directory`. Raises `UsageError` where there is none or it is damaged."""
        try:
            certificate, key = (directory / CA_CERTIFICATE).read_bytes(), (directory / CA_KEY).read_bytes()
        except OSError as cause:
            raise UsageError.because(f"no usable authority in {directory}", cause) from cause
        return cls.from_pem(certificate, key, f"no usable authority in {directory}")

    @classmethod
    def from_pem(cls, certificate: bytes, key: bytes, what: str = "no usable authority") -> Authority:
        """The authority whose `to_pem` this is. Raises `UsageError`, saying `what`."""
        try:
            read = x509.load_pem_x509_certificate(certificate)
            private = serialization.load_pem_private_key(key, password=None)
        except ValueError as cause:
            raise UsageError.because(what, cause) from cause
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise UsageError(what, why="its key is not an elliptic-curve key")
        return cls(read, private)

    def issue(
        self,
        name: str,
        addresses: Sequence[str],
        into: Path,
        *,
        not_before: datetime.datetime | None = None,
        not_after: datetime.datetime | None = None,
    ) -> None:
        """Write ca.crt, node.crt and node.key (0600) for the node `name` into the directory `into`.

        `addresses` are IP addresses; the times are UTC, by default a year from now. Files there are replaced, each at
        once. Raises `UsageError` for a name or an address that is none.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.certify(name, addresses, key.public_key(), not_before=not_before, not_after=not_after)
        private_directory(into, below=into)
        _write(into / CA_CERTIFICATE, self.certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        _write(into / NODE_KEY, _pem(key), 0o600)
        _write(into / NODE_CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM), 0o644)

    def certify(
        self,
        name: str,
        addresses: Sequence[str],
        key: ec.EllipticCurvePublicKey,
        *,
        not_before: datetime.datetime | None = None,
        not_after: datetime.datetime | None = None,
    ) -> x509.Certificate:
        """A certificate for the node `name` with this `key`, which never left it. Otherwise as `issue`."""
        check_node_name(name)
        try:
            ips = [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        except ValueError as cause:
            raise UsageError.because(f"no certificate for {name}", cause) from cause
        # The common name, which nobody checks, holds 64 characters at most (RFC 5280, ub-common-name).
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
        now = _now()
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before or now - BACKDATED)
            .not_valid_after(not_after or now + NODE_LIFE)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name), *ips]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )


def with_former(current: bytes, published: str, *, now: datetime.datetime | None = None) -> str:
    """What to trust: the authority `current` (PEM) first, then of those `published` before it those with living certificates.

    An authority is no longer trusted once every certificate that it signed before `current` began has ended.
    """
    now = now or _now()
    newest = x509.load_pem_x509_certificate(current)
    kept = [newest]
    if newest.not_valid_before_utc + BACKDATED + AGENT_LIFE > now:
        try:
            former = x509.load_pem_x509_certificates(published.encode())
        except ValueError:
            former = []
        kept += [one for one in former if one != newest and one.not_valid_after_utc > now][: MOST_AUTHORITIES - 1]
    return "".join(one.public_bytes(serialization.Encoding.PEM).decode() for one in kept)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    """Put `content` at `path` in one step; nobody meets half a file or a key that others may read."""
    try:
        replace_file(path, content, mode=mode)
    except OSError as cause:
        raise Failed.because(f"cannot write {path}", cause) from cause
