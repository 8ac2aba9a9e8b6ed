"""Where nothing can be tracked: every look finds all memory written. Good for one look, at a frozen job."""

from __future__ import annotations

from podferry.memory.kernel.pagemap import Scanner, has_scan, read_entries
from podferry.memory.tracking.spaces import FollowingTracker, Look, Space
from podferry.memory.tracking.tracker import Pids, TrackerKind
from podferry.memory.tracking.userfaultfd_owner import owns_userfaultfd


class NoTracker(FollowingTracker):
    """See the module. Needs root and any kernel."""

    kind = TrackerKind.NONE

    def __init__(self, pids: Pids) -> None:
        super().__init__(pids)
        self._scanner = Scanner() if has_scan() else None

    def _attach(self, space: Space, *, final: bool) -> None:
        space.foreign_uffd = owns_userfaultfd(space.pid)
        space.untracked = "this kernel can track nothing"

    def _look(self, space: Space, *, final: bool, dropped: bool) -> Look:
        layout = space.layout
        if self._scanner:
            present = self._scanner.present(space.pagemap, layout.windows) & layout.covered
        else:
            present = read_entries(space.pagemap, layout.covered).present
        return Look(present, present)
