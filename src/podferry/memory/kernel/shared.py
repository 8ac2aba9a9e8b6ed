"""Shared memory: the objects that processes have mapped, and their contents, read while they run.

`/proc/PID/map_files` (proc_pid_map_files(5), needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN) opens what is mapped, whatever has
become of its name; where it has data, lseek(2) tells with SEEK_DATA. Reading a hole would not fill it, but costs as much as data.

What MAP_SHARED | MAP_ANONYMOUS, shmget(2) and memfd_create(2) make is on one file system of the kernel's own (`shm_mnt` in
mm/shmem.c), which nobody can mount. Nothing else is opened: a file that a job has put on a network file system may block whoever
opens it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from podferry.memory.kernel.maps import Area, read_areas


@dataclass(frozen=True, slots=True)
class SharedObject:
    """An object by its kind and inode, and one mapping of it."""

    name: str
    inode: int
    pid: int
    start: int
    end: int

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from others. Segments of shmget have their identifier for an inode, which others may have, too."""
        return self.name, self.inode

    def open(self) -> int:
        """A descriptor to read it with. Raises `OSError` where the process has unmapped it."""
        return os.open(f"/proc/{self.pid}/map_files/{self.start:x}-{self.end:x}", os.O_RDONLY | os.O_CLOEXEC)


@cache
def _kernels_own() -> str:
    """The device of that file system, as /proc/PID/maps writes it."""
    descriptor = os.memfd_create("podferry", os.MFD_CLOEXEC)
    try:
        device = os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)
    return f"{os.major(device):02x}:{os.minor(device):02x}"


def shared_objects(pids: Iterable[int]) -> list[SharedObject]:
    """Every object of shared memory that these processes have mapped, once."""
    found: dict[tuple[str, int], SharedObject] = {}
    for pid in pids:
        with suppress(OSError):
            for one in (SharedObject(a.name, a.inode, pid, a.start, a.end) for a in read_areas(pid) if _is_shared(a)):
                found.setdefault(one.key, one)
    return list(found.values())


def _is_shared(area: Area) -> bool:
    return not area.private and area.device == _kernels_own()


def chunks(descriptor: int, into: memoryview) -> Iterator[tuple[int, int]]:
    """Read an object into `into`, piece by piece, passing over holes: (offset, size) in bytes. Offsets are multiples of the size of
    `into`."""
    at = 0
    while True:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:  # ENXIO: there is none beyond
            return
        at -= at % len(into)
        if not (size := os.preadv(descriptor, [into], at)):
            return
        yield at, size
        at += len(into)
