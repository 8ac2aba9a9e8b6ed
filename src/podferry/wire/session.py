"""Who may say what, and when: one table, no I/O, after the manner of h11.

Both ends walk the same table, each at what it has sent and received so far. Messages cross on their way, so wherever
both may speak, the two orders must lead to the same state: a test holds the table to that, and then no message can
arrive in a state that does not know it. This is why whoever ends a migration waits for the other's word (`Abort` for
`GaveUp`, `GaveUp` and `Refuse` for `Done`) and takes what was on its way until then.

`Hello` opens every connection, `PeerFailure` may end it at any time, beats may come at any time: these three belong to the
transport and are not in the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

from podferry.errors import Bug, PeerMisbehaved, PodferryError
from podferry.wire.frames import Data, Drop, File, Pages, Tree
from podferry.wire.messages import (
    Abort,
    Accept,
    Crashed,
    Done,
    Filled,
    GaveUp,
    Go,
    Message,
    Offer,
    PageRequest,
    PagesEnd,
    PagesLost,
    PrepareTarget,
    Progress,
    Query,
    Ready,
    Refuse,
    Restoring,
    RoundAck,
    RoundEnd,
    Running,
    StateEnd,
    StatePart,
    TargetPrepared,
    Translate,
    Translated,
    Unknown,
)


class Role(StrEnum):
    SOURCE = "source"
    TARGET = "target"

    @property
    def other(self) -> Role:
        return Role.TARGET if self is Role.SOURCE else Role.SOURCE


class SessionState(StrEnum):
    IDLE = "idle"
    ASKED = "asked"
    TRANSLATING = "translating"
    OFFERED = "offered"
    STREAMING = "streaming"
    PREPARING = "preparing"
    PREPARED = "prepared"
    COMPLETE = "complete"
    READY = "ready"
    GONE = "gone"
    RUNNING = "running"
    FILLED = "filled"
    CRASHED = "crashed"
    ABORTING = "aborting"
    GIVEN_UP = "given-up"
    ENDED = "ended"


MEANING: dict[SessionState, str] = {
    SessionState.IDLE: "connected; nothing is under way",
    SessionState.ASKED: "the source asked what became of a migration",
    SessionState.TRANSLATING: "a migration's target, who dialed, told of connections of another pod's",
    SessionState.OFFERED: "the target thinks about an offer",
    SessionState.STREAMING: "pages, drops, tree records and files flow",
    SessionState.PREPARING: "they flow; the target makes its container",
    SessionState.PREPARED: "they flow; the target's container waits, the source may freeze",
    SessionState.COMPLETE: "all is sent; the target checks it",
    SessionState.READY: "the target holds everything; the source decides",
    SessionState.GONE: "the right to run is the target's; it restores",
    SessionState.RUNNING: "it runs on the target and is being filled",
    SessionState.FILLED: "it has all its memory",
    SessionState.CRASHED: "it ran on the target and died half-filled",
    SessionState.ABORTING: "the source took its offer back; the target cleans up",
    SessionState.GIVEN_UP: "the target refused or gave up; it will never run it",
    SessionState.ENDED: "nothing more may be said",
}

Event = Message | Data
EventType = type[Event]
Row = dict[EventType, SessionState]

DATA: tuple[EventType, ...] = (Pages, Drop, Tree, File)


def _stay(state: SessionState, *events: EventType) -> Row:
    return dict.fromkeys(events, state)


def _flowing(state: SessionState) -> dict[Role, Row]:
    """What may be said in `state` while state flows, whatever else its row adds."""
    return {
        Role.SOURCE: _stay(state, *DATA, RoundEnd) | {Abort: SessionState.ABORTING},
        Role.TARGET: _stay(state, RoundAck, Progress) | {GaveUp: SessionState.GIVEN_UP},
    }


def _with(base: Mapping[Role, Row], *, source: Row | None = None, target: Row | None = None) -> dict[Role, Row]:
    return {Role.SOURCE: base[Role.SOURCE] | (source or {}), Role.TARGET: base[Role.TARGET] | (target or {})}


_BEFORE_GO: tuple[EventType, ...] = (*DATA, RoundEnd, PrepareTarget, StatePart, StateEnd)

TABLE: dict[SessionState, dict[Role, Row]] = {
    SessionState.IDLE: {
        Role.SOURCE: {
            Offer: SessionState.OFFERED,
            Query: SessionState.ASKED,
            Translate: SessionState.TRANSLATING,
        },
        Role.TARGET: {},
    },
    SessionState.TRANSLATING: {Role.SOURCE: {}, Role.TARGET: {Translated: SessionState.ENDED}},
    SessionState.ASKED: {
        Role.SOURCE: {},
        Role.TARGET: {
            Ready: SessionState.READY,
            Restoring: SessionState.GONE,
            Running: SessionState.RUNNING,
            Filled: SessionState.FILLED,
            Crashed: SessionState.CRASHED,
            GaveUp: SessionState.GIVEN_UP,
            Unknown: SessionState.ENDED,
        },
    },
    SessionState.OFFERED: {
        Role.SOURCE: {Abort: SessionState.ABORTING},
        Role.TARGET: {Accept: SessionState.STREAMING, Refuse: SessionState.GIVEN_UP},
    },
    SessionState.STREAMING: _with(_flowing(SessionState.STREAMING), source={PrepareTarget: SessionState.PREPARING}),
    SessionState.PREPARING: _with(_flowing(SessionState.PREPARING), target={TargetPrepared: SessionState.PREPARED}),
    SessionState.PREPARED: _with(
        _flowing(SessionState.PREPARED),
        source={
            StatePart: SessionState.PREPARED,
            StateEnd: SessionState.COMPLETE,
            PrepareTarget: SessionState.PREPARING,
        },
    ),
    SessionState.COMPLETE: {
        Role.SOURCE: {Abort: SessionState.ABORTING},
        Role.TARGET: _stay(SessionState.COMPLETE, RoundAck, Progress)
        | {Ready: SessionState.READY, GaveUp: SessionState.GIVEN_UP},
    },
    SessionState.READY: {
        Role.SOURCE: {Go: SessionState.GONE, Abort: SessionState.ABORTING},
        Role.TARGET: _stay(SessionState.READY, Progress) | {GaveUp: SessionState.GIVEN_UP},
    },
    SessionState.GONE: {
        Role.SOURCE: _stay(SessionState.GONE, Pages, Drop, PagesEnd, PagesLost),
        Role.TARGET: _stay(SessionState.GONE, Progress, PageRequest)
        | {Running: SessionState.RUNNING, GaveUp: SessionState.GIVEN_UP},
    },
    SessionState.RUNNING: {
        Role.SOURCE: _stay(SessionState.RUNNING, Pages, Drop, PagesEnd, PagesLost),
        Role.TARGET: _stay(SessionState.RUNNING, Progress, PageRequest)
        | {Filled: SessionState.FILLED, Crashed: SessionState.CRASHED},
    },
    SessionState.FILLED: {
        Role.SOURCE: _stay(SessionState.FILLED, Pages, Drop, PagesEnd, PagesLost) | {Done: SessionState.ENDED},
        Role.TARGET: {},
    },
    SessionState.CRASHED: {
        Role.SOURCE: _stay(SessionState.CRASHED, Pages, Drop, PagesEnd, PagesLost) | {Done: SessionState.ENDED},
        Role.TARGET: {},
    },
    SessionState.ABORTING: {
        Role.SOURCE: {},
        Role.TARGET: _stay(SessionState.ABORTING, Accept, RoundAck, TargetPrepared, Ready, Progress)
        | {Refuse: SessionState.ENDED, GaveUp: SessionState.ENDED},
    },
    SessionState.GIVEN_UP: {
        Role.SOURCE: _stay(SessionState.GIVEN_UP, *_BEFORE_GO, Go, PagesEnd, PagesLost)
        | {Abort: SessionState.ENDED, Done: SessionState.ENDED},
        Role.TARGET: {},
    },
    SessionState.ENDED: {Role.SOURCE: {}, Role.TARGET: {}},
}
"""state -> who speaks -> what -> the state after it. What is not here is illegal."""

GONE_STATES = frozenset({SessionState.GONE, SessionState.RUNNING, SessionState.FILLED, SessionState.CRASHED})
"""The states in which the right to run is the target's: the source must not thaw (I3)."""


