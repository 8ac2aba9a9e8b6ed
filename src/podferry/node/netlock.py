"""Loopback held still: while the two ends of a connection inside a workload are dumped or restored, nothing passes between them.

CRIU reads one socket after the other, and containers of a pod are dumped and restored one after the other. What passed meanwhile
would be known to one end alone; and a packet that finds the other end not restored yet would be answered with a reset. TCP sends
again what is dropped here. Only what arrives over loopback is held: probes and new clients come in from outside as ever.

CRIU itself gives a restored connection the end that its peer had sent, as a packet of its own with a mark. It has to arrive: where
the peer is gone nobody sends it again, and the connection would be open, until its owner's end is answered with a reset.

A connection to another workload that is to live on is silent as well, in both directions: what came in after its socket was read
would be acknowledged and lost, and what came before there is a socket on the target would be answered with a reset.

CRIU has locks of its own (`network-lock`), but a lazy dump that fails late leaves them in place, and they end with one container.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from podferry.core.connections import TCP, End
from podferry.errors import Failed
from podferry.node import netlink, nftables
from podferry.node.netlink import CREATE, NETFILTER, attribute, nest
from podferry.node.netns import in_network_at, joined, on_node
from podferry.node.nftables import (
    DELTABLE,
    FIRST,
    INET,
    IPV4,
    IPV6,
    LOCAL_IN,
    NEWTABLE,
    OUTPUT,
    expression,
    number,
)

TABLE = b"podferry\0"
_ARRIVING, _LEAVING = b"arriving\0", b"leaving\0"
_PRIORITY = -400
_IIF, _MARK, _FAMILY, _REGISTER_1, _EQUAL, _NOT_EQUAL, _DROP = 4, 3, 15, 1, 0, 1, 0
CRIU_MARK = 0xC114  # SOCCR_MARK, CRIU's soccr/soccr.h

Ends = tuple[End, End]
"""A connection, by its local and its remote end."""


@dataclass(frozen=True)
class Namespace:
    """A network namespace, by a path that may name another one later, and its inode, which tells."""

    path: str
    inode: int

    @staticmethod
    def of(spec: Mapping[str, Any], pid: int) -> Namespace:
        """That of a container with this OCI spec whose first process is `pid`. Raises `OSError`."""
        path = joined(spec) or f"/proc/{pid}/ns/net"
        return Namespace(path, on_node(path).stat().st_ino)

    def there(self) -> bool:
        """Whether it is still what the path names."""
        try:
            return on_node(self.path).stat().st_ino == self.inode
        except OSError:
            return False

    def lock(self, silent: Collection[Ends] = (), both_ways: bool = True) -> None:
        """Drop what arrives over loopback, and the packets of the connections `silent`: those that arrive, and, `both_ways`, those
        that are sent. Raises `Failed`."""
        self._send("hold the container's traffic", _lock(silent, (_ARRIVING, _LEAVING) if both_ways else (_ARRIVING,)))

    def unlock(self) -> None:
        """Let it pass again; where the namespace is gone, or was not locked, there is nothing to do. Raises `Failed`."""
        if self.there():
            try:
                self._send("let the container's traffic pass", _unlock())
            except Failed as failed:
                if not isinstance(failed.__cause__, FileNotFoundError):
                    raise

    def _send(self, what: str, messages: list[bytes]) -> None:
        try:
            in_network_at(on_node(self.path), lambda: netlink.send(NETFILTER, *messages))
        except OSError as error:
            remedy = "the node's kernel needs nf_tables (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET)"
            raise Failed.because(f"cannot {what}", error, remedy=remedy) from error


def _where(key: int, operator: int, value: int) -> list[bytes]:
    """That what the kernel knows of a packet by this key is, or is not, this."""
    return [
        expression(b"meta", number(1, _REGISTER_1), number(2, key)),
        expression(
            b"cmp", number(1, _REGISTER_1), number(2, operator), nest(3, attribute(1, struct.pack("=I", value)))
        ),
    ]


def _is_version(version: int) -> list[bytes]:
    family = IPV4 if version == 4 else IPV6
    return [
        expression(b"meta", number(1, _REGISTER_1), number(2, _FAMILY)),
        expression(b"cmp", number(1, _REGISTER_1), number(2, _EQUAL), nest(3, attribute(1, bytes([family])))),
    ]


def _lock(silent: Collection[Ends], chains: Sequence[bytes]) -> list[bytes]:
    drop = expression(b"immediate", number(1, 0), nest(2, nest(2, number(1, _DROP))))
    is_not_of_criu = _where(_MARK, _NOT_EQUAL, CRIU_MARK)
    messages = [
        nftables.command(INET, NEWTABLE, attribute(1, TABLE), CREATE),
        nftables.chain(INET, TABLE, _ARRIVING, LOCAL_IN, _PRIORITY),
        nftables.chain(INET, TABLE, _LEAVING, OUTPUT, _PRIORITY),
        nftables.rule(INET, TABLE, _ARRIVING, *_where(_IIF, _EQUAL, netlink.LOOPBACK), *is_not_of_criu, drop),
    ]
    for version in (4, 6):
        keys = sorted({key for one in silent if one[0].address.version == version for key in _keys(*one)})
        if keys:
            name = b"silent%d\0" % version
            messages += nftables.entries(INET, TABLE, name, version, version, [(key, b"") for key in keys])
            found = expression(b"lookup", attribute(1, name), number(2, FIRST), number(4, version))
            for chain in chains:
                load = (*_is_version(version), *nftables.load_key(version))
                messages.append(nftables.rule(INET, TABLE, chain, *is_not_of_criu, *load, found, drop))
    return nftables.batch(messages)


def _keys(local: End, remote: End) -> Iterator[bytes]:
    """Those of packets in both directions."""
    for source, destination in ((local, remote), (remote, local)):
        yield nftables.key(TCP, (source.address, destination.address), source.port, destination.port)


def _unlock() -> list[bytes]:
    return nftables.batch([nftables.command(INET, DELTABLE, attribute(1, TABLE))])
