"""The connections of a workload, judged: who is at the other end of each, and what a move makes of it.

What `podferry.node` reads of the kernel goes in before a move, what is in CRIU's images goes in after the dump: both are judged by
`OwnEnds`, so that `check` says what the move does. Connected datagram sockets count: their peers know them by their address, too.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

from podferry.core.strict import to_json
from podferry.errors import Refused
from podferry.model import Connections

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

TCP, UDP = "tcp", "udp"
NAMED = 8
"""Connections that an error names."""
BRIEF = (0.02, 0.1, 0.4)
"""Seconds after which a workload whose connections must live on is looked at again where it had one that would not: what is open
for a moment only, a probe or a question to DNS, is gone then."""
TOLD, RECORDED = 4096, 64
"""Connections of one workload that `check` lists, and a record, of which a node keeps hundreds."""
SYN_SENT, CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN = 2, 7, 8, 9, 10  # net/tcp_states.h
_HEARD_ALL = frozenset({CLOSE, CLOSE_WAIT, LAST_ACK})
"""States in which there may be data that nobody has read, and nothing is waited for: the other end is closed, and gone."""


class End(NamedTuple):
    """An address with a port."""

    address: Address
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"


def end_of(text: str) -> End:
    """An end as it prints. Raises `ValueError` for anything else."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise ValueError(f"{text[:80]!r} is no ADDRESS:PORT")
    return End(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")), int(port))


class ConnectionsLost(Refused):
    """Connections must live on, and a move would end some."""

    code = "PF116"


class PeerKind(StrEnum):
    """Who is at the other end, as far as the source's node knows: `inside` the workload, `another`, or nobody yet (`listening`)."""

    INSIDE = "inside"
    LISTENING = "listening"
    ANOTHER = "another"


class Fate(StrEnum):
    """What a move makes of a connection. `preserved`: it lives on where a pod is at its other end and an agent on that pod's node,
    which only Kubernetes knows, and is closed elsewhere. `readdressed`: a datagram socket goes on, and sends from the new address;
    answers to the old one are lost."""

    LIVES = "lives"
    PRESERVED = "preserved"
    READDRESSED = "readdressed"
    CLOSED = "closed"


@dataclass(frozen=True)
class KernelSocket:
    """A TCP or UDP socket as the kernel lists it. `remote` is None where it has no peer. Not `held`: nobody has accepted it."""

    protocol: str
    local: End
    remote: End | None
    state: int
    held: bool = True


@dataclass(frozen=True)
class OpenConnection:
    """One connection, or one socket at which the workload waits for others. Ends are texts, `ADDRESS:PORT`; `remote` is empty of
    who waits. `backend` is who is really at the other end where a Service, or any other translation, stands between."""

    protocol: str
    local: str
    remote: str
    backend: str
    peer: PeerKind
    fate: Fate
    why: str

    @property
    def lost(self) -> bool:
        """Whether the move costs the workload this connection, or its answers."""
        return self.fate is not Fate.LIVES

    def __str__(self) -> str:
        if not self.remote:
            return f"{self.protocol} {self.local}"
        return f"{self.protocol} {self.local} -> {self.remote}{f' (really {self.backend})' if self.backend else ''}"


class OwnEnds:
    """The ends of a workload's connections, `(local, remote)` each, and the addresses that its sockets have."""

    def __init__(self, pairs: Iterable[tuple[End, End]], own: Iterable[Address]) -> None:
        self._pairs, self._own = set(pairs), set(own)

    def keep(self, local: End, remote: End, state: int) -> bool:
        """Whether a TCP connection can go on: its other end is here, or was, and has said all that it had to say."""
        if state == SYN_SENT:
            return False
        return (remote, local) in self._pairs or (state in _HEARD_ALL and self.has(remote))

    def has(self, end: End) -> bool:
        """Whether an end is at an address of the workload's own."""
        return end.address.is_loopback or end.address in self._own


Backends = Callable[[str, End, End], End | None]
"""Who is really at the other end of a connection of this protocol, from its local and its remote end; None where no translation is
known."""
_KNOWS_ANOTHER_ADDRESS = "its other end stays, and knows only the old address"
_BEHIND = "its other end stays, behind a Service or another translation, and knows only the old address"


def nobody(protocol: str, local: End, remote: End) -> None:
    """No translation is known."""


def judge(
    sockets: Sequence[KernelSocket], backend: Backends = nobody, moved: Backends = nobody
) -> tuple[OpenConnection, ...]:
    """What a move makes of each socket of a workload, all of whose sockets these are: those that it costs come first. `moved` is
    `backend` of those whose other end has moved and lived on."""
    listeners = [one for one in sockets if _waits(one)]
    own = [one for one in sockets if one.held or any(_is_at(one.local, other.local) for other in listeners)]
    pairs = [(one.local, one.remote) for one in own if one.protocol == TCP and one.remote]
    ends = OwnEnds(pairs, {one.local.address for one in own})
    found = {*_judged(own, ends, backend, moved), *(_listening(one, listeners) for one in listeners)}
    return tuple(sorted(found, key=lambda one: (one.fate is Fate.LIVES, one.peer is PeerKind.LISTENING, str(one))))


def _judged(
    sockets: Iterable[KernelSocket], ends: OwnEnds, backend: Backends, moved: Backends
) -> Iterator[OpenConnection]:
    for one in sockets:
        if one.remote is None:
            continue
        inside = ends.keep(one.local, one.remote, one.state) if one.protocol == TCP else ends.has(one.remote)
        if inside and not one.held:
            continue  # its other end, which is the workload's, tells of it
        there = None if inside else moved(one.protocol, one.local, one.remote)
        behind = None if inside or there else backend(one.protocol, one.local, one.remote)
        fate, why = _fate(one, ends, behind, inside=inside)
        kind = PeerKind.INSIDE if inside else PeerKind.ANOTHER
        yield OpenConnection(one.protocol, str(one.local), str(one.remote), str(there or behind or ""), kind, fate, why)


def _fate(one: KernelSocket, ends: OwnEnds, behind: End | None, *, inside: bool) -> tuple[Fate, str]:
    if inside:
        return Fate.LIVES, "both ends are in the workload"
    if one.protocol == UDP:
        return Fate.READDRESSED, "it sends from the target's address then; answers to the old address are lost"
    if one.state == SYN_SENT:
        return Fate.CLOSED, "it is not connected yet: connecting begins anew on the target"
    if not one.held:
        return Fate.CLOSED, "the workload has not accepted it yet"
    if behind is not None and ends.has(behind):
        return Fate.CLOSED, "its other end is in the workload, but only by a translation that the target has not"
    return Fate.CLOSED, _BEHIND if behind is not None else _KNOWS_ANOTHER_ADDRESS


def preserving(found: Sequence[OpenConnection]) -> tuple[OpenConnection, ...]:
    """The same connections, where the move is asked to have them live on as far as it can."""
    why = "it goes on where its other end is a pod on a node with an agent, and is closed elsewhere"
    return tuple(
        replace(one, fate=Fate.PRESERVED, why=why)
        if (one.fate, one.why, one.protocol) == (Fate.CLOSED, _KNOWS_ANOTHER_ADDRESS, TCP)
        else one
        for one in found
    )


def may_be_preserved(sockets: Sequence[KernelSocket]) -> Iterator[tuple[End, End]]:
    """Of a workload's sockets, all of which these are, the connections that `preserving` is about, by their ends."""
    found = preserving(judge(sockets))
    wanted = {(one.local, one.remote) for one in found if one.fate is Fate.PRESERVED}
    for one in sockets:
        if one.remote is not None and one.held and (str(one.local), str(one.remote)) in wanted:
            yield one.local, one.remote


def _listening(one: KernelSocket, listeners: Sequence[KernelSocket]) -> OpenConnection:
    alike = {
        other.local.address
        for other in listeners
        if (other.protocol, other.local.port) == (one.protocol, one.local.port)
    }
    if one.local.address.is_loopback:
        why = "it waits for the workload's own, by loopback"
    elif one.local.address.is_unspecified or len(alike) == 1:
        why = "it waits at the target's address then"
    else:
        why = "it waits at its old address then, where only the workload itself reaches it: others have its port, too"
    return OpenConnection(one.protocol, str(one.local), "", "", PeerKind.LISTENING, Fate.LIVES, why)


def told(found: Sequence[OpenConnection], most: int = RECORDED) -> dict[str, Any]:
    """What a record and `check` say of them, as JSON: `most` of them, and how many there are by what a move makes of them."""
    counts = {str(fate): sum(one.fate is fate for one in found if one.remote) for fate in Fate}
    return {"connections": to_json(tuple(found[:most])), "connections_total": counts}


def refusal(whose: str, lost: Sequence[str]) -> ConnectionsLost | None:
    """Why a job may not move whose connections must live on; `lost` are those that a move would cost, in words."""
    if not lost:
        return None
    more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
    return ConnectionsLost(
        f"a move would cost {whose} {len(lost)} connection{'s' if len(lost) > 1 else ''}, and it was asked for with connections "
        f"{Connections.REQUIRE}",
        why=f"{'; '.join(lost[:NAMED])}{more}",
        remedy=f"have the job close them, or let them be closed: ask with connections {Connections.CLOSE}",
    )


def refused(whose: str, found: Sequence[OpenConnection], asked: Connections) -> ConnectionsLost | None:
    """The same, of what was found open, where it was `asked` for that no connection is lost."""
    if asked is not Connections.REQUIRE:
        return None
    return refusal(whose, [f"{one}: {one.why}" for one in found if one.lost])


def _waits(one: KernelSocket) -> bool:
    return one.held and one.remote is None and bool(one.local.port)


def _is_at(end: End, listener: End) -> bool:
    """Whether a connection with this local end came to that listener."""
    return end.port == listener.port and (listener.address.is_unspecified or listener.address == end.address)
