"""How programs reach the network from here: through the proxies and with the certificates that this machine uses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from podferry.node.process import run

# Where distributions keep the authorities that the system trusts, a company's own among them. The first that exists counts.
BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_KEPT = re.compile(r"(https?|ftp|no|all)_proxy|SSL_CERT_FILE|SSL_CERT_DIR|PIP_.*|UV_.*", re.IGNORECASE)
_PROXY = re.compile(r"(https?|ftp|no|all)_proxy", re.IGNORECASE)
UNREACHABLE = re.compile(
    r"could ?n.t (download|resolve|connect)|could not (resolve|connect)|temporary failure|failed to fetch|unable to resolve|"
    r"failed getting release file|connection (timed out|refused|failed)|network is unreachable|"
    r"certificate verif|\bproxy (error|auth|server|connection)|407 |no route to host|invalid release file|error retrieving",
    re.IGNORECASE,
)

FULL = re.compile("no space left|(not|n.t) have enough free space|disk full", re.IGNORECASE)
FREE_DISK = "free disk space, or point PODFERRY_STATE to a directory on a larger disk"


def downloads(given: Mapping[str, str] | None = None, bundles: tuple[str, ...] = BUNDLES) -> dict[str, str]:
    """The environment a program needs that downloads: the clean one, with proxies and certificates of our own (`given`).

    uv and pip trust what the system trusts, unless they are told otherwise: a company's TLS proxy is among that, and not
    among the authorities that they bring along.
    """
    given = os.environ if given is None else given
    kept = {key: value for key, value in given.items() if _KEPT.fullmatch(key)}
    for key, value in list(kept.items()):
        if _PROXY.fullmatch(key):  # wget and apt read the small one only, other programs the great one only
            kept.setdefault(key.lower(), value)
            if key.lower() != "http_proxy":  # curl's way: a web server sets HTTP_PROXY from a header called Proxy
                kept.setdefault(key.upper(), value)
    bundle = next((path for path in bundles if Path(path).is_file()), None)
    if bundle is not None:
        # Two names, for uv before and since 0.9.
        if not {"UV_NATIVE_TLS", "UV_SYSTEM_CERTS"} & kept.keys():
            kept |= {"UV_NATIVE_TLS": "true", "UV_SYSTEM_CERTS": "true"}
        kept.setdefault("PIP_CERT", kept.get("SSL_CERT_FILE", bundle))
    return kept


def for_debian(mirror: str) -> dict[str, str]:
    """As `downloads`, with the proxy that apt is configured to use for `mirror` where the environment names none."""
    environment = downloads()
    scheme = mirror.partition(":")[0]
    if f"{scheme}_proxy" not in environment and (proxy := apt_proxy(scheme)):
        environment[f"{scheme}_proxy"] = proxy
    return environment


def apt_proxy(scheme: str) -> str:
    """The proxy that apt is configured to use for http or https, or nothing."""
    done = run(["apt-config", "shell", "PROXY", f"Acquire::{scheme}::Proxy"], check=False)
    match = re.search(r"PROXY='(http[^']*)'", done.stdout)
    return match[1] if match else ""


def remedy(said: str, otherwise: str = "") -> str:
    """What to do after a download that ended with these words; `otherwise` where they are not about the network."""
    if re.search("certificate", said, re.IGNORECASE):
        return "does this machine trust the authority (update-ca-certificates)? PODFERRY_DEBIAN_MIRROR names another mirror"
    if UNREACHABLE.search(said):
        return "is the mirror reachable? PODFERRY_DEBIAN_MIRROR names another, http_proxy and https_proxy a proxy"
    return FREE_DISK if FULL.search(said) else otherwise
