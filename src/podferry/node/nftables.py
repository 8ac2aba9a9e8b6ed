"""nftables, as far as packets of a network namespace are held or rewritten by it: tables of our own, made and removed through
netlink, so that no program of the node is needed.

Formats: linux/netfilter/nfnetlink.h and nf_tables.h.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator, Sequence

from podferry.core.connections import TCP, Address
from podferry.node.netlink import ACK, CREATE, REQUEST, attribute, message, nest

IPV4, IPV6, INET = socket.AF_INET, socket.AF_INET6, 1
NEWTABLE, DELTABLE, NEWCHAIN, NEWRULE, _NEWSET, _NEWSETELEM = 0, 2, 3, 6, 9, 12
PREROUTING, LOCAL_IN, OUTPUT, RAW = 0, 1, 3, -300
FIRST = 8  # NFT_REG32_00: sixteen registers of four bytes each, in a row
NETWORK_HEADER, TRANSPORT_HEADER, L4PROTO = 1, 2, 16
_BEGIN, _END, _SUBSYSTEM, _MAP = 0x10, 0x11, 10, 8
_AT_ONCE = 400
"""Entries in one message: the length of an attribute is of sixteen bits."""


def command(family: int, kind: int, body: bytes, flags: int = 0) -> bytes:
    """A message about a table of this family, whose answer is waited for."""
    return message(_SUBSYSTEM << 8 | kind, REQUEST | ACK | flags, struct.pack("=BBH", family, 0, 0) + body)


def batch(messages: Iterable[bytes]) -> list[bytes]:
    """Netfilter takes messages between two that begin and end a transaction."""
    mark = struct.pack("=BBH", socket.AF_UNSPEC, 0, socket.htons(_SUBSYSTEM))
    return [message(_BEGIN, REQUEST, mark), *messages, message(_END, REQUEST, mark)]


def number(kind: int, value: int) -> bytes:
    """An attribute that is a number."""
    return attribute(kind, struct.pack(">i", value))


def expression(name: bytes, *data: bytes) -> bytes:
    """A part of a rule."""
    return nest(1, attribute(1, name + b"\0"), *((nest(2, *data),) if data else ()))


def packed(addresses: Iterable[Address]) -> bytes:
    """Addresses as they follow each other in a packet."""
    return b"".join(one.packed for one in addresses)


def key(protocol: str, addresses: Iterable[Address], source: int, destination: int) -> bytes:
    """By what a packet is looked up: its addresses, ports and protocol."""
    of_protocol = socket.IPPROTO_TCP if protocol == TCP else socket.IPPROTO_UDP
    return packed(addresses) + struct.pack(">HH", source, destination) + bytes([of_protocol, 0, 0, 0])


def size_of_addresses(version: int) -> int:
    """Bytes of both addresses of a packet."""
    return 2 * (4 if version == 4 else 16)


def at_addresses(version: int) -> int:
    """Where they begin in its header."""
    return 12 if version == 4 else 8


def load_key(version: int) -> tuple[bytes, ...]:
    """The parts of a rule that put a packet's key into registers, from the first."""
    addresses = size_of_addresses(version)
    ports, protocol = FIRST + addresses // 4, FIRST + addresses // 4 + 1
    at = at_addresses(version)
    return (
        expression(b"payload", number(1, FIRST), number(2, NETWORK_HEADER), number(3, at), number(4, addresses)),
        expression(b"payload", number(1, ports), number(2, TRANSPORT_HEADER), number(3, 0), number(4, 4)),
        expression(b"meta", number(1, protocol), number(2, L4PROTO)),
    )


def chain(family: int, table: bytes, name: bytes, hook: int, priority: int, kind: bytes = b"filter\0") -> bytes:
    """A chain of rules at a hook."""
    hooked = nest(4, number(1, hook), number(2, priority))
    return command(family, NEWCHAIN, attribute(1, table) + attribute(3, name) + hooked + attribute(7, kind), CREATE)


def rule(family: int, table: bytes, of_chain: bytes, *parts: bytes) -> bytes:
    """A rule at the end of a chain."""
    body = attribute(1, table) + attribute(2, of_chain) + nest(4, *parts)
    return command(family, NEWRULE, body, CREATE)


def entries(
    family: int, table: bytes, name: bytes, version: int, numbered: int, found: Sequence[tuple[bytes, bytes]]
) -> Iterator[bytes]:
    """A set of keys, or a map of them to addresses where they come with some. `numbered`: its number in this transaction."""
    is_map = any(value for _, value in found)
    addresses = size_of_addresses(version)
    described = attribute(1, table) + attribute(2, name) + number(3, _MAP if is_map else 0)
    described += number(4, 0) + number(5, addresses + 8)
    if is_map:
        described += number(6, 0) + number(7, addresses)
    yield command(family, _NEWSET, described + number(10, numbered), CREATE)
    for begin in range(0, len(found), _AT_ONCE):
        listed = [
            nest(1, nest(1, attribute(1, one)), *((nest(2, attribute(1, value)),) if value else ()))
            for one, value in found[begin : begin + _AT_ONCE]
        ]
        body = attribute(1, table) + attribute(2, name) + number(4, numbered) + nest(3, *listed)
        yield command(family, _NEWSETELEM, body, CREATE)
