"""Which pages of a process are there, and which were written: `/proc/PID/pagemap` and its PAGEMAP_SCAN ioctl.

Layouts and constants are those of the kernel's `include/uapi/linux/fs.h`, behaviour that of `fs/proc/task_mmu.c`; see
PAGEMAP_SCAN(2const), proc_pid_pagemap(5), `Documentation/admin-guide/mm/pagemap.rst`. All addresses are bytes. The GIL
is not held while the kernel walks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag
from functools import cache
from itertools import compress, repeat
from operator import and_

from podferry.memory.kernel.page_size import PAGE
from podferry.memory.kernel.zero_frames import ZeroFrames, zero_frames
from podferry.memory.ranges import Runs

_SCAN = 0xC0606610
_ARGUMENT = struct.Struct("=12Q")  # struct pm_scan_arg
_WALK_END = 4 * 8  # offset of its field walk_end
_PROTECT = 1 << 0  # PM_SCAN_WP_MATCHING
_WORDS = 3  # of a struct page_region: start, end, categories
_REGIONS = 65536  # that one call may return

_PAGES_AT_ONCE = 1 << 17  # one MiB of classic pagemap entries
_TOP_BITS_TO_PRESENT = bytes(  # bit 63: present, bit 62: swapped, bit 61: a file's, not the process's own
    int(byte & 0b1100_0000 != 0 and byte & 0b0010_0000 == 0) for byte in range(256)
)
_TOP_BITS_TO_SWAPPED = bytes(byte >> 6 & 1 for byte in range(256))
_BIT_55_TO_DIRTY = bytes(byte >> 7 for byte in range(256))  # of the byte that holds bits 48 to 55
_ANY_BIT = bytes(int(byte != 0) for byte in range(256))
_NO_BIT = bytes(int(byte == 0) for byte in range(256))
_ONES = re.compile(rb"\x01+")


class Category(IntFlag):
    """`PAGE_IS_*`: what PAGEMAP_SCAN tells of a page."""

    WPALLOWED = 1 << 0
    """Its area is registered with a userfaultfd that protects asynchronously."""
    WRITTEN = 1 << 1
    """It is not protected: written, or mapped anew, since it was."""
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    """It is in swap or being moved; also the markers of pages that were protected, poisoned or guarded while absent."""
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7
    GUARD = 1 << 8
    """It is a guard (MADV_GUARD_INSTALL) and faults; known from Linux 6.15 on."""


HELD = Category.PRESENT | Category.SWAPPED


@dataclass(frozen=True, slots=True)
class ScanQuery:
    """What a scan looks for.

    A page counts if, after flipping its bits in `inverted`, it has all of `mask` and (if given) one of `anyof`.
    `returned` is what to tell of it; neighbours that tell the same come as one region. `protect` protects the pages
    found that were written, in the same step; areas that are not registered for it are then passed over.
    """

    mask: Category
    inverted: Category
    anyof: Category
    returned: Category
    protect: bool = False


@dataclass(frozen=True, slots=True)
class Regions:
    """What a scan found: parallel rows of starts, ends and categories, ascending."""

    starts: array[int]
    ends: array[int]
    categories: array[int]

    def all(self) -> Runs:
        """Every page found."""
        return Runs.ascending(self.starts, self.ends)

    def having(self, category: Category) -> Runs:
        """The pages found that are of `category`."""
        starts, ends = (
            compress(row, map(and_, self.categories, repeat(int(category)))) for row in (self.starts, self.ends)
        )
        return Runs.ascending(starts, ends)


class Scanner:
    """Runs PAGEMAP_SCAN into a buffer of its own; one per thread. Raises OSError where the kernel has no such call."""

    def __init__(self) -> None:
        self._vector = array("Q", bytes(_REGIONS * _WORDS * 8))

    def scan(self, pagemap: int, windows: Iterable[tuple[int, int]], query: ScanQuery) -> Regions:
        """The pages of `windows`, ascending disjoint runs of page-aligned addresses, that `query` asks for.

        A process that has ended has no pages. Raises OSError.
        """
        found = Regions(array("Q"), array("Q"), array("Q"))
        vector = self._vector
        for start, end in windows:
            position = start
            while position < end:
                count, walked = self._call(pagemap, position, end, query)
                words = count * _WORDS
                found.starts.extend(vector[0:words:_WORDS])
                found.ends.extend(vector[1:words:_WORDS])
                found.categories.extend(vector[2:words:_WORDS])
                if count < _REGIONS:
                    break
                # walk_end may lag behind what was reported when the last part of the walk ended by itself.
                position = max(walked, found.ends[-1])
        return found

    def present(self, pagemap: int, windows: Iterable[tuple[int, int]]) -> Runs:
        """The pages of `windows` that hold something to copy: there, or in swap, and not the zero page."""
        skipped = unreadable()
        query = ScanQuery(mask=skipped, inverted=skipped, anyof=HELD, returned=Category.WPALLOWED)
        return self.scan(pagemap, windows, query).all()

    def _call(self, pagemap: int, start: int, end: int, query: ScanQuery) -> tuple[int, int]:
        argument = bytearray(
            _ARGUMENT.pack(
                _ARGUMENT.size,
                _PROTECT if query.protect else 0,
                start,
                end,
                0,
                self._vector.buffer_info()[0],
                _REGIONS,
                0,
                query.inverted,
                query.mask,
                query.anyof,
                query.returned,
            )
        )
        count = fcntl.ioctl(pagemap, _SCAN, argument)
        return count, struct.unpack_from("=Q", argument, _WALK_END)[0]


def open_pagemap(pid: int) -> int:
    """A descriptor on the process's present address space, which it keeps meaning after an exec. Raises OSError."""
    return os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)


