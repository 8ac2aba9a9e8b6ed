"""Who may say what, and when: one table, no I/O, after the manner of h11.

Both ends walk the same table, each at what it has sent and received so far. Messages cross on their way, so wherever
both may speak, the two orders must lead to the same state: a test holds the table to that, and then no message can
arrive in a state that does not know it. This is why whoever ends a migration waits for the other's word (`Abort` for
`GaveUp`, `GaveUp` and `Refuse` for `Done`) and takes what was on its way until then.

`Hello` opens every connection, `Trouble` may end it at any time, beats may come at any time: these three belong to the
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
    PagesEnd,
    PagesLost,
    PageWanted,
    Poise,
    Poised,
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
    Unknown,
)


class Role(StrEnum):
    SOURCE = "source"
    TARGET = "target"

    @property
    def other(self) -> Role:
        return Role.TARGET if self is Role.SOURCE else Role.SOURCE


class State(StrEnum):
    IDLE = "idle"
    ASKED = "asked"
    OFFERED = "offered"
    STREAMING = "streaming"
    POISING = "poising"
    POISED = "poised"
    COMPLETE = "complete"
    READY = "ready"
    GONE = "gone"
    RUNNING = "running"
    FILLED = "filled"
    CRASHED = "crashed"
    ABORTING = "aborting"
    GIVEN_UP = "given-up"
    ENDED = "ended"


MEANING: dict[State, str] = {
    State.IDLE: "connected; nothing is under way",
    State.ASKED: "the source asked what became of a migration",
    State.OFFERED: "the target thinks about an offer",
    State.STREAMING: "pages, drops, tree records and files flow",
    State.POISING: "they flow; the target makes its container",
    State.POISED: "they flow; the target's container waits, the source may freeze",
    State.COMPLETE: "all is sent; the target checks it",
    State.READY: "the target holds everything; the source decides",
    State.GONE: "the right to run is the target's; it restores",
    State.RUNNING: "it runs on the target and is being filled",
    State.FILLED: "it has all its memory",
    State.CRASHED: "it ran on the target and died half-filled",
    State.ABORTING: "the source took its offer back; the target cleans up",
    State.GIVEN_UP: "the target refused or gave up; it will never run it",
    State.ENDED: "nothing more may be said",
}

Event = Message | Data
EventType = type[Event]
Row = dict[EventType, State]

DATA: tuple[EventType, ...] = (Pages, Drop, Tree, File)


def _stay(state: State, *events: EventType) -> Row:
    return dict.fromkeys(events, state)


def _flowing(state: State) -> dict[Role, Row]:
    """What may be said in `state` while state flows, whatever else its row adds."""
    return {
        Role.SOURCE: _stay(state, *DATA, RoundEnd) | {Abort: State.ABORTING},
        Role.TARGET: _stay(state, RoundAck, Progress) | {GaveUp: State.GIVEN_UP},
    }


def _with(base: Mapping[Role, Row], *, source: Row | None = None, target: Row | None = None) -> dict[Role, Row]:
    return {Role.SOURCE: base[Role.SOURCE] | (source or {}), Role.TARGET: base[Role.TARGET] | (target or {})}


_BEFORE_GO: tuple[EventType, ...] = (*DATA, RoundEnd, Poise, StatePart, StateEnd)

TABLE: dict[State, dict[Role, Row]] = {
    State.IDLE: {Role.SOURCE: {Offer: State.OFFERED, Query: State.ASKED}, Role.TARGET: {}},
    State.ASKED: {
        Role.SOURCE: {},
        Role.TARGET: {
            Ready: State.READY,
            Restoring: State.GONE,
            Running: State.RUNNING,
            Filled: State.FILLED,
            Crashed: State.CRASHED,
            GaveUp: State.GIVEN_UP,
            Unknown: State.ENDED,
        },
    },
    State.OFFERED: {
        Role.SOURCE: {Abort: State.ABORTING},
        Role.TARGET: {Accept: State.STREAMING, Refuse: State.GIVEN_UP},
    },
    State.STREAMING: _with(_flowing(State.STREAMING), source={Poise: State.POISING}),
    State.POISING: _with(_flowing(State.POISING), target={Poised: State.POISED}),
    State.POISED: _with(
        _flowing(State.POISED),
        source={StatePart: State.POISED, StateEnd: State.COMPLETE, Poise: State.POISING},
    ),
    State.COMPLETE: {
        Role.SOURCE: {Abort: State.ABORTING},
        Role.TARGET: _stay(State.COMPLETE, RoundAck, Progress) | {Ready: State.READY, GaveUp: State.GIVEN_UP},
    },
    State.READY: {
        Role.SOURCE: {Go: State.GONE, Abort: State.ABORTING},
        Role.TARGET: _stay(State.READY, Progress) | {GaveUp: State.GIVEN_UP},
    },
    State.GONE: {
        Role.SOURCE: _stay(State.GONE, Pages, Drop, PagesEnd, PagesLost),
        Role.TARGET: _stay(State.GONE, Progress, PageWanted) | {Running: State.RUNNING, GaveUp: State.GIVEN_UP},
    },
    State.RUNNING: {
        Role.SOURCE: _stay(State.RUNNING, Pages, Drop, PagesEnd, PagesLost),
        Role.TARGET: _stay(State.RUNNING, Progress, PageWanted) | {Filled: State.FILLED, Crashed: State.CRASHED},
    },
    State.FILLED: {
        Role.SOURCE: _stay(State.FILLED, Pages, Drop, PagesEnd, PagesLost) | {Done: State.ENDED},
        Role.TARGET: {},
    },
    State.CRASHED: {
        Role.SOURCE: _stay(State.CRASHED, Pages, Drop, PagesEnd, PagesLost) | {Done: State.ENDED},
        Role.TARGET: {},
    },
    State.ABORTING: {
        Role.SOURCE: {},
        Role.TARGET: _stay(State.ABORTING, Accept, RoundAck, Poised, Ready, Progress)
        | {Refuse: State.ENDED, GaveUp: State.ENDED},
    },
    State.GIVEN_UP: {
        Role.SOURCE: _stay(State.GIVEN_UP, *_BEFORE_GO, Go, PagesEnd, PagesLost)
        | {Abort: State.ENDED, Done: State.ENDED},
        Role.TARGET: {},
    },
    State.ENDED: {Role.SOURCE: {}, Role.TARGET: {}},
}
"""state -> who speaks -> what -> the state after it. What is not here is illegal."""

GONE_STATES = frozenset({State.GONE, State.RUNNING, State.FILLED, State.CRASHED})
"""The states in which the right to run is the target's: the source must not thaw (I3)."""


