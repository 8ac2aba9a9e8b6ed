"""The common base of trackers: it follows processes as they fork, exec, share memory and exit."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from podferry.memory.kernel.maps import Layout, read_layout
from podferry.memory.kernel.pagemap import Entries, is_alive, open_pagemap
from podferry.memory.ranges import EMPTY, Runs, union
from podferry.memory.tracking.tracker import AddressSpaceRound, DirtyScan, Pids, TrackerKind
from podferry.memory.tracking.userfaultfd_owner import share_memory, uses_direct_io

_ATTEMPTS = 3  # to look at a process that execs again and again


@dataclass(slots=True)
class TrackedAddressSpace:
    """An address space that is being followed. `pagemap` keeps meaning this one, whatever its process does."""

    pid: int
    pagemap: int
    layout: Layout
    known: Runs = EMPTY
    """Pages reported as written and not dropped since: those that the target has."""
    unsettled: list[Runs] = field(default_factory=list)
    """What was reported since, to be added; not while the job stands still."""
    uffd: int | None = None
    cleared: Entries | None = None
    """What was there when its soft-dirty bits were cleared; None if they were not yet."""
    untracked: str = ""
    retry: bool = False
    """Whether tracking it may be tried again."""
    foreign_uffd: bool = False
    stopped: float = 0.0
    """Seconds for which it was held since the last round."""
    stale: bool = False
    """Whether it may no longer be its process's."""
    again: Runs = EMPTY
    """To be reported once more, see `FollowingTracker._settle`."""

    def close_uffd(self) -> None:
        """End the protection of its pages."""
        if self.uffd is not None:
            os.close(self.uffd)
            self.uffd = None


@dataclass(frozen=True, slots=True)
class Scan:
    """What a kind of tracker sees in a space. `present` is None if nobody asked."""

    written: Runs
    present: Runs | None
    deferred: Runs = field(default=EMPTY)
    foreign_uffd: bool = False
    """Whether an area belongs to another userfaultfd."""