def is_alive(pagemap: int) -> bool:
    """Whether the address space still exists: neither exec nor exit has ended it."""
    return len(os.pread(pagemap, 8, 0)) == 8


@cache
def unreadable() -> Category:
    """The categories of pages that hold nothing to copy: the zero page and, where the kernel tells them, guards."""
    unknown = Category.PFNZERO | Category.GUARD
    return unknown if reports_guards() else Category.PFNZERO


@cache
def reports_guards() -> bool:
    """Whether this kernel tells which pages are guards (Linux 6.15)."""
    return _knows(Category.GUARD)


@cache
def has_scan() -> bool:
    """Whether this kernel has PAGEMAP_SCAN (Linux 6.7)."""
    return _knows(Category.PRESENT)


def _knows(category: Category) -> bool:
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        Scanner().scan(pagemap, [(0, PAGE)], ScanQuery(category, Category(0), Category(0), category))
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            return False
        raise
    finally:
        os.close(pagemap)
    return True


@dataclass(frozen=True, slots=True)
class Entries:
    """What the classic pagemap tells of a process."""

    present: Runs
    """Pages that hold something to copy: there, or in swap, and neither a file's nor the zero page, see `zero_frames`."""
    soft_dirty: Runs
    """Those of them written since `clear_refs`; all of them on a kernel without soft-dirty is not promised."""
    frames: tuple[tuple[int, bytes], ...]
    """The entries as they are, by the address of the first, ascending, where any page is present."""

    def replaced(self, before: Entries) -> Runs:
        """The present pages that are other frames than before, or of which nothing is known from before."""
        starts = [start for start, _ in before.frames]
        same: list[tuple[int, int]] = []
        for start, entries in self.frames:
            for at, others in before.frames[max(0, bisect_right(starts, start) - 1) :]:
                first, last = max(start, at), min(start + len(entries) // 8 * PAGE, at + len(others) // 8 * PAGE)
                if at > last:
                    break
                if first < last:
                    mine, theirs = (
                        row[(first - base) // PAGE * 8 : (last - base) // PAGE * 8]
                        for base, row in ((start, entries), (at, others))
                    )
                    same += _runs(_equal_frames(mine, theirs), first)
        return self.present - Runs(same)


def read_entries(pagemap: int, areas: Iterable[tuple[int, int]]) -> Entries:
    """Read the eight-byte entries of every page in `areas`, disjoint runs of page-aligned addresses.

    Unlike a scan this costs time and eight bytes for every page asked for, mapped or not: between a heap and a stack lie
    terabytes that are not. Without root the zero page counts as present: its frame number is hidden. Raises OSError.
    """
    present: list[tuple[int, int]] = []
    dirty: list[tuple[int, int]] = []
    frames: list[tuple[int, bytes]] = []
    zeroes = zero_frames()
    for start, end in areas:
        for position in range(start, end, _PAGES_AT_ONCE * PAGE):
            pages = (min(end, position + _PAGES_AT_ONCE * PAGE) - position) // PAGE
            entries = os.pread(pagemap, pages * 8, position // PAGE * 8)
            there, written = decode_entries(entries, zeroes)
            if found := _runs(there, position):
                present += found
                dirty += _runs(written, position)
                frames.append((position, entries))
    return Entries(Runs(present), Runs(dirty), tuple(frames))


def decode_entries(entries: bytes, zeroes: ZeroFrames) -> tuple[bytes, bytes]:
    """For every page one byte, 0 or 1: whether it is present, and whether it is present and soft-dirty."""
    tops = entries[7::8]
    there = tops.translate(_TOP_BITS_TO_PRESENT)
    if not any(there):
        return there, there
    swapped = int.from_bytes(tops.translate(_TOP_BITS_TO_SWAPPED), "little")  # these have no frame
    held = int.from_bytes(there, "little") & (swapped | zeroes.others(entries))
    dirty = held & int.from_bytes(entries[6::8].translate(_BIT_55_TO_DIRTY), "little")
    return held.to_bytes(len(there), "little"), dirty.to_bytes(len(there), "little")


def _equal_frames(entries: bytes, others: bytes) -> bytes:
    """For every page one byte, 0 or 1: whether it is in the same frame (or place in swap) in either."""
    frames = int.from_bytes((b"\xff" * 6 + b"\0\0") * (len(entries) // 8), "little")
    differing = (int.from_bytes(entries, "little") ^ int.from_bytes(others, "little")) & frames
    if not differing:
        return b"\1" * (len(entries) // 8)
    columns = differing.to_bytes(len(entries), "little")
    differs = 0
    for at in range(6):
        differs |= int.from_bytes(columns[at::8].translate(_ANY_BIT), "little")
    return differs.to_bytes(len(entries) // 8, "little").translate(_NO_BIT)


def _runs(flags: bytes, base: int) -> list[tuple[int, int]]:
    return [(base + match.start() * PAGE, base + match.end() * PAGE) for match in _ONES.finditer(flags)]
