"""Tracking by soft-dirty bits: `clear_refs` clears them, bit 55 of a pagemap entry tells of writes since.

Reading and clearing are two steps, and a write between them would be lost: the processes are paused meanwhile, as for
CRIU's pre-dump. A huge page has one bit, so that a write to it counts for two megabytes. A fork inherits the bits of
memory that nobody has copied yet: until they were cleared for this process itself they mean nothing. Nor do they tell of
memory that was given back and is read again, which is the zero page then and counts as not there.
Nor of memory that was moved by whole page tables (`move_normal_pmd` in mm/mremap.c) to where other memory was before: a
page in another frame than at the previous scan counts as written.

See `Documentation/admin-guide/mm/soft-dirty.rst`.
"""

from __future__ import annotations

from pathlib import Path

from podferry.memory.kernel.pagemap import read_entries
from podferry.memory.tracking.following import FollowingTracker, Scan, TrackedAddressSpace
from podferry.memory.tracking.tracker import DirtyScan, Pause, Pids, TrackerKind, no_pause
from podferry.memory.tracking.userfaultfd_owner import owns_userfaultfd

_SOFT_DIRTY = "4"


class SoftDirtyTracker(FollowingTracker):
    """See the module. Needs root and CONFIG_MEM_SOFT_DIRTY."""

    kind = TrackerKind.SOFT_DIRTY

    def __init__(self, pids: Pids, pause: Pause) -> None:
        super().__init__(pids)
        self._pause = pause

    def _round(self, *, final: bool, dropped: bool) -> DirtyScan:
        with no_pause() if final else self._pause():
            return super()._round(final=final, dropped=dropped)

    def _attach(self, address_space: TrackedAddressSpace, *, final: bool) -> None:
        address_space.foreign_uffd = owns_userfaultfd(address_space.pid)

    def _scan(self, address_space: TrackedAddressSpace, *, final: bool, dropped: bool) -> Scan:
        entries = read_entries(address_space.pagemap, address_space.layout.covered)
        written = (
            entries.soft_dirty | entries.replaced(address_space.cleared) if address_space.cleared else entries.present
        )
        if not final:
            Path(f"/proc/{address_space.pid}/clear_refs").write_text(_SOFT_DIRTY)
            address_space.cleared = entries
        return Scan(written, entries.present if dropped else None)
