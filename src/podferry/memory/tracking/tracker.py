"""The interface of trackers: a tracker says, round by round, which memory of a group of processes must be copied.

A tracker follows processes as they come, fork, exec and go, and their areas as they are mapped, moved and unmapped.
What it cannot follow it reports as written in every round, so that a wrong guess costs time and never data.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from podferry.memory.kernel import uffd
from podferry.memory.kernel.maps import Area
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.kernel.pagemap import has_scan, open_pagemap, read_entries
from podferry.memory.kernel.zero_frames import zero_frames
from podferry.memory.ranges import Runs
from podferry.memory.tracking.registers import ARCHITECTURES

Pids = Callable[[], Iterable[int]]
"""Lists the processes to follow, as process ids of our own pid namespace: a container's cgroup.procs, say."""

Pause = Callable[[], AbstractContextManager[object]]
"""Holds all of these processes still for as long as the context lasts."""


class TrackerKind(StrEnum):
    """The mechanism that finds written pages."""

    UFFD = "uffd"
    """A userfaultfd protects pages asynchronously and PAGEMAP_SCAN collects what was written. The job is not stopped."""
    SOFT_DIRTY = "soft-dirty"
    """The kernel's soft-dirty bits. The job is paused while they are read and cleared."""
    NONE = "none"
    """Nothing can be tracked: all memory counts as written."""


@dataclass(frozen=True, slots=True)
class AddressSpaceRound:
    """The result of one scan of an address space. Runs are page-aligned bytes."""

    areas: tuple[Area, ...]
    """The areas whose memory is pre-copied."""
    written: Runs
    """To be read and sent: written since the previous scan, or never seen before."""
    dropped: Runs
    """Reported as written once and no longer there: unmapped, or given back with madvise. It reads as zeroes now."""
    deferred: Runs
    """There, but in areas that cannot be tracked; counted as written in the final scan only."""
    fresh: bool = False
    """The first look: a new process, or one that has become another program (`dropped` then holds the old memory)."""
    untracked: str = ""
    """Why all of its memory counts as written in every round; empty if it is tracked."""
    foreign_uffd: bool = False
    """The process uses userfaultfd itself. CRIU cannot dump such a process."""
    stopped: float = 0.0
    """Seconds for which a thread of it was held during this look."""


@dataclass(frozen=True, slots=True)
class DirtyScan:
    """The result of one scan of all processes."""

    address_spaces: dict[int, AddressSpaceRound]
    """By process id. Processes that share one address space appear once."""
    new: frozenset[int]
    gone: frozenset[int]
    """Processes that have ended; their memory is to be forgotten."""
    shared: dict[int, int]
    """Processes that use another's address space (between vfork and exec, for instance), and whose."""

    @property
    def written(self) -> int:
        """Bytes to send."""
        return sum(address_space.written.size for address_space in self.address_spaces.values())


class Tracker(Protocol):
    """Use from one thread at a time. Errors of single processes are no errors: they show in the round."""

    @property
    def kind(self) -> TrackerKind:
        """How it tracks."""
        ...

    def collect(self, *, dropped: bool = True) -> DirtyScan:
        """Scan the running processes: attach to new ones, and find what changed since the previous scan.

        Read what is reported after this returns; what is written from then on, the next round reports. `dropped` says
        whether to look for pages that vanished, which takes three times as long.
        """
        ...

    def final(self, *, dropped: bool = True) -> DirtyScan:
        """Scan processes that are frozen, for the last time. Nothing is attached, protected or cleared.

        Deferred areas count as written. After a rollback `collect` goes on from there, and loses nothing.
        """
        ...

    def close(self) -> None:
        """Let go of all processes. Their memory is as it was before.

        With uffd that takes 20 ms a GiB, and needs not be done before the dump: CRIU minds descriptors of userfaultfd
        in a process, not areas that are registered with one elsewhere (4.1.1 dumps and restores such a process).
        """
        ...


@dataclass(frozen=True, slots=True)
class TrackerFacts:
    """What this kernel can do, see `probe`."""

    machine: str
    pagemap_scan: bool
    wp_async: bool
    soft_dirty: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """A kind of tracker, and in a sentence why it is this one."""

    kind: TrackerKind
    reason: str


def choose(facts: TrackerFacts) -> Choice:
    """The best tracker that a kernel allows."""
    known = facts.machine in ARCHITECTURES
    if facts.pagemap_scan and facts.wp_async and known:
        return Choice(TrackerKind.UFFD, "the kernel has PAGEMAP_SCAN and asynchronous userfaultfd protection")
    lacks = ", ".join(
        what
        for what, there in (
            ("PAGEMAP_SCAN (Linux 6.7)", facts.pagemap_scan),
            ("userfaultfd with UFFD_FEATURE_WP_ASYNC (Linux 6.7; 6.10 on arm64)", facts.wp_async),
            (f"support in podferry for {facts.machine}", known),
        )
        if not there
    )
    if facts.soft_dirty:
        return Choice(TrackerKind.SOFT_DIRTY, f"the kernel has soft-dirty bits, but no {lacks}")
    return Choice(TrackerKind.NONE, f"the kernel has no {lacks}, and no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)")


def probe() -> TrackerFacts:
    """Try on ourselves what this kernel can do. Raises OSError only for what no kernel answers."""
    return TrackerFacts(
        machine=os.uname().machine, pagemap_scan=has_scan(), wp_async=_has_wp_async(), soft_dirty=_has_soft_dirty()
    )


def no_pause() -> AbstractContextManager[None]:
    """A `Pause` for processes that already stand still."""
    return nullcontext()


def _has_wp_async() -> bool:
    try:
        fd = uffd.create(os.O_CLOEXEC | os.O_NONBLOCK | uffd.USER_MODE_ONLY)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            return False
        raise
    try:
        uffd.api(fd, uffd.Feature.WP_ASYNC | uffd.Feature.WP_UNPOPULATED)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _has_soft_dirty() -> bool:
    with mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0] = 1
        handle = ctypes.c_char.from_buffer(page)
        start = ctypes.addressof(handle)
        pagemap = open_pagemap(os.getpid())
        try:
            return bool(read_entries(pagemap, [(start, start + PAGE)]).soft_dirty) and bool(zero_frames().small)
        finally:
            os.close(pagemap)
            del handle
