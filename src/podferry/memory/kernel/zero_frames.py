"""Which frames are the kernel's pages of zeroes: what a program only reads is mapped to them, and needs no copying.

PAGEMAP_SCAN tells such pages by itself. The classic page map shows frame numbers, to root, and here is found out which ones
they are: those of memory of our own that we only read. The huge zero page stays where it is while a process lives that has used
it (`mm_get_huge_zero_folio` in the kernel's mm/huge_memory.c).
"""

from __future__ import annotations

import mmap
import os
import struct
from contextlib import suppress
from ctypes import addressof, c_char
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from podferry.memory.kernel.page_size import PAGE

_HUGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_FRAME = (1 << 55) - 1  # of a pagemap entry, see Documentation/admin-guide/mm/pagemap.rst
_FRAME_BYTES = 6  # that are looked at: no machine has 2^48 frames


@dataclass(frozen=True, slots=True)
class ZeroFrames:
    """Frame numbers; 0 where there is no such page, or its number is hidden from us."""

    small: int = 0
    huge: int = 0
    """The first of the huge zero page's."""
    huge_pages: int = 1
    """How many those are, a power of two."""

    def others(self, entries: bytes) -> int:
        """As a little-endian number with one byte for each pagemap entry: 1 where its frame is none of these, else 0."""
        ones = int.from_bytes(b"\1" * (len(entries) // 8), "little")
        for first, count in ((self.small, 1), (self.huge, self.huge_pages)):
            if first:
                ones &= _others(entries, first, count, ones)
        return ones


def zero_frames() -> ZeroFrames:
    """Those of this kernel, as far as they are in use by now. Raises OSError."""
    huge = int(_HUGE_SIZE.read_text()) if _HUGE_SIZE.exists() else 0
    [small] = _probe(PAGE, PAGE).frames(0)
    if huge:
        first, last = _probe(2 * huge, huge).frames(0, huge - PAGE)
        if first and first % (huge // PAGE) == 0 and last == first + huge // PAGE - 1:
            return ZeroFrames(small, first, huge // PAGE)
    return ZeroFrames(small)


class _Probe:
    """Memory that is only ever read, `aligned` bytes of it at a multiple of that."""

    def __init__(self, size: int, aligned: int) -> None:
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = addressof(c_char.from_buffer(self._map))
        self._offset, self._size = -start % aligned, aligned
        self._address = start + self._offset
        with suppress(OSError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE if size > PAGE else mmap.MADV_NOHUGEPAGE, self._offset, aligned)

    def frames(self, *offsets: int) -> list[int]:
        """Read a byte at each of the offsets, and return in which frames they are."""
        self._map.madvise(mmap.MADV_DONTNEED, self._offset, self._size)
        found = []
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            for offset in offsets:
                assert self._map[self._offset + offset] == 0
                entry = os.pread(pagemap.fileno(), 8, (self._address + offset) // PAGE * 8)
                found.append(struct.unpack("=Q", entry)[0] & _FRAME)
        return found


_probe = cache(_Probe)


def _others(entries: bytes, first: int, count: int, ones: int) -> int:
    """1 where the frame is not one of `count` from `first` on, a multiple of it."""
    wanted = first.to_bytes(8, "little")
    kept = (_FRAME & ~(count - 1)).to_bytes(8, "little")  # the bits that all of them share
    if wanted[2:_FRAME_BYTES] not in entries:  # for speed: nothing near
        return ones
    differing = 0
    for at in range(_FRAME_BYTES):
        column = entries[at::8].translate(_differs(wanted[at], kept[at]))
        differing |= int.from_bytes(column, "little")
    return differing


@cache
def _differs(byte: int, kept: int) -> bytes:
    return bytes(int(other & kept != byte) for other in range(256))
