"""Who is really at the other end of a connection: the kernel's connection tracking knows the translations of Services.

A connection to a Service has the Service's address at its socket; the node of the pod that connected translates it (kube-proxy), or
the pod's own network namespace does (a service mesh). Where a program translates at the socket (Cilium), the socket itself tells.
Asked through netlink, one connection at a time: the whole table of a node may be large. Formats:
linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Callable

from podferry.core.connections import TCP, Address, End
from podferry.errors import Failed
from podferry.node import netlink
from podferry.node.netlink import NETFILTER, attribute, attributes, nest
from podferry.node.netns import in_network_of

_GET = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
_ORIGINAL, _REPLY, _IP, _PROTOCOL = 1, 2, 1, 2  # CTA_TUPLE_ORIG, _REPLY; CTA_TUPLE_IP, _PROTO
_V4, _V6 = (1, 2), (3, 4)  # CTA_IP_*_SRC, _DST
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
MOST = 1024
"""Connections that are asked for of one workload."""

Tuple = tuple[End, End]
"""Source and destination."""


class Translations:
    """What the network namespace of a process, and the node's, know of connections in that namespace."""

    def __init__(self, pid: int) -> None:
        self._pid, self._asked = pid, 0

    def backend(self, protocol: str, local: End, remote: End) -> End | None:
        """Who is really at the other end; None where there is no translation, or nobody knows one."""
        self._asked += 1
        if self._asked > MOST or local.address.version != remote.address.version:
            return None
        found = self._looked_up(lambda: real_peer(protocol, local, remote))
        return found if found is not None else _quietly(lambda: real_peer(protocol, local, remote))

    def _looked_up(self, look: Callable[[], End | None]) -> End | None:
        return _quietly(lambda: in_network_of(self._pid, look))


def _quietly(look: Callable[[], End | None]) -> End | None:
    try:
        return look()
    except (OSError, Failed):  # no connection tracking in this kernel, or no right to ask: nobody knows
        return None


def real_peer(protocol: str, local: End, remote: End) -> End | None:
    """The other end of a connection behind a translation of this thread's network namespace, or None. Raises `OSError`."""
    family = socket.AF_INET if local.address.version == 4 else socket.AF_INET6
    body = struct.pack("=BBH", family, 0, 0) + nest(_ORIGINAL, *_tuple(protocol, local, remote))
    answer = netlink.get(NETFILTER, _GET, body)
    if answer is None:
        return None
    told = attributes(answer[4:])
    original, reply = _ends(told.get(_ORIGINAL, b"")), _ends(told.get(_REPLY, b""))
    if original is None or reply is None:
        return None
    # Whoever was called finds its connection by what it answers: then the caller is the original's source.
    peer = reply[0] if original == (local, remote) else original[0]
    return peer if peer != remote else None


def _tuple(protocol: str, source: End, destination: End) -> tuple[bytes, bytes]:
    kinds = _V4 if source.address.version == 4 else _V6
    number = socket.IPPROTO_TCP if protocol == TCP else socket.IPPROTO_UDP
    return (
        nest(_IP, attribute(kinds[0], source.address.packed), attribute(kinds[1], destination.address.packed)),
        nest(
            _PROTOCOL,
            attribute(_NUMBER, bytes([number])),
            attribute(_SOURCE_PORT, struct.pack(">H", source.port)),
            attribute(_DESTINATION_PORT, struct.pack(">H", destination.port)),
        ),
    )


def _ends(data: bytes) -> Tuple | None:
    parts = attributes(data)
    addresses, ports = attributes(parts.get(_IP, b"")), attributes(parts.get(_PROTOCOL, b""))
    source, destination = (addresses.get(kinds[0]) or addresses.get(kinds[1]) for kinds in zip(_V4, _V6, strict=True))
    from_port, to_port = ports.get(_SOURCE_PORT), ports.get(_DESTINATION_PORT)
    if source is None or destination is None or from_port is None or to_port is None:
        return None
    return _end(source, from_port), _end(destination, to_port)


def _end(packed: bytes, port: bytes) -> End:
    address: Address = ipaddress.ip_address(packed)
    return End(address, int.from_bytes(port, "big"))