class FollowingTracker(ABC):
    """A `Tracker` that asks its subclass how to attach to a space and how to look at one."""

    kind: TrackerKind

    def __init__(self, pids: Pids) -> None:
        self._pids = pids
        self._address_spaces: dict[int, TrackedAddressSpace] = {}
        self._shared: dict[int, int] = {}

    def collect(self, *, dropped: bool = True) -> DirtyScan:
        """See `Tracker.collect`."""
        return self._round(final=False, dropped=dropped)

    def final(self, *, dropped: bool = True) -> DirtyScan:
        """See `Tracker.final`."""
        return self._round(final=True, dropped=dropped)

    def close(self) -> None:
        """See `Tracker.close`."""
        while self._address_spaces:
            self._release(self._address_spaces.popitem()[1])

    @abstractmethod
    def _attach(self, address_space: TrackedAddressSpace, *, final: bool) -> None:
        """Begin to track a space, as far as possible; not if `final`. Raises OSError if it is gone."""

    @abstractmethod
    def _scan(self, address_space: TrackedAddressSpace, *, final: bool, dropped: bool) -> Scan:
        """Find what was written in a space, laid out as `space.layout` says. Raises OSError if it is gone."""

    def _round(self, *, final: bool, dropped: bool) -> DirtyScan:
        listed = set(self._pids())
        before = set(self._address_spaces)
        self._forget_false_sharing(listed)
        for pid in before - listed:
            self._release(self._address_spaces.pop(pid))
        address_spaces: dict[int, AddressSpaceRound] = {}
        for pid in sorted(listed - set(self._shared)):
            seen = self._visit(pid, final=final, dropped=dropped)
            if seen:
                address_spaces[pid] = seen
            elif pid in self._address_spaces:
                self._release(self._address_spaces.pop(pid))
        now = set(address_spaces)
        return DirtyScan(
            address_spaces, new=frozenset(now - before), gone=frozenset(before - now), shared=dict(self._shared)
        )

    def _visit(self, pid: int, *, final: bool, dropped: bool) -> AddressSpaceRound | None:
        """Scan one process; None if it has ended, has no memory of its own, or changes faster than we look."""
        fresh, known = False, EMPTY
        for _ in range(_ATTEMPTS):
            try:
                address_space = self._current(pid)
                if address_space is None:
                    fresh = True
                    if old := self._address_spaces.pop(
                        pid, None
                    ):  # what was known of its old memory is dropped by the next look
                        known = union([old.known, *old.unsettled])
                        self._release(old)
                    address_space = self._take_up(pid, known, final=final)
                    if address_space is None:
                        return None
                scan = self._scan(address_space, final=final, dropped=dropped)
                in_flight = not final and uses_direct_io(pid)
            except OSError:  # between two system calls it execed or ended; the next attempt tells
                continue
            if is_alive(address_space.pagemap):
                return self._settle(address_space, scan, fresh=fresh, in_flight=in_flight)
        return None

    def _current(self, pid: int) -> TrackedAddressSpace | None:
        """The space that is followed for a process, with its present layout; None if it has another one now."""
        address_space = self._address_spaces.get(pid)
        if address_space is None or address_space.stale:
            return None
        layout = read_layout(pid, address_space.layout)
        if not is_alive(address_space.pagemap) or address_space.layout.vdso != layout.vdso:
            return None
        address_space.layout = layout
        return address_space

    def _take_up(self, pid: int, known: Runs, *, final: bool) -> TrackedAddressSpace | None:
        """Follow a new address space; None if it is another process's, or there is none."""
        pagemap = open_pagemap(pid)
        try:
            layout = read_layout(pid)
            owner = self._owner(pid, layout.vdso)
            alive = is_alive(pagemap)
        except OSError:
            os.close(pagemap)
            raise
        if owner is not None or not alive:  # not alive: a zombie, or a kernel thread
            os.close(pagemap)
            if owner is not None:
                self._shared[pid] = owner
            return None
        address_space = self._address_spaces[pid] = TrackedAddressSpace(pid, pagemap, layout, known=known)
        self._attach(address_space, final=final)
        return address_space

    def _owner(self, pid: int, vdso: int) -> int | None:
        """The process that is followed and has the same address space."""
        alike = (
            address_space.pid for address_space in self._address_spaces.values() if address_space.layout.vdso == vdso
        )
        return next((other for other in alike if share_memory(other, pid)), None)

    def _settle(
        self, address_space: TrackedAddressSpace, scan: Scan, *, fresh: bool, in_flight: bool
    ) -> AddressSpaceRound:
        """Work out what vanished; what is there and was never reported counts as written.

        Direct I/O writes into pages that it looked up before it began, unseen by any page table. What is reported while
        such a transfer may be under way is therefore reported twice: a frozen process has none under way.
        """
        written, vanished, again = scan.written, EMPTY, address_space.again
        if scan.present is None:
            address_space.unsettled.append(written)
        else:
            address_space.known = union([address_space.known, *address_space.unsettled])
            address_space.unsettled.clear()
            reported = scan.present - scan.deferred
            changed = address_space.known ^ reported
            vanished = changed & address_space.known
            written |= changed & reported
            again &= reported
            address_space.known = reported
        address_space.again = written if in_flight else EMPTY
        stopped, address_space.stopped = address_space.stopped, 0.0
        return AddressSpaceRound(
            areas=address_space.layout.areas,
            written=written | again,
            dropped=vanished,
            deferred=scan.deferred,
            fresh=fresh,
            untracked=address_space.untracked,
            foreign_uffd=address_space.foreign_uffd or scan.foreign_uffd,
            stopped=stopped,
        )

    def _forget_false_sharing(self, listed: set[int]) -> None:
        """Of two processes that shared memory and no longer do, either may have a new one: take both up anew."""
        for pid, owner in list(self._shared.items()):
            if pid in listed and owner in listed and share_memory(pid, owner):
                continue
            del self._shared[pid]
            if address_space := self._address_spaces.get(owner):
                address_space.stale = True
                address_space.close_uffd()

    def _release(self, address_space: TrackedAddressSpace) -> None:
        address_space.close_uffd()
        os.close(address_space.pagemap)
