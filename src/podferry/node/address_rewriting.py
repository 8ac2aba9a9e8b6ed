"""Connections that go on although one of their ends has another address now: their packets are rewritten at both ends.

Both programs know a connection by its original addresses. On the wire it has those that the pods have now. Each end's own network
namespace rewrites between the two, without state: what its sockets send, before it is routed, and what arrives, before anything
else looks at it. Connection tracking would know only half of it, so it is left out. Nothing outside the two namespaces takes part,
whatever the CNI. A pod that has moved keeps its original address on loopback, where its sockets find it.

One table in each namespace has a map for each direction, by protocol, addresses and ports: however many connections there are, a
packet is looked up once. A connection has one entry, from the original addresses to the newest, never a chain: so moves of the same
end, of the other, and of both compose. The table is replaced as a whole, in one transaction of netlink's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from podferry.core.translation import Translation
from podferry.node import netlink, nftables
from podferry.node.netlink import CREATE, NETFILTER, attribute
from podferry.node.nftables import FIRST, IPV4, IPV6, NETWORK_HEADER, OUTPUT, PREROUTING, RAW, expression, number

TABLE = b"podferry_moved\0"
_CSUM_INET, _PSEUDO_HEADER, _CSUM_OF_IPV4 = 1, 1, 10
_DIRECTIONS = ((b"sent\0", OUTPUT, b"route\0"), (b"arrived\0", PREROUTING, b"filter\0"))


def establish(translations: Sequence[Translation]) -> None:
    """Rewrite these connections, and no others, in the network namespace of this thread. Raises `OSError`."""
    for version, family in ((4, IPV4), (6, IPV6)):
        mine = [one for one in translations if one.local.address.version == version]
        table = attribute(1, TABLE)
        messages = [
            nftables.command(family, nftables.NEWTABLE, table, CREATE),
            nftables.command(family, nftables.DELTABLE, table),
        ]
        if mine:
            messages.append(nftables.command(family, nftables.NEWTABLE, table, CREATE))
            for numbered, (name, hook, kind) in enumerate(_DIRECTIONS, 1):
                entries = [_sent(one) if hook == OUTPUT else _arrived(one) for one in mine]
                messages += nftables.entries(family, TABLE, name, version, numbered, entries)
                messages.append(nftables.chain(family, TABLE, name, hook, RAW, kind))
                messages.append(nftables.rule(family, TABLE, name, *_rewrite(version, name, numbered)))
        netlink.send(NETFILTER, *nftables.batch(messages))


def _sent(one: Translation) -> tuple[bytes, bytes]:
    before, after = (one.local.address, one.remote.address), (one.local_now, one.remote_now)
    return nftables.key(one.protocol, before, one.local.port, one.remote.port), nftables.packed(after)


def _arrived(one: Translation) -> tuple[bytes, bytes]:
    before, after = (one.remote_now, one.local_now), (one.remote.address, one.local.address)
    return nftables.key(one.protocol, before, one.remote.port, one.local.port), nftables.packed(after)


def _rewrite(version: int, name: bytes, numbered: int) -> Iterator[bytes]:
    """The one rule that looks packets up in a map and rewrites both their addresses at once."""
    yield from nftables.load_key(version)
    yield expression(b"lookup", attribute(1, name), number(2, FIRST), number(3, FIRST), number(4, numbered))
    yield expression(b"notrack")
    at, size = nftables.at_addresses(version), nftables.size_of_addresses(version)
    checksum = (number(6, _CSUM_INET), number(7, _CSUM_OF_IPV4)) if version == 4 else ()
    written = (number(5, FIRST), number(2, NETWORK_HEADER), number(3, at), number(4, size))
    yield expression(b"payload", *written, *checksum, number(8, _PSEUDO_HEADER))
