"""TLS between agents: version 1.3, both sides' certificates, and the peer's *name* checked, not merely who signed (I6).

The dialling side knows which node it means to reach and takes no other. The accepting side learns the node from the
client's certificate and holds the `Hello` to it. What OpenSSL reports becomes `PeerUntrusted`, or `PeerLost` where no
handshake took place, with the reason in words.

The cipher suite is OpenSSL's choice, AES-256-GCM as a rule. AES-128-GCM would save some 5 % of the encryption itself,
but Python before 3.15 cannot choose among the suites of TLS 1.3.
"""

from __future__ import annotations

import math
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509

from podferry.errors import PeerLost, PeerUntrusted, PodferryError, UsageError
from podferry.wire.pki import CA_CERTIFICATE, NODE_CERTIFICATE, NODE_KEY

_REMEDY_ISSUE = "issue both nodes' certificates from the same authority"
_REMEDY_TIME = "renew the certificate and look at the clocks of both nodes"

# OpenSSL's X509_V_ERR_* (include/openssl/x509_vfy.h): what a user should read instead.
_VERIFY: dict[int, tuple[str, str]] = {
    7: ("another authority issued its certificate", _REMEDY_ISSUE),
    9: ("its certificate is not valid yet", _REMEDY_TIME),
    10: ("its certificate has expired", _REMEDY_TIME),
    18: ("it issued its certificate itself", _REMEDY_ISSUE),
    19: ("another authority issued its certificate", _REMEDY_ISSUE),
    20: ("another authority issued its certificate", _REMEDY_ISSUE),
    30: ("another authority issued its certificate", _REMEDY_ISSUE),
    62: ("its certificate is another node's", "look at the address that belongs to this node's name"),
}
# SSLError.reason: TLS alerts that the peer sent about *our* certificate, and what is no TLS 1.3 at all.
_ALERTS: dict[str, str] = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate and we showed none",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the authority that issued our certificate",
    "TLSV1_ALERT_DECRYPT_ERROR": "it does not know the authority that issued our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "our certificate has expired, or is not valid yet",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not take our certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not take our certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "our certificate is not meant for this use",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it does not speak TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "it does not speak TLS 1.3",
    "TLSV1_ALERT_ACCESS_DENIED": "it denies us access",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "HTTP_REQUEST": "it speaks HTTP, not TLS",
    "HTTPS_PROXY_REQUEST": "it speaks HTTP, not TLS",
    "PACKET_LENGTH_TOO_LONG": "it does not speak TLS",
    "RECORD_LAYER_FAILURE": "it does not speak TLS",
    "UNEXPECTED_MESSAGE": "it does not speak TLS as it should",
}


@dataclass(frozen=True)
class Credentials:
    """A node's certificates: the directory with ca.crt, node.crt and node.key, and the node's name from node.crt.

    The files are read anew for every connection, so renewed certificates are used without a restart.
    """

    directory: Path
    node: str

    @classmethod
    def load(cls, directory: Path) -> Credentials:
        """Raises `UsageError` for files that are missing, damaged, or do not belong together."""
        try:
            certificate = x509.load_pem_x509_certificate((directory / NODE_CERTIFICATE).read_bytes())
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            (node, *_) = names.get_values_for_type(x509.DNSName)
        except (OSError, ValueError, x509.ExtensionNotFound) as cause:
            raise UsageError.because(f"no usable node certificate in {directory}", cause) from cause
        credentials = cls(directory, node)
        credentials.server()
        return credentials

    def not_after(self) -> float:
        """When the node's certificate ends, in seconds since 1970; NaN where that cannot be read now."""
        try:
            certificate = x509.load_pem_x509_certificate((self.directory / NODE_CERTIFICATE).read_bytes())
        except (OSError, ValueError):
            return math.nan
        return certificate.not_valid_after_utc.timestamp()

    def client(self) -> ssl.SSLContext:
        """The context of the side that dials; give `server_hostname` the name of the node that is meant."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.hostname_checks_common_name = False
        return self._prepare(context)

    def server(self) -> ssl.SSLContext:
        """The context of the side that accepts."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # nothing is ever resumed
        return self._prepare(context)

    def _prepare(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        try:
            context.load_verify_locations(self.directory / CA_CERTIFICATE)
            context.load_cert_chain(self.directory / NODE_CERTIFICATE, self.directory / NODE_KEY)
        except OSError as cause:  # ssl.SSLError is one
            raise UsageError.because(f"no usable certificates in {self.directory}", cause) from cause
        return context


def certified_names(connection: ssl.SSLSocket) -> frozenset[str]:
    """The DNS names in the peer's verified certificate."""
    certificate: dict[str, Any] = connection.getpeercert() or {}
    return frozenset(value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS")


def check_name(node: str, names: frozenset[str], peer: str) -> None:
    """Raise `PeerUntrusted` unless the peer's certificate names exactly `node`; a wildcard does not."""
    if node not in names:
        raise PeerUntrusted(
            f"{peer} is not {node}",
            why=f"its certificate is that of {', '.join(sorted(names)) or 'no node'}",
            remedy=_VERIFY[62][1],
        )


def explain(peer: str, cause: OSError) -> PodferryError:
    """What an error of the TLS library, or of the socket under it, means for the connection with `peer`."""
    if isinstance(cause, ssl.SSLCertVerificationError):
        why, remedy = _VERIFY.get(cause.verify_code, (f"its certificate fails: {cause.verify_message}", _REMEDY_ISSUE))
        return PeerUntrusted(f"{peer} is not trusted", why=why, remedy=remedy, evidence=[str(cause)])
    if isinstance(cause, ssl.SSLError) and cause.reason in _ALERTS:
        return PeerUntrusted(f"no trust between this node and {peer}", why=_ALERTS[cause.reason], evidence=[str(cause)])
    if isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return PeerLost(f"{peer} closed the connection")
    return PeerLost.because(f"lost the connection with {peer}", cause)
