"""The phases of a migration: one transition table, both nodes' halves of it, and who may run the job in each.

The table is the migration. The engine may only do what it allows: an event that a phase does not list raises `Bug` and
changes nothing (h11's habit, `h11/_state.py`). Recovery, the failure tests and the picture in ARCHITECTURE.md read
the same table.

The right to run (I1) is a property of a phase, not of a flag that could be forgotten: `SOURCE_MAY_RUN` and
`TARGET_MAY_RUN` say where the job may execute, and `tests/unit/test_phases.py` walks every joint state of the two,
with every message delayed, lost or followed by a crash, and finds none in which both may.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Generic, TypeVar

from podferry.errors import Bug


class SourcePhase(StrEnum):
    """The phases of the source."""

    CHECK = "check"
    PRECOPY = "pre-copy"
    PREPARE_TARGET = "prepare-target"
    CUTOVER = "cut-over"
    RESUME = "resume"
    LOST = "lost-contact"
    SERVE = "serve"
    COMMIT = "commit"
    DRAIN = "drain"
    UNDO = "undo"
    COMPLETED = "completed"
    REFUSED = "refused"
    ROLLED_BACK = "rolled-back"
    CANCELLED = "cancelled"
    FAILED = "failed"


class SourceEvent(StrEnum):
    """The events of the source."""

    ACCEPTED = "accepted"
    REFUSAL = "refusal"
    CONVERGED = "converged"
    TARGET_PREPARED = "target prepared"
    GO = "go"
    RUNNING = "running"
    RUNNING_SHORT = "running, pages to come"
    CONTACT_LOST = "contact lost"
    GAVE_UP = "target gave up"
    RESOLVED_HERE = "resolved: run on the source"
    RESOLVED_THERE = "resolved: run on the target"
    FILLED = "filled"
    COMMITTED = "committed"
    FAILURE = "failure"
    UNDONE_ROLLED_BACK = "undone, job runs on"
    UNDONE_CANCELLED = "undone on request"
    UNDONE_FAILED = "undone, job not running"


class TargetPhase(StrEnum):
    """The phases of the target."""

    RECEIVE = "receive"
    PREPARED = "prepared"
    READY = "ready"
    RESUME = "resume"
    FILL = "fill"
    GIVING_UP = "giving-up"
    DONE = "done"
    DIED = "died"
    GAVE_UP = "gave-up"


class TargetEvent(StrEnum):
    """The events of the target."""

    PREPARED = "prepared"
    READY = "ready"
    GO = "go"
    RUNNING = "running"
    FILLED = "filled"
    DIED = "job died"
    FAILURE = "failure"
    GONE = "given up"


S, SE, T, TE = SourcePhase, SourceEvent, TargetPhase, TargetEvent

# The line `S.CUTOVER: SE.GO` is the point of no return.
SOURCE: Mapping[SourcePhase, Mapping[SourceEvent, SourcePhase]] = {
    S.CHECK: {SE.ACCEPTED: S.PRECOPY, SE.REFUSAL: S.REFUSED, SE.FAILURE: S.UNDO},
    S.PRECOPY: {SE.CONVERGED: S.PREPARE_TARGET, SE.FAILURE: S.UNDO},
    S.PREPARE_TARGET: {SE.TARGET_PREPARED: S.CUTOVER, SE.FAILURE: S.UNDO},
    S.CUTOVER: {SE.GO: S.RESUME, SE.FAILURE: S.UNDO},
    S.RESUME: {
        SE.RUNNING: S.COMMIT,
        SE.RUNNING_SHORT: S.SERVE,
        SE.GAVE_UP: S.UNDO,
        SE.CONTACT_LOST: S.LOST,
    },
    S.LOST: {
        SE.RUNNING: S.COMMIT,
        SE.RUNNING_SHORT: S.SERVE,
        SE.GAVE_UP: S.UNDO,
        SE.RESOLVED_HERE: S.UNDO,
        SE.RESOLVED_THERE: S.COMMIT,
    },
    S.SERVE: {SE.FILLED: S.COMMIT, SE.CONTACT_LOST: S.LOST},
    S.COMMIT: {SE.COMMITTED: S.DRAIN},
    S.DRAIN: {SE.FILLED: S.COMPLETED, SE.CONTACT_LOST: S.COMPLETED},
    S.UNDO: {
        SE.UNDONE_ROLLED_BACK: S.ROLLED_BACK,
        SE.UNDONE_CANCELLED: S.CANCELLED,
        SE.UNDONE_FAILED: S.FAILED,
    },
    S.COMPLETED: {},
    S.REFUSED: {},
    S.ROLLED_BACK: {},
    S.CANCELLED: {},
    S.FAILED: {},
}

TARGET: Mapping[TargetPhase, Mapping[TargetEvent, TargetPhase]] = {
    T.RECEIVE: {TE.PREPARED: T.PREPARED, TE.FAILURE: T.GIVING_UP},
    T.PREPARED: {TE.READY: T.READY, TE.FAILURE: T.GIVING_UP},
    T.READY: {TE.GO: T.RESUME, TE.FAILURE: T.GIVING_UP},
    T.RESUME: {TE.RUNNING: T.FILL, TE.FAILURE: T.GIVING_UP},
    T.FILL: {TE.FILLED: T.DONE, TE.DIED: T.DIED},
    T.GIVING_UP: {TE.GONE: T.GAVE_UP},
    T.DONE: {},
    T.DIED: {},
    T.GAVE_UP: {},
}

SOURCE_ENDS = frozenset(phase for phase, moves in SOURCE.items() if not moves)
TARGET_ENDS = frozenset(phase for phase, moves in TARGET.items() if not moves)

SOURCE_HAS_PASSED_THE_RIGHT = frozenset({S.RESUME, S.LOST, S.SERVE, S.COMMIT, S.DRAIN, S.COMPLETED})
SOURCE_MAY_RUN = frozenset(S) - SOURCE_HAS_PASSED_THE_RIGHT
TARGET_MAY_RUN = frozenset({T.RESUME, T.FILL, T.DONE})

Phase = TypeVar("Phase", bound=StrEnum)
Event = TypeVar("Event", bound=StrEnum)


class PhaseMachine(Generic[Phase, Event]):
    """One half's place in the table."""

    def __init__(self, table: Mapping[Phase, Mapping[Event, Phase]], phase: Phase) -> None:
        self._table = table
        self.phase = phase

    def next(self, event: Event) -> Phase:
        """The phase that `event` leads to from here. Raises `Bug` where the table has no such move."""
        moves = self._table[self.phase]
        if event not in moves:
            allowed = ", ".join(f"'{one}'" for one in moves) or "nothing, it has ended"
            raise Bug(f"'{event}' cannot happen in phase '{self.phase}'", why=f"it allows {allowed}")
        return moves[event]

    def fire(self, event: Event) -> Phase:
        """Move on. Raises `Bug` and stays where the table has no such move."""
        self.phase = self.next(event)
        return self.phase

    @property
    def ended(self) -> bool:
        """True in a phase that nothing leaves."""
        return not self._table[self.phase]


def source_machine(phase: SourcePhase = S.CHECK) -> PhaseMachine[SourcePhase, SourceEvent]:
    """The source's half, at its start or where a journal left it."""
    return PhaseMachine(SOURCE, phase)


def target_machine(phase: TargetPhase = T.RECEIVE) -> PhaseMachine[TargetPhase, TargetEvent]:
    """The target's half, at its start or where a journal left it."""
    return PhaseMachine(TARGET, phase)


def diagram() -> str:
    """Both halves as a Mermaid state diagram, as ARCHITECTURE.md shows them."""
    lines = ["stateDiagram-v2"]
    for name, table in (("source", SOURCE), ("target", TARGET)):
        lines.append(f"  state {name} {{")
        for phase, moves in table.items():
            for event, after in moves.items():
                lines.append(f"    {name}_{_id(phase)} --> {name}_{_id(after)}: {event}")
        lines += [f"    {name}_{_id(phase)}: {phase}" for phase in table]
        lines.append("  }")
    return "\n".join(lines)


def _id(phase: StrEnum) -> str:
    return str(phase).replace("-", "_")
