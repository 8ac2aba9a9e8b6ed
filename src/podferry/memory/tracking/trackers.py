"""The trackers that there are, each made by its kind."""

from __future__ import annotations

from podferry.errors import UsageError
from podferry.memory.tracking.none import NoTracker
from podferry.memory.tracking.softdirty import SoftDirtyTracker
from podferry.memory.tracking.tracker import Pause, Pids, Tracker, TrackerKind
from podferry.memory.tracking.write_protect import UffdTracker


def create(kind: TrackerKind, pids: Pids, *, pause: Pause | None = None) -> Tracker:
    """A tracker for the processes that `pids` lists, each time anew. `pause` is needed for soft-dirty only."""
    match kind:
        case TrackerKind.UFFD:
            return UffdTracker(pids)
        case TrackerKind.SOFT_DIRTY:
            if pause is None:
                raise UsageError("soft-dirty tracking needs a way to pause the job", why="writes would be missed")
            return SoftDirtyTracker(pids, pause)
        case TrackerKind.NONE:
            return NoTracker(pids)
