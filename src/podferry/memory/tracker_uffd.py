"""Tracking by asynchronous write protection: a userfaultfd in every process, collected by PAGEMAP_SCAN.

How a page shows (`fs/proc/task_mmu.c`): pages that are protected lose the protection, silently, with the first write;
a page that is mapped anew, after MADV_DONTNEED for instance, has none. So "not protected" means written, and the scan
that finds such pages protects them again in the same step. Only pages that are there are protected: protecting holes
would leave markers that look like swapped pages. Hence a page that was there and is not has been given back.

An area that is not registered, because it was mapped or moved since the last look, counts as written and is registered
before it is read. Registering splits areas off: a program that first maps two areas side by side and later moves both
with one mremap gets EFAULT if only one of them is registered.
"""

from __future__ import annotations

import errno

from podferry.memory import uffd
from podferry.memory.inject import Outcome
from podferry.memory.injector import Injector, NotInjected
from podferry.memory.maps import Area, covered, private_anonymous, spans
from podferry.memory.pagemap import Category, Query, Scanner, is_alive, unreadable
from podferry.memory.ranges import EMPTY, Runs
from podferry.memory.tracker import Kind, Pids
from podferry.memory.tracker_spaces import FollowingTracker, Look, Space, owns_userfaultfd

_FEATURES = uffd.Feature.WP_ASYNC | uffd.Feature.WP_UNPOPULATED
_HELD = Category.PRESENT | Category.SWAPPED
_IN_VAIN = frozenset({Outcome.FOREIGN_CODE})


class UffdTracker(FollowingTracker):
    """See the module. Needs root, Linux 6.7; holds two descriptors for each process and one helper process."""

    kind = Kind.UFFD

    def __init__(self, pids: Pids) -> None:
        super().__init__(pids)
        self._scanner = Scanner()
        self._injector = Injector()

    def close(self) -> None:
        """See `Tracker.close`."""
        super().close()
        self._injector.close()

    def _attach(self, space: Space, *, final: bool) -> None:
        space.foreign_uffd = owns_userfaultfd(space.pid)
        if space.foreign_uffd:
            space.untracked = "it uses userfaultfd itself"
        elif final:
            space.untracked = "it appeared with the freeze"
        else:
            self._inject(space)

    def _inject(self, space: Space) -> None:
        try:
            opened = self._injector.open_userfaultfd(space.pid)
        except NotInjected as failure:
            space.untracked = failure.why
            space.retry = failure.outcome not in _IN_VAIN
            return
        space.uffd, space.stopped, space.untracked = opened.uffd, opened.stopped, ""
        if not is_alive(space.pagemap):
            raise ProcessLookupError(errno.ESRCH, "the process became another program")
        uffd.api(space.uffd, _FEATURES)

    def _look(self, space: Space, areas: list[Area], *, final: bool, dropped: bool) -> Look:
        windows, ours = spans(areas), private_anonymous(areas)
        if space.uffd is None and space.retry and not final:
            self._inject(space)
        untracked = self._untracked(space, windows) & covered(ours)
        deferred = EMPTY
        if space.uffd is not None and not final:
            deferred = self._register(space, ours, untracked)
        if space.uffd is None:
            return Look(untracked, untracked)
        written, present = self._tracked(space, windows, final=final, dropped=dropped)
        return Look(
            written | (untracked - deferred), None if present is None else present | untracked, deferred=deferred
        )

    def _untracked(self, space: Space, windows: list[tuple[int, int]]) -> Runs:
        """The pages that are there in areas that are not registered."""
        skipped = unreadable() | Category.WPALLOWED
        query = Query(mask=skipped, inverted=skipped, anyof=_HELD, returned=Category.WPALLOWED)
        return self._scanner.scan(space.pagemap, windows, query).all()

    def _tracked(
        self, space: Space, windows: list[tuple[int, int]], *, final: bool, dropped: bool
    ) -> tuple[Runs, Runs | None]:
        """What was written in registered areas, and if `dropped` all that is there."""
        skipped = unreadable()
        mask = skipped | Category.WPALLOWED | (Category(0) if dropped else Category.WRITTEN)
        query = Query(mask=mask, inverted=skipped, anyof=_HELD, returned=Category.WRITTEN, protect=not final)
        regions = self._scanner.scan(space.pagemap, windows, query)
        if dropped:
            return regions.having(Category.WRITTEN), regions.all()
        return regions.all(), None

    def _register(self, space: Space, areas: list[Area], untracked: Runs) -> Runs:
        """Register the areas that hold `untracked` pages; returns those of the pages whose areas refuse."""
        assert space.uffd is not None
        refused = []
        for area in areas:
            if not untracked.clip(area.start, area.end):
                continue
            try:
                uffd.register(space.uffd, area.start, area.size, uffd.Mode.WP)
            except OSError as error:
                space.foreign_uffd |= error.errno == errno.EBUSY
                refused.append(area)
        return untracked & covered(refused) if refused else EMPTY
