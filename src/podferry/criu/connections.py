"""Connections in CRIU's images of a workload, settled before they travel: which live on, and which are closed.

A connection with both ends in the workload, in one container or in two, is restored as it was, queues and all. One to the outside
cannot go on under another address, unless both ends' nodes rewrite its packets (`node/address_rewriting`): it is closed in the
image, so that its owner finds it closed by the other end as soon as it looks. (CRIU's `tcp-close` closes all of them.) What a
connect had begun is not connected: a connect that waits begins anew.

A socket may be bound to an address that the target's namespace has not, a pod's own. For what lives on by it, the target gives it
to loopback (`network.IMAGE` among the images says so), where it is nobody else's. Who listened at it would not be reached from
outside by the new address: so it listens at every address from then on, unless its port is taken at another one. A datagram
socket that was connected to the outside sends from the new address.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from podferry.core.connections import CLOSE, LISTEN, SYN_SENT, Address, End, OwnEnds
from podferry.core.limits import PARSED_IMAGE
from podferry.criu.dump_images import FILES_MAGIC, encode_entries, entries_of
from podferry.node.network_namespace import DEFAULT, IMAGE, Network
from podferry.node.newfile import small_file
from podferry.protos.pagemap_pb2 import FileEntry, InetSkEntry

FILES = "files.img"
BOTH = 3  # SK_SHUTDOWN__BOTH, CRIU's images/sk-opts.proto
_DATAGRAMS = frozenset({socket.IPPROTO_UDP, socket.IPPROTO_UDPLITE})

Key = tuple[int, str]
"""An image: its directory, one for each container, and its name."""


@dataclass(frozen=True)
class Settled:
    """The images as they travel, and what was closed in them, as `LOCAL -> REMOTE`."""

    images: Mapping[Key, bytes | Path]
    closed: tuple[str, ...]


def settle(images: Mapping[Key, bytes | Path], kept: Collection[tuple[End, End]] = ()) -> Settled:
    """Settle the connections of a workload, all of whose images these are; those `kept` live on although their other end stays.
    Raises `PeerMisbehaved` for what is no image."""
    read = {key: content(data) for key, data in images.items() if key[1] == FILES}
    files = {key: entries_of(data, FILES, FILES_MAGIC, FileEntry) for key, data in read.items()}
    sockets = [entry.isk for entries in files.values() for entry in entries if entry.HasField("isk")]
    if not any(one.src_port for one in sockets):
        return Settled(images, ())
    workload = _Workload(sockets, kept)
    settled, closed = dict(images), []
    for (directory, name), entries in files.items():
        needed: list[Address] = []
        for entry in entries:
            if entry.HasField("isk"):
                one = entry.isk
                if _is_connection(one) and not workload.keeps(one):
                    closed.append(f"{_local(one)} -> {_remote(one)}")
                    settled.pop((directory, f"tcp-stream-{one.ino:x}.img"), None)
                    _close(one)
                needed += workload.rebound(one)
        settled[directory, name] = encode_entries(FILES_MAGIC, entries)
        _need(settled, directory, needed)
    return Settled(settled, tuple(closed))


def close(images: Path, ended: Collection[tuple[End, End]]) -> tuple[str, ...]:
    """Close these connections in the images of one container, in this directory; what was closed, as `LOCAL -> REMOTE`. Raises
    `PeerMisbehaved` for what is no image."""
    if not (path := images / FILES).exists():
        return ()
    entries, closed = entries_of(content(path), FILES, FILES_MAGIC, FileEntry), []
    for one in (entry.isk for entry in entries if entry.HasField("isk")):
        if _is_connection(one) and (_local(one), _remote(one)) in ended:
            closed.append(f"{_local(one)} -> {_remote(one)}")
            (images / f"tcp-stream-{one.ino:x}.img").unlink(missing_ok=True)
            _close(one)
    if closed:
        path.write_bytes(encode_entries(FILES_MAGIC, entries))
    return tuple(closed)


def content(image: bytes | Path) -> bytes:
    """What is in an image that is read as a whole. Raises `TooMuch` for one that is too large for that."""
    return image if isinstance(image, bytes) else small_file(image, PARSED_IMAGE)


class _Workload:
    """The sockets of all containers together."""

    def __init__(self, sockets: list[InetSkEntry], kept: Collection[tuple[End, End]]) -> None:
        self._kept = kept
        self._ends = OwnEnds(
            ((_local(one), _remote(one)) for one in sockets if _is_connection(one)),
            (_local(one).address for one in sockets if one.src_port),
        )
        self._bound: dict[tuple[int, int], set[Address]] = {}
        for one in filter(_is_bound, sockets):
            self._bound.setdefault((one.proto, one.src_port), set()).add(_local(one).address)

    def keeps(self, one: InetSkEntry) -> bool:
        """Whether a connection can go on: its other end is here, or was, and has said all that it had to say."""
        local, remote = _local(one), _remote(one)
        return (local, remote) in self._kept or self._ends.keep(local, remote, one.state)

    def rebound(self, one: InetSkEntry) -> Iterator[Address]:
        """Have a socket restored under the new address where it can be; the address that it needs."""
        here = _local(one)
        if not one.src_port or not _is_of_a_node(here.address):
            return
        if one.proto in _DATAGRAMS and one.dst_port and not self._ends.has(_remote(one)):
            _anywhere(one)
            return
        yield here.address
        family = socket.AF_INET if here.address.version == 4 else socket.AF_INET6
        if _is_bound(one) and len(self._bound[one.proto, one.src_port]) == 1 and one.family == family:
            _anywhere(one)


def _need(images: dict[Key, bytes | Path], directory: int, addresses: list[Address]) -> None:
    """Have the target give loopback these addresses."""
    if not addresses:
        return
    described = images.get((directory, IMAGE))
    network = Network.decode(content(described)) if described else DEFAULT
    there = {ipaddress.ip_interface(one).ip for one in network.addresses}
    more = {str(ipaddress.ip_interface(one)) for one in addresses if one not in there}
    images[directory, IMAGE] = replace(network, addresses=(*network.addresses, *sorted(more))).encode()


def _is_connection(one: InetSkEntry) -> bool:
    """As CRIU's `tcp_connection` (criu/sk-inet.c)."""
    return one.proto == socket.IPPROTO_TCP and one.dst_port != 0


