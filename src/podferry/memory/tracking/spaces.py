"""What all trackers share: following processes as they come, exec, share memory and go."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from podferry.memory.kernel.maps import Layout, read_layout
from podferry.memory.kernel.pagemap import Entries, is_alive, open_pagemap
from podferry.memory.ranges import EMPTY, Runs, union
from podferry.memory.tracking.tracker import DirtyScan, Pids, SpaceRound, TrackerKind
from podferry.memory.tracking.userfaultfd_owner import share_memory, uses_direct_io

_ATTEMPTS = 3  # to look at a process that execs again and again


@dataclass(slots=True)
class Space:
    """An address space that is being followed. `pagemap` keeps meaning this one, whatever its process does."""

    pid: int
    pagemap: int
    layout: Layout
    known: Runs = EMPTY
    """What was reported as written and not as dropped since: what the other side has."""
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
class Look:
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
        self._spaces: dict[int, Space] = {}
        self._shared: dict[int, int] = {}

    def collect(self, *, dropped: bool = True) -> DirtyScan:
        """See `Tracker.collect`."""
        return self._round(final=False, dropped=dropped)

    def final(self, *, dropped: bool = True) -> DirtyScan:
        """See `Tracker.final`."""
        return self._round(final=True, dropped=dropped)

    def close(self) -> None:
        """See `Tracker.close`."""
        while self._spaces:
            self._release(self._spaces.popitem()[1])

    @abstractmethod
    def _attach(self, space: Space, *, final: bool) -> None:
        """Begin to track a space, as far as possible; not if `final`. Raises OSError if it is gone."""

    @abstractmethod
    def _look(self, space: Space, *, final: bool, dropped: bool) -> Look:
        """Find what was written in a space, laid out as `space.layout` says. Raises OSError if it is gone."""

    def _round(self, *, final: bool, dropped: bool) -> DirtyScan:
        listed = set(self._pids())
        before = set(self._spaces)
        self._forget_false_sharing(listed)
        for pid in before - listed:
            self._release(self._spaces.pop(pid))
        spaces: dict[int, SpaceRound] = {}
        for pid in sorted(listed - set(self._shared)):
            seen = self._visit(pid, final=final, dropped=dropped)
            if seen:
                spaces[pid] = seen
            elif pid in self._spaces:
                self._release(self._spaces.pop(pid))
        now = set(spaces)
        return DirtyScan(spaces, new=frozenset(now - before), gone=frozenset(before - now), shared=dict(self._shared))

    def _visit(self, pid: int, *, final: bool, dropped: bool) -> SpaceRound | None:
        """Look at one process; None if it has ended, has no memory of its own, or changes faster than we look."""
        fresh, known = False, EMPTY
        for _ in range(_ATTEMPTS):
            try:
                space = self._current(pid)
                if space is None:
                    fresh = True
                    if old := self._spaces.pop(
                        pid, None
                    ):  # what was known of its old memory is dropped by the next look
                        known = union([old.known, *old.unsettled])
                        self._release(old)
                    space = self._take_up(pid, known, final=final)
                    if space is None:
                        return None
                look = self._look(space, final=final, dropped=dropped)
                in_flight = not final and uses_direct_io(pid)
            except OSError:  # between two system calls it execed or ended; the next attempt tells
                continue
            if is_alive(space.pagemap):
                return self._settle(space, look, fresh=fresh, in_flight=in_flight)
        return None

    def _current(self, pid: int) -> Space | None:
        """The space that is followed for a process, with its present layout; None if it has another one now."""
        space = self._spaces.get(pid)
        if space is None or space.stale:
            return None
        layout = read_layout(pid, space.layout)
        if not is_alive(space.pagemap) or space.layout.vdso != layout.vdso:
            return None
        space.layout = layout
        return space

    def _take_up(self, pid: int, known: Runs, *, final: bool) -> Space | None:
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
        space = self._spaces[pid] = Space(pid, pagemap, layout, known=known)
        self._attach(space, final=final)
        return space

    def _owner(self, pid: int, vdso: int) -> int | None:
        """The process that is followed and has the same address space."""
        alike = (space.pid for space in self._spaces.values() if space.layout.vdso == vdso)
        return next((other for other in alike if share_memory(other, pid)), None)

    def _settle(self, space: Space, look: Look, *, fresh: bool, in_flight: bool) -> SpaceRound:
        """Work out what vanished; what is there and was never reported counts as written.

        Direct I/O writes into pages that it looked up before it began, unseen by any page table. What is reported while
        such a transfer may be under way is therefore reported twice: a frozen process has none under way.
        """
        written, vanished, again = look.written, EMPTY, space.again
        if look.present is None:
            space.unsettled.append(written)
        else:
            space.known = union([space.known, *space.unsettled])
            space.unsettled.clear()
            reported = look.present - look.deferred
            changed = space.known ^ reported
            vanished = changed & space.known
            written |= changed & reported
            again &= reported
            space.known = reported
        space.again = written if in_flight else EMPTY
        stopped, space.stopped = space.stopped, 0.0
        return SpaceRound(
            areas=space.layout.areas,
            written=written | again,
            dropped=vanished,
            deferred=look.deferred,
            fresh=fresh,
            untracked=space.untracked,
            foreign_uffd=space.foreign_uffd or look.foreign_uffd,
            stopped=stopped,
        )

    def _forget_false_sharing(self, listed: set[int]) -> None:
        """Of two processes that shared memory and no longer do, either may have a new one: take both up anew."""
        for pid, owner in list(self._shared.items()):
            if pid in listed and owner in listed and share_memory(pid, owner):
                continue
            del self._shared[pid]
            if space := self._spaces.get(owner):
                space.stale = True
                space.close_uffd()

    def _release(self, space: Space) -> None:
        space.close_uffd()
        os.close(space.pagemap)
