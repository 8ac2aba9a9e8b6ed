"""What all trackers share: following processes as they come, exec, share memory and go."""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from podferry.memory.maps import Area, private_anonymous, read_areas
from podferry.memory.pagemap import is_alive, open_pagemap
from podferry.memory.ranges import EMPTY, Runs
from podferry.memory.tracker import Kind, Pids, Round, SpaceRound

_KCMP = {"x86_64": 312, "aarch64": 272}  # arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h
_KCMP_VM = 1
_ATTEMPTS = 3  # to look at a process that execs again and again


@dataclass(slots=True)
class Space:
    """An address space that is being followed. `pagemap` keeps meaning this one, whatever its process does."""

    pid: int
    pagemap: int
    vdso: int
    known: Runs = EMPTY
    """What was reported as written and not as dropped since: what the other side has."""
    uffd: int | None = None
    untracked: str = ""
    retry: bool = False
    """Whether tracking it may be tried again."""
    foreign_uffd: bool = False
    stopped: float = 0.0
    """Seconds for which it was held since the last round."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a kind of tracker sees in a space. `present` is None if nobody asked."""

    written: Runs
    present: Runs | None
    deferred: Runs = field(default=EMPTY)


class FollowingTracker(ABC):
    """A `Tracker` that asks its subclass how to attach to a space and how to look at one."""

    kind: Kind

    def __init__(self, pids: Pids) -> None:
        self._pids = pids
        self._spaces: dict[int, Space] = {}
        self._shared: dict[int, int] = {}

    def collect(self, *, dropped: bool = True) -> Round:
        """See `Tracker.collect`."""
        return self._round(final=False, dropped=dropped)

    def final(self, *, dropped: bool = True) -> Round:
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
    def _look(self, space: Space, areas: list[Area], *, final: bool, dropped: bool) -> Look:
        """Find what was written in a space. Raises OSError if it is gone."""

    def _round(self, *, final: bool, dropped: bool) -> Round:
        listed = set(self._pids())
        before = set(self._spaces)
        self._forget_false_sharing(listed)
        spaces: dict[int, SpaceRound] = {}
        for pid in sorted(listed - set(self._shared)):
            seen = self._visit(pid, final=final, dropped=dropped)
            if seen:
                spaces[pid] = seen
        for pid in set(self._spaces) - set(spaces):
            self._release(self._spaces.pop(pid))
        now = set(spaces)
        return Round(spaces, new=frozenset(now - before), gone=frozenset(before - now), shared=dict(self._shared))

    def _visit(self, pid: int, *, final: bool, dropped: bool) -> SpaceRound | None:
        """Look at one process; None if it has ended, has no memory of its own, or changes faster than we look."""
        fresh = False
        for _ in range(_ATTEMPTS):
            try:
                areas = read_areas(pid)
                space = self._spaces.get(pid)
                if space is None or not is_alive(space.pagemap) or space.vdso != _vdso(areas):
                    space, fresh = self._take_up(pid, space, final=final), True
                    if space is None:
                        return None
                    areas = read_areas(pid)
                ours = private_anonymous(areas)
                look = self._look(space, areas, final=final, dropped=dropped)
            except OSError:  # between two system calls it execed or ended; the next attempt tells
                continue
            if is_alive(space.pagemap):
                return self._settle(space, ours, look, fresh=fresh)
        return None

    def _take_up(self, pid: int, old: Space | None, *, final: bool) -> Space | None:
        """Follow a new address space. What was known of the process's old one is dropped by the next look."""
        known = old.known if old else EMPTY
        if old:
            self._release(self._spaces.pop(pid))
        pagemap = open_pagemap(pid)
        try:
            vdso = _vdso(read_areas(pid))
            owner = self._owner(pid, vdso) if is_alive(pagemap) else None
        except OSError:
            os.close(pagemap)
            raise
        if owner is not None or not is_alive(pagemap):  # not alive: a zombie, or a kernel thread
            os.close(pagemap)
            if owner is not None:
                self._shared[pid] = owner
            return None
        space = self._spaces[pid] = Space(pid, pagemap, vdso, known=known)
        self._attach(space, final=final)
        return space

    def _owner(self, pid: int, vdso: int) -> int | None:
        """The process that is followed and has the same address space."""
        alike = (space.pid for space in self._spaces.values() if space.vdso == vdso)
        return next((other for other in alike if share_memory(other, pid)), None)

    def _settle(self, space: Space, areas: list[Area], look: Look, *, fresh: bool) -> SpaceRound:
        """Work out what vanished; what is there and was never reported counts as written."""
        written, vanished = look.written, EMPTY
        if look.present is None:
            space.known |= written
        else:
            reported = look.present - look.deferred
            changed = space.known ^ reported
            vanished = changed & space.known
            written |= changed & reported
            space.known = reported
        stopped, space.stopped = space.stopped, 0.0
        return SpaceRound(
            areas=tuple(areas),
            written=written,
            dropped=vanished,
            deferred=look.deferred,
            fresh=fresh,
            untracked=space.untracked,
            foreign_uffd=space.foreign_uffd,
            stopped=stopped,
        )

    def _forget_false_sharing(self, listed: set[int]) -> None:
        """Of two processes that shared memory and no longer do, either may have a new one: take both up anew."""
        for pid, owner in list(self._shared.items()):
            if pid in listed and owner in listed and share_memory(pid, owner):
                continue
            del self._shared[pid]
            if owner in self._spaces:
                self._spaces[owner].vdso = -1

    def _release(self, space: Space) -> None:
        if space.uffd is not None:
            os.close(space.uffd)
        os.close(space.pagemap)


def share_memory(one: int, other: int) -> bool:
    """Whether two processes have the same address space, by kcmp(2); no where the kernel cannot tell."""
    number = _KCMP.get(os.uname().machine)
    if number is None:
        return False
    return int(ctypes.CDLL(None).syscall(ctypes.c_long(number), one, other, _KCMP_VM, 0, 0)) == 0


def owns_userfaultfd(pid: int) -> bool:
    """Whether a process has a userfaultfd open. Raises OSError if it is gone."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(descriptor.readlink()) == "anon_inode:[userfaultfd]":
                return True
        except FileNotFoundError:
            continue
    return False


def _vdso(areas: list[Area]) -> int:
    """Where the vDSO is: as good as an address space's name, since every exec places it anew."""
    return next((area.start for area in areas if area.name == "[vdso]"), 0)
