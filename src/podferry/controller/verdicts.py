"""What is written into a Migration's status when it is decided where its job runs, or why it ended."""

from __future__ import annotations

from collections.abc import Callable

from podferry.core.migration import MigrationPhase
from podferry.core.phases import TargetPhase
from podferry.kube.migration import RESUMED, SOURCE_REPLACED, TARGET_REQUESTED, Ending, Migration
from podferry.model import Outcome


def blame(over: Ending, abort: Ending | None) -> Ending:
    """The engine says how it ended; why, whoever asked it to stop knows better."""
    asked = abort is not None and over.outcome in (Outcome.CANCELLED, Outcome.ROLLED_BACK)
    return abort if asked and abort is not None else over


def decided_for(side: str) -> Callable[[Migration], object]:
    """That the job runs on `side`, unless that was decided before."""
    return lambda now: setattr(now.status, "arbiter", now.status.arbiter or side)


def decided_once_for(side: str) -> Callable[[Migration], bool]:
    """Once, and only where the target has not said meanwhile that it runs the job."""

    def decided(now: Migration) -> bool:
        if now.status.arbiter is not None or now.status.holds(RESUMED):
            return False
        now.status.arbiter = side
        return True

    return decided


def given_up(kept: str) -> Callable[[Migration], bool]:
    """That the source's object is given up for a pod of the same name, of which `kept` tells: as long as the target has the right
    to run and wants its pod, and nobody has asked for the way back."""

    def replaced(now: Migration) -> bool:
        status = now.status
        waits = status.engine is not None and status.engine.target == TargetPhase.RESUME
        if status.phase is not MigrationPhase.RUNNING or status.abort is not None:
            return False
        if not (waits and status.holds(TARGET_REQUESTED)) or status.holds(SOURCE_REPLACED):
            return False
        status.kept_place = kept
        words = "the pod of this name is the target's from now on: the job goes on there, or not at all"
        status.set_condition(SOURCE_REPLACED, True, "NameGivenUp", words)
        return True

    return replaced
