"""The phases of a Migration object in a cluster: what the controller does, around the engine that the agents run.

The engine's own table (`core.phases`) is what happens inside `Running`. As there, an event that a phase does not list is a bug
and changes nothing, and the picture in docs/migrations.md is drawn from the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from podferry.core.phases import PhaseMachine
from podferry.model import Outcome


class MigrationPhase(StrEnum):
    """The phases of a Migration; the values are part of the API."""

    PENDING = "Pending"
    SCHEDULING = "Scheduling"
    RUNNING = "Running"
    HANDING_OVER = "HandingOver"
    UNDOING = "Undoing"
    COMPLETED = "Completed"
    REFUSED = "Refused"
    ROLLED_BACK = "RolledBack"
    CANCELLED = "Cancelled"
    FAILED = "Failed"
    REHEARSED = "Rehearsed"


class MigrationEvent(StrEnum):
    """The events of a Migration."""

    CLAIMED = "pod may move and is claimed"
    REFUSAL = "pod may not move"
    WITHDRAWN = "cancelled before anything was done"
    PLACED = "target node chosen"
    RESUMED = "job runs on the target"
    HANDED_OVER = "owner has the target pod, source is gone"
    FAILURE = "failure"
    UNDONE_REFUSED = "cleaned up, the nodes would not do it"
    UNDONE_ROLLED_BACK = "cleaned up, job runs on the source"
    UNDONE_CANCELLED = "cleaned up on request"
    UNDONE_FAILED = "cleaned up, job does not run"
    UNDONE_REHEARSED = "cleaned up, a rehearsal found nothing in the way"


P, E = MigrationPhase, MigrationEvent

# RESUMED is the point of no return as the cluster sees it: before it the target pod goes, after it the source pod.
MIGRATION: Mapping[MigrationPhase, Mapping[MigrationEvent, MigrationPhase]] = {
    P.PENDING: {E.CLAIMED: P.SCHEDULING, E.REFUSAL: P.REFUSED, E.WITHDRAWN: P.CANCELLED},
    P.SCHEDULING: {E.PLACED: P.RUNNING, E.FAILURE: P.UNDOING},
    P.RUNNING: {E.RESUMED: P.HANDING_OVER, E.FAILURE: P.UNDOING},
    P.HANDING_OVER: {E.HANDED_OVER: P.COMPLETED, E.FAILURE: P.UNDOING},
    P.UNDOING: {
        E.UNDONE_REFUSED: P.REFUSED,
        E.UNDONE_ROLLED_BACK: P.ROLLED_BACK,
        E.UNDONE_CANCELLED: P.CANCELLED,
        E.UNDONE_FAILED: P.FAILED,
        E.UNDONE_REHEARSED: P.REHEARSED,
    },
    P.COMPLETED: {},
    P.REFUSED: {},
    P.ROLLED_BACK: {},
    P.CANCELLED: {},
    P.FAILED: {},
    P.REHEARSED: {},
}

MIGRATION_ENDS = frozenset(phase for phase, moves in MIGRATION.items() if not moves)

OUTCOME_OF_END = {
    P.COMPLETED: Outcome.COMPLETED,
    P.REFUSED: Outcome.REFUSED,
    P.ROLLED_BACK: Outcome.ROLLED_BACK,
    P.CANCELLED: Outcome.CANCELLED,
    P.FAILED: Outcome.FAILED,
    P.REHEARSED: Outcome.REHEARSED,
}

UNDONE = {
    Outcome.REFUSED: E.UNDONE_REFUSED,
    Outcome.ROLLED_BACK: E.UNDONE_ROLLED_BACK,
    Outcome.CANCELLED: E.UNDONE_CANCELLED,
    Outcome.FAILED: E.UNDONE_FAILED,
    Outcome.REHEARSED: E.UNDONE_REHEARSED,
}


def migration_machine(phase: MigrationPhase = P.PENDING) -> PhaseMachine[MigrationPhase, MigrationEvent]:
    """A Migration's place in the table."""
    return PhaseMachine(MIGRATION, phase)


def migration_diagram() -> str:
    """The table as a Mermaid state diagram, as docs/migrations.md shows it."""
    lines = ["stateDiagram-v2", f"  [*] --> {P.PENDING}"]
    for phase, moves in MIGRATION.items():
        lines += [f"  {phase} --> {after}: {event}" for event, after in moves.items()]
    lines += [f"  {phase} --> [*]" for phase in MIGRATION if phase in MIGRATION_ENDS]
    return "\n".join(lines)