class Session:
    """One end of a conversation about one migration.

    `send` and `receive` check an event and take the step; an illegal one raises (`Bug` for ours, `PeerMisbehaved` for
    the peer's) and changes nothing.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = SessionState.IDLE
        self.migration: str | None = None
        self.rounds_ended = 0
        self.rounds_acked = 0

    def send(self, event: Event) -> SessionState:
        """We are about to send `event`. Raises `Bug`."""
        return self._step(event, self.role, Bug)

    def receive(self, event: Event) -> SessionState:
        """The peer sent `event`. Raises `PeerMisbehaved`."""
        return self._step(event, self.role.other, PeerMisbehaved)

    def allowed(self, role: Role) -> Iterable[EventType]:
        """What `role` may say now."""
        return TABLE[self.state][role].keys()

    def _step(self, event: Event, speaker: Role, error: type[PodferryError]) -> SessionState:
        kind = type(event)
        after = TABLE[self.state][speaker].get(kind)
        if after is None:
            known = ", ".join(sorted(allowed.__name__ for allowed in self.allowed(speaker))) or "nothing"
            raise error(
                f"illegal {kind.__name__} from the {speaker} while {self.state}",
                why=f"{MEANING[self.state]}; the {speaker} may say {known}",
            )
        if kind not in DATA:
            self._check(event, error)
        self.state = after
        return after

    def _check(self, event: Event, error: type[PodferryError]) -> None:
        """What the table cannot say: one migration a session, rounds counted from 1 and acknowledged in order."""
        migration = getattr(event, "migration", None)
        if migration is not None and self.migration not in (None, migration):
            raise error(f"{type(event).__name__} is about {migration!r}, this session about {self.migration!r}")
        if isinstance(event, RoundEnd):
            if event.round != self.rounds_ended + 1:
                raise error(f"round {event.round} ended after round {self.rounds_ended}")
            self.rounds_ended += 1
        elif isinstance(event, RoundAck):
            if event.round != self.rounds_acked + 1 or event.round > self.rounds_ended:
                raise error(
                    f"round {event.round} was acknowledged after round {self.rounds_acked} of {self.rounds_ended}"
                )
            self.rounds_acked += 1
        self.migration = self.migration or migration


def transitions() -> Iterable[tuple[SessionState, Role, str, SessionState]]:
    """The table as rows (state, who speaks, what, next state), data frames under one name; docs are made of these."""
    for state, roles in TABLE.items():
        for role, row in roles.items():
            merged: dict[tuple[str, SessionState], None] = {}
            for kind, after in row.items():
                name = "data" if kind in DATA and all(row.get(other) is after for other in DATA) else kind.__name__
                merged[name, after] = None
            for name, after in merged:
                yield state, role, name, after
