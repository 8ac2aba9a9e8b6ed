"""What is written into a Migration's status when it is decided where its job runs, or why it ended."""

from __future__ import annotations

from collections.abc import Callable

from podferry.kube.migration import (
    RESUMED,
    Ending,
    Migration,
)
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
