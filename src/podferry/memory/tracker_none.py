"""Where nothing can be tracked: every look finds all memory written. Good for one look, at a frozen job."""

from __future__ import annotations

from podferry.memory.maps import Area, covered, private_anonymous, spans
from podferry.memory.pagemap import Category, Query, Scanner, has_scan, read_entries, unreadable
from podferry.memory.ranges import Runs
from podferry.memory.tracker import Kind, Pids
from podferry.memory.tracker_spaces import FollowingTracker, Look, Space, owns_userfaultfd


class NoTracker(FollowingTracker):
    """See the module. Needs root and any kernel; without PAGEMAP_SCAN zero pages count as memory too."""

    kind = Kind.NONE

    def __init__(self, pids: Pids) -> None:
        super().__init__(pids)
        self._scanner = Scanner() if has_scan() else None

    def _attach(self, space: Space, *, final: bool) -> None:
        space.foreign_uffd = owns_userfaultfd(space.pid)
        space.untracked = "this kernel can track nothing"

    def _look(self, space: Space, areas: list[Area], *, final: bool, dropped: bool) -> Look:
        present = self._present(space, spans(areas)) & covered(private_anonymous(areas))
        return Look(present, present)

    def _present(self, space: Space, windows: list[tuple[int, int]]) -> Runs:
        if self._scanner is None:
            return read_entries(space.pagemap, windows).present
        skipped = unreadable()
        held = Category.PRESENT | Category.SWAPPED
        query = Query(mask=skipped, inverted=skipped, anyof=held, returned=Category.WPALLOWED)
        return self._scanner.scan(space.pagemap, windows, query).all()
