"""The present addresses of a task's pages: bookkeeping over the events of userfaultfd, without I/O.

The store keeps a page under its address at the source, its `origin`. A job that runs while it is being fed moves,
unmaps and forks; `AddressSpace` follows and translates between an origin and the address where the page belongs now.

Order of reports. The kernel reports a change after it has let go of the address space's lock (`fs/userfaultfd.c`: the event is
queued after `mmap_write_unlock`), and a move in two steps: the move, then, once that has been read, the unmapping of the
old place. So with several threads, thread 1's unmapping of a range may be reported after thread 2's mremap was given
the free range and that was reported, and taking the reports at their face would throw away the pages that 2 has put there.

It can be told: the kernel never moves anything onto a range that is still mapped (with MREMAP_FIXED it reports an
unmapping before). A range stays occupied here until its unmapping is reported, and pages that move onto an
occupied range are in flight until it is. Meanwhile the kernel refuses to copy (EAGAIN), so nothing goes to a wrong place.

Growth is not reported (an mremap in place, or to a greater length elsewhere): such pages are known to be an area's from its next
move on. Before that, one thread's unmapping of them that is not reported yet is not expected here; what another thread moves
there meanwhile would be taken for what was unmapped.
"""

from __future__ import annotations

from dataclasses import dataclass

from podferry.memory.kernel.uffd import Remap
from podferry.memory.ranges import EMPTY, Runs
from podferry.memory.store.runs import Run, RunMap


@dataclass(frozen=True)
class _Flight:
    """What has left its old place for `to` and following: pages (addresses to origins) and areas, at their new addresses."""

    to: int
    end: int
    pages: RunMap
    areas: RunMap


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
        self._flights: list[_Flight] = []

    def origin(self, address: int) -> int | None:
        """The origin of the page at `address`, or None if the store has nothing for it."""
        return self._origin.at(address)

    def target(self, origin: int, length: int) -> Run | None:
        """The first run among the origins `origin` up to `origin + length` that has a place; its value is the place."""
        return next(self._target.within(origin, origin + length), None)

    def origins(self, start: int, end: int) -> list[Run]:
        """The origins of the pages between two addresses, in flight or in place."""
        maps = [self._origin, *[flight.pages for flight in self._flights]]
        return [Run(run.value, run.value + run.end - run.start) for one in maps for run in one.within(start, end)]

    def unmap(self, start: int, end: int) -> list[Run]:
        """A range is gone. Returns the origins that have no place any more."""
        lost = self._clear(start, end)
        self._land()
        return lost

    def remap(self, event: Remap) -> None:
        """A range has moved; the unmapping of its old place is still to come (or never comes, with MREMAP_DONTUNMAP)."""
        self._flights.append(self._lift(event))
        self._land()

    def unsettled(self) -> bool:
        """Whether anything is in flight: nothing may be put in place then."""
        return bool(self._flights)

    def settle(self) -> list[Run]:
        """No report is on its way: land what is in flight. Returns the origins that lost their place by that."""
        flights, self._flights = self._flights, []
        lost = []
        for flight in flights:
            lost += self._clear(flight.to, flight.end)
            self._put(flight)
        return lost

    def fork(self) -> tuple[AddressSpace, list[Run]]:
        """The child's address space, and the origins it does not inherit.

        In the child everything lands: the outstanding reports come to the parent alone. Whoever forked may know of a
        move that has been reported, but not of a change whose report, and so whose return, is outstanding.
        """
        child = AddressSpace(EMPTY, self._areas)
        child._origin, child._target = self._origin.copy(), self._target.copy()
        child._flights = self._flights[:]
        lost = child.settle()
        for area in list(child._areas):
            if area.value:
                lost += child._forget(area.start, area.end)
        return child, lost

    def _lift(self, event: Remap) -> _Flight:
        """Take up the pages of a range that moves: those in place, else those that were in flight to it."""
        start, end, shift = event.start, event.start + event.length, event.to - event.start
        pages = self._origin.cut(start, end)
        for run in pages:
            self._target.cut(run.value, run.value + run.end - run.start)
        for flight in self._flights:
            pages += [] if pages else flight.pages.cut(start, end)
        moved = RunMap((Run(run.start + shift, run.end + shift, run.value) for run in pages), slope=1)
        for first, last in Runs.of(start, end) - self._areas.runs():  # it has grown there, of which nobody tells
            self._areas.set(first, last)
        areas = RunMap(Run(run.start + shift, run.end + shift, run.value) for run in self._areas.within(start, end))
        return _Flight(event.to, event.to + event.length, moved, areas)

    def _land(self) -> None:
        """Land what can: its destination is free."""
        for flight in self._flights[:]:
            if not self._areas.overlaps(flight.to, flight.end):
                self._flights.remove(flight)
                self._put(flight)

    def _put(self, flight: _Flight) -> None:
        for run in flight.pages:
            self._origin.set(*run)
            self._target.set(run.value, run.value + run.end - run.start, run.start)
        for area in flight.areas:
            self._areas.set(*area)

    def _clear(self, start: int, end: int) -> list[Run]:
        self._areas.cut(start, end)
        return self._forget(start, end)

    def _forget(self, start: int, end: int) -> list[Run]:
        lost = [Run(run.value, run.value + run.end - run.start) for run in self._origin.cut(start, end)]
        for run in lost:
            self._target.cut(run.start, run.end)
        return lost