class Session:
    """One end of a conversation about one migration.

    `send` and `receive` check an event and take the step; an illegal one raises (`Bug` for ours, `PeerMisbehaved` for
    the peer's) and changes nothing.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = State.IDLE
        self.migration: str | None = None
        self.rounds_ended = 0
        self.rounds_acked = 0

    def send(self, event: Event) -> State:
        """We are about to send `event`. Raises `Bug`."""
        return self._step(event, self.role, Bug)

    def receive(self, event: Event) -> State:
        """The peer sent `event`. Raises `PeerMisbehaved`."""
        return self._step(event, self.role.other, PeerMisbehaved)

    def allowed(self, role: Role) -> Iterable[EventType]:
        """What `role` may say now."""
        return TABLE[self.state][role].keys()

    def _step(self, event: Event, speaker: Role, error: type[PodferryError]) -> State:
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


def transitions() -> Iterable[tuple[State, Role, str, State]]:
    """The table as rows (state, who speaks, what, next state), data frames under one name; docs are made of these."""
    for state, roles in TABLE.items():
        for role, row in roles.items():
            merged: dict[tuple[str, State], None] = {}
            for kind, after in row.items():
                name = "data" if kind in DATA and all(row.get(other) is after for other in DATA) else kind.__name__
                merged[name, after] = None
            for name, after in merged:
                yield state, role, name, after