def _is_bound(one: InetSkEntry) -> bool:
    """Whether it waits at a port for whoever comes."""
    return bool(one.src_port) and (one.state == LISTEN or (one.proto in _DATAGRAMS and not one.dst_port))


def _is_of_a_node(address: Address) -> bool:
    return not (address.is_loopback or address.is_unspecified or address.is_multicast or address.is_link_local)


def _close(one: InetSkEntry) -> None:
    if one.state != SYN_SENT:
        one.shutdown = BOTH
    one.state = CLOSE
    one.src_port = one.dst_port = 0
    one.src_addr[:], one.dst_addr[:] = [0] * len(one.src_addr), [0] * len(one.dst_addr)


def _anywhere(one: InetSkEntry) -> None:
    one.src_addr[:] = [0] * len(one.src_addr)
    if one.family == socket.AF_INET6:
        one.v6only = True  # as it was at one address


def _local(one: InetSkEntry) -> End:
    return End(_address(one, one.src_addr), one.src_port)


def _remote(one: InetSkEntry) -> End:
    return End(_address(one, one.dst_addr), one.dst_port)


def _address(one: InetSkEntry, words: Iterable[int]) -> Address:
    packed = b"".join(struct.pack("=I", word) for word in words)
    if one.family == socket.AF_INET:
        return ipaddress.IPv4Address(packed[:4].ljust(4, b"\0"))
    found = ipaddress.IPv6Address(packed[:16].ljust(16, b"\0"))
    return found.ipv4_mapped or found
