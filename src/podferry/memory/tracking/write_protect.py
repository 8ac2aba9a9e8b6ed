"""Tracking by asynchronous write protection: a userfaultfd in every process, collected by PAGEMAP_SCAN.

How a page shows (`fs/proc/task_mmu.c`): pages that are protected lose the protection, silently, with the first write;
a page that is mapped anew, after MADV_DONTNEED for instance, has none. So "not protected" means written, and the scan
that finds such pages protects them again in the same step. Only pages that are there are protected: protecting holes
would leave markers that look like swapped pages. Hence a page that was there and is not has been given back.

An area that is not registered, because it was mapped or moved since the previous scan, counts as written and is registered
before it is read. The kernel does not merge areas of which only some are registered. So a program that maps new memory
over a part of old, and then moves old and new with one mremap, may get EFAULT where it would not have without us.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from podferry.memory.kernel import uffd
from podferry.memory.kernel.maps import Area, covered
from podferry.memory.kernel.pagemap import HELD, Category, Scanner, ScanQuery, is_alive, unreadable
from podferry.memory.ranges import EMPTY, Runs
from podferry.memory.tracking.following import FollowingTracker, Scan, TrackedAddressSpace
from podferry.memory.tracking.inject import InjectionOutcome
from podferry.memory.tracking.injector import Injector, NotInjected
from podferry.memory.tracking.tracker import Pids, TrackerKind
from podferry.memory.tracking.userfaultfd_owner import owns_userfaultfd

_FEATURES = uffd.Feature.WP_ASYNC | uffd.Feature.WP_UNPOPULATED


class UffdTracker(FollowingTracker):
    """See the module. Needs root, Linux 6.7; holds two descriptors for each process and one helper process."""

    kind = TrackerKind.UFFD

    def __init__(self, pids: Pids) -> None:
        super().__init__(pids)
        self._scanner = Scanner()
        self._injector = Injector()

    def close(self) -> None:
        """See `Tracker.close`."""
        super().close()
        self._injector.close()

    def _attach(self, address_space: TrackedAddressSpace, *, final: bool) -> None:
        if final:
            address_space.untracked, address_space.foreign_uffd = (
                "it appeared with the freeze",
                owns_userfaultfd(address_space.pid),
            )
        else:
            self._begin(address_space)

    def _begin(self, address_space: TrackedAddressSpace) -> None:
        """Track a space if it can be; if not, say why and whether that may change."""
        address_space.foreign_uffd, address_space.retry, address_space.untracked = (
            True,
            False,
            "it uses userfaultfd itself",
        )
        if owns_userfaultfd(address_space.pid):
            return
        address_space.retry, address_space.untracked = True, "another process tracks its memory"
        if self._is_tracked(address_space):
            return
        address_space.foreign_uffd = False
        try:
            opened = self._injector.open_userfaultfd(address_space.pid)
        except NotInjected as failure:
            address_space.retry, address_space.untracked = (
                failure.outcome is not InjectionOutcome.FOREIGN_CODE,
                failure.why,
            )
            return
        address_space.uffd, address_space.stopped, address_space.untracked = opened.uffd, opened.stopped, ""
        if not is_alive(address_space.pagemap):
            raise ProcessLookupError(errno.ESRCH, "the process became another program")
        uffd.api(address_space.uffd, _FEATURES)

    def _is_tracked(self, address_space: TrackedAddressSpace) -> bool:
        """Whether somebody protects pages asynchronously already: to share that would lose writes for both."""
        query = ScanQuery(Category.WPALLOWED, Category(0), HELD, Category.WPALLOWED)
        return bool(self._scanner.scan(address_space.pagemap, address_space.layout.windows, query).starts)

    def _scan(self, address_space: TrackedAddressSpace, *, final: bool, dropped: bool) -> Scan:
        layout = address_space.layout
        if address_space.uffd is None and address_space.retry and not final:
            self._begin(address_space)
        if address_space.uffd is None:
            present = self._scanner.present(address_space.pagemap, layout.windows) & layout.covered
            return Scan(present, present)
        untracked = self._untracked(address_space) & layout.covered
        deferred, foreign = EMPTY, False
        if not final:
            deferred, foreign = _register(address_space.uffd, layout.areas, untracked)
        written, tracked = self._tracked(address_space, final=final, dropped=dropped)
        return Scan(
            written=written | (untracked - deferred),
            present=None if tracked is None else tracked | untracked,
            deferred=deferred,
            foreign_uffd=foreign,
        )

    def _untracked(self, address_space: TrackedAddressSpace) -> Runs:
        """The pages that are there in areas that are not registered."""
        skipped = unreadable() | Category.WPALLOWED
        query = ScanQuery(mask=skipped, inverted=skipped, anyof=HELD, returned=Category.WPALLOWED)
        return self._scanner.scan(address_space.pagemap, address_space.layout.windows, query).all()

    def _tracked(self, address_space: TrackedAddressSpace, *, final: bool, dropped: bool) -> tuple[Runs, Runs | None]:
        """What was written in registered areas, and if `dropped` all that is there."""
        skipped = unreadable()
        mask = skipped | Category.WPALLOWED | (Category(0) if dropped else Category.WRITTEN)
        query = ScanQuery(mask=mask, inverted=skipped, anyof=HELD, returned=Category.WRITTEN, protect=not final)
        regions = self._scanner.scan(address_space.pagemap, address_space.layout.windows, query)
        if dropped:
            return regions.having(Category.WRITTEN), regions.all()
        return regions.all(), None


def _register(descriptor: int, areas: Iterable[Area], untracked: Runs) -> tuple[Runs, bool]:
    """Register the areas that hold `untracked` pages.

    Returns those of the pages whose areas refuse, and whether one is another userfaultfd's.
    """
    refused, foreign = [], False
    for area in areas:
        if not untracked.clip(area.start, area.end):
            continue
        try:
            uffd.register(descriptor, area.start, area.size, uffd.RegisterMode.WP)
        except OSError as error:
            foreign |= error.errno == errno.EBUSY
            refused.append(area)
    return untracked & covered(refused) if refused else EMPTY, foreign
