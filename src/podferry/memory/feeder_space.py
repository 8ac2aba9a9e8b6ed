"""Where the pages of a task's address space are now: bookkeeping over what userfaultfd reports, without I/O.

The store keeps a page under its address at the source, its `origin`. A job that runs while it is being fed moves,
unmaps and forks; `AddressSpace` follows and translates between an origin and the address where the page belongs now.

Order of events. The kernel reports a change after it has let go of the address space's lock, so with several threads two
changes can be reported the other way round (`fs/userfaultfd.c`: the event is queued after `mmap_write_unlock`). Only one
such pair would lose a page: thread 1 unmaps or moves away a range, thread 2's mremap is given this free range, and 2 is reported
first. It can be told, since the kernel never moves a mapping onto a range that is still mapped (with MREMAP_FIXED it
reports an unmap before): a move onto a range that is occupied waits here until the report that empties it has come.
Until then the kernel refuses to copy (EAGAIN), so nothing can go to a wrong place meanwhile.
"""

from __future__ import annotations

from podferry.memory.ranges import EMPTY, Runs
from podferry.memory.store_runs import Run, RunMap
from podferry.memory.uffd import Remap


class AddressSpace:
    """The translation for one address space.

    `pages` are the pages the store may hold, at their origins. `areas` are the anonymous areas, value 1 where a forked
    child does not inherit the contents; they have to cover `pages` at least.
    """

    def __init__(self, pages: Runs, areas: RunMap) -> None:
        self._origin = RunMap((Run(start, end, start) for start, end in pages), slope=1)
        self._target = self._origin.copy()
        self._areas = areas.copy()
        for start, end in pages - areas.runs():
            self._areas.set(start, end)
        self._waiting: list[Remap] = []

    def origin(self, address: int) -> int | None:
        """The origin of the page at `address`, or None if the store has nothing for it."""
        return self._origin.at(address)

    def target(self, origin: int, length: int) -> Run | None:
        """The first run among the origins `origin` up to `origin + length` that has a place; its value is the place."""
        return next(self._target.within(origin, origin + length), None)

    def origins(self, start: int, end: int) -> list[Run]:
        """The origins of the pages between two addresses, as runs of origins whose values are the addresses."""
        return [Run(run.value, run.value + run.end - run.start, run.start) for run in self._origin.within(start, end)]

    def unmap(self, start: int, end: int) -> list[Run]:
        """A range is gone. Returns the origins that have no place any more."""
        lost = self._clear(start, end)
        self._retry()
        return lost

    def remap(self, event: Remap) -> list[Run]:
        """A range has moved. Returns the origins that have no place any more (none, unless the kernel surprises us)."""
        if self._areas.overlaps(event.to, event.to + event.length):
            self._waiting.append(event)
            return []
        lost = self._move(event)
        self._retry()
        return lost

    def settle(self) -> list[Run]:
        """No event is on its way: carry out the moves that still wait. Returns the origins that lost their place."""
        waiting, self._waiting = self._waiting, []
        return [run for event in waiting for run in self._move(event)]

    def unsettled(self) -> bool:
        """Whether a move waits for the report that empties its destination."""
        return bool(self._waiting)

    def fork(self) -> tuple[AddressSpace, list[Run]]:
        """The child's address space, and the origins it does not inherit.

        What waits here is carried out in the child: its report will come to the parent alone, and whoever forked may
        know of the move that has been reported, but not of the change that has not returned yet.
        """
        child = AddressSpace(EMPTY, self._areas)
        child._origin, child._target = self._origin.copy(), self._target.copy()
        child._waiting = self._waiting[:]
        lost = child.settle()
        for area in list(child._areas):
            if area.value:
                lost += child._forget(area.start, area.end)
        return child, lost

    def _retry(self) -> None:
        """Carry out the waiting moves that have become possible; one may make room for the next."""
        progress = True
        while progress:
            progress = False
            for event in self._waiting:
                if not self._areas.overlaps(event.to, event.to + event.length):
                    self._waiting.remove(event)
                    self._move(event)
                    progress = True
                    break

    def _move(self, event: Remap) -> list[Run]:
        pages = self._origin.cut(event.start, event.start + event.length)
        areas = self._areas.cut(event.start, event.start + event.length)
        lost = self._clear(event.to, event.to + event.length)
        shift = event.to - event.start
        for run in pages:
            self._origin.set(run.start + shift, run.end + shift, run.value)
            self._target.set(run.value, run.value + run.end - run.start, run.start + shift)
        for area in areas:
            self._areas.set(area.start + shift, area.end + shift, area.value)
        return lost

    def _clear(self, start: int, end: int) -> list[Run]:
        self._areas.cut(start, end)
        return self._forget(start, end)

    def _forget(self, start: int, end: int) -> list[Run]:
        lost = [Run(run.value, run.value + run.end - run.start) for run in self._origin.cut(start, end)]
        for run in lost:
            self._target.cut(run.start, run.end)
        return lost
