"""A tracker for kernels that track nothing: every scan reports all memory as written. Of use for one scan of a frozen job."""

from __future__ import annotations

from podferry.memory.kernel.pagemap import Scanner, has_scan, read_entries
from podferry.memory.tracking.following import FollowingTracker, Scan, TrackedAddressSpace
from podferry.memory.tracking.tracker import Pids, TrackerKind
from podferry.memory.tracking.userfaultfd_owner import owns_userfaultfd


class NoTracker(FollowingTracker):
    """See the module. Needs root and any kernel."""

    kind = TrackerKind.NONE

    def __init__(self, pids: Pids) -> None:
        super().__init__(pids)
        self._scanner = Scanner() if has_scan() else None

    def _attach(self, address_space: TrackedAddressSpace, *, final: bool) -> None:
        address_space.foreign_uffd = owns_userfaultfd(address_space.pid)
        address_space.untracked = "this kernel can track nothing"

    def _scan(self, address_space: TrackedAddressSpace, *, final: bool, dropped: bool) -> Scan:
        layout = address_space.layout
        if self._scanner:
            present = self._scanner.present(address_space.pagemap, layout.windows) & layout.covered
        else:
            present = read_entries(address_space.pagemap, layout.covered).present
        return Scan(present, present)
