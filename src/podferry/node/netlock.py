"""Loopback held still: while the two ends of a connection inside a workload are dumped or restored, nothing passes between them.

CRIU reads one socket after the other, and containers of a pod are dumped and restored one after the other. What passed meanwhile
would be known to one end alone; and a packet that finds the other end not restored yet would be answered with a reset. TCP sends
again what is dropped here. Only what arrives over loopback is held: probes and new clients come in from outside as ever.

CRIU itself gives a restored connection the end that its peer had sent, as a packet of its own with a mark. It has to arrive: where
the peer is gone nobody sends it again, and the connection would be open, until its owner's end is answered with a reset.

CRIU has locks of its own (`network-lock`), but a lazy dump that fails late leaves them in place, and they end with one container.
One nftables table is made and removed through netlink, so that no program of the node is needed.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from podferry.errors import Failed
from podferry.node import netlink
from podferry.node.netlink import ACK, CREATE, NETFILTER, REQUEST, attribute, message, nest
from podferry.node.netns import in_network_at, joined, on_node

TABLE = b"podferry\0"
# linux/netfilter/nfnetlink.h and nf_tables.h
_BEGIN, _END, _SUBSYSTEM, _INET = 0x10, 0x11, 10, 1
_NEWTABLE, _DELTABLE, _NEWCHAIN, _NEWRULE = 0, 2, 3, 6
_LOCAL_IN, _PRIORITY = 1, -400
_IIF, _MARK, _REGISTER_1, _EQUAL, _NOT_EQUAL, _DROP = 4, 3, 1, 0, 1, 0
CRIU_MARK = 0xC114  # SOCCR_MARK, CRIU's soccr/soccr.h


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

    def lock(self) -> None:
        """Drop what arrives over loopback. Raises `Failed`."""
        self._send("hold the container's loopback traffic", _lock())

    def unlock(self) -> None:
        """Let it pass again; where the namespace is gone, or was not locked, there is nothing to do. Raises `Failed`."""
        if self.there():
            try:
                self._send("let the container's loopback traffic pass", _unlock())
            except Failed as failed:
                if not isinstance(failed.__cause__, FileNotFoundError):
                    raise

    def _send(self, what: str, messages: list[bytes]) -> None:
        try:
            in_network_at(on_node(self.path), lambda: netlink.send(NETFILTER, *messages))
        except OSError as error:
            remedy = "the node's kernel needs nf_tables (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET)"
            raise Failed.because(f"cannot {what}", error, remedy=remedy) from error


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return message(_SUBSYSTEM << 8 | kind, REQUEST | flags, struct.pack("=BBH", _INET, 0, 0) + body)


def _batch(messages: list[bytes]) -> list[bytes]:
    """Netfilter takes messages between two that begin and end a transaction."""
    mark = struct.pack("=BBH", socket.AF_UNSPEC, 0, socket.htons(_SUBSYSTEM))
    return [message(_BEGIN, REQUEST, mark), *messages, message(_END, REQUEST, mark)]


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">i", value))


def _expression(name: bytes, *data: bytes) -> bytes:
    return nest(1, attribute(1, name + b"\0"), nest(2, *data))


def _where(key: int, operator: int, value: int) -> list[bytes]:
    """That what the kernel knows of a packet by this key is, or is not, this."""
    return [
        _expression(b"meta", _number(1, _REGISTER_1), _number(2, key)),
        _expression(
            b"cmp", _number(1, _REGISTER_1), _number(2, operator), nest(3, attribute(1, struct.pack("=I", value)))
        ),
    ]


def _lock() -> list[bytes]:
    table, chain = attribute(1, TABLE), b"arriving\0"
    hook = nest(4, _number(1, _LOCAL_IN), _number(2, _PRIORITY))
    is_loopback = _where(_IIF, _EQUAL, netlink.LOOPBACK)
    is_not_of_criu = _where(_MARK, _NOT_EQUAL, CRIU_MARK)
    drop = _expression(b"immediate", _number(1, 0), nest(2, nest(2, _number(1, _DROP))))
    return _batch(
        [
            _message(_NEWTABLE, ACK | CREATE, table),
            _message(_NEWCHAIN, ACK | CREATE, table + attribute(3, chain) + hook + attribute(7, b"filter\0")),
            _message(
                _NEWRULE, ACK | CREATE, table + attribute(2, chain) + nest(4, *is_loopback, *is_not_of_criu, drop)
            ),
        ]
    )


def _unlock() -> list[bytes]:
    return _batch([_message(_DELTABLE, ACK, attribute(1, TABLE))])
