"""The store's copy of one restored task, as the lazy-pages daemon uses it: numbered pages, freed as they go.

A task and the processes it forks share one copy: a page's memory is freed when nobody who shares it still wants it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import Protocol

from podferry.errors import Bug
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.ranges import Runs
from podferry.memory.store.page_store import PageStore

LARGEST_READ = 256 << 10
"""Bytes. Few enough to stay in the CPU's cache between the read from the store and the copy into the task."""


class PageIndex:
    """Numbers the pages of a set of runs from 0 in order of address, so that one byte a page can say something of it."""

    def __init__(self, runs: Runs) -> None:
        self._starts = array("Q")
        self._firsts = array("Q")
        self.count = 0
        for start, end in runs:
            self._starts.append(start)
            self._firsts.append(self.count)
            self.count += (end - start) // PAGE
        self._firsts.append(self.count)

    def number(self, address: int) -> int:
        """The number of the page at `address`. Raises KeyError for an address outside the runs."""
        run = bisect_right(self._starts, address) - 1
        number = self._firsts[run] + (address - self._starts[run]) // PAGE if run >= 0 else -1
        if run < 0 or number >= self._firsts[run + 1]:
            raise KeyError(f"{address:#x} has no number")
        return number

    def place(self, number: int) -> tuple[int, int]:
        """The address of a page, and how many pages from it on lie side by side."""
        run = bisect_right(self._firsts, number) - 1
        return self._starts[run] + (number - self._firsts[run]) * PAGE, self._firsts[run + 1] - number

    def numbers(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The numbers that lie between two addresses, as half-open ranges."""
        run = max(0, bisect_right(self._starts, start) - 1)
        while run < len(self._starts) and self._starts[run] < end:
            offset = self._firsts[run] - self._starts[run] // PAGE
            first = max(start, self._starts[run]) // PAGE + offset
            last = min(end // PAGE + offset, self._firsts[run + 1])
            if first < last:
                yield first, last
            run += 1


class Sharer(Protocol):
    """Somebody fed from the copy; `missing[n]` is 1 while it wants page n."""

    missing: bytearray


class Copy:
    """The copy of one space. `held[n]` is 1 while the store has the bytes of page n."""

    def __init__(self, store: PageStore, address_space: int, pages: Runs) -> None:
        self.address_space = address_space
        self.index = PageIndex(pages)
        self.held = bytearray(self.index.count)
        self.sharers: list[Sharer] = []
        self._store = store
        buffer = mmap.mmap(-1, LARGEST_READ)
        self._view = memoryview(buffer)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        for start, end in store.present(address_space) & pages:
            self.hold(start, end)

    def hold(self, start: int, end: int) -> None:
        """The store has the pages between two addresses now."""
        for first, last in self.index.numbers(start, end):
            self.held[first:last] = b"\1" * (last - first)

    def lacking(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The ranges of page numbers between `first` and `last` that the store has not got."""
        while (first := self.held.find(0, first, last)) >= 0:
            stop = self.held.find(1, first, last)
            yield first, stop if stop >= 0 else last
            first = stop if stop >= 0 else last

    def read(self, origin: int, length: int) -> tuple[int, int]:
        """Bring bytes from the store to where the kernel can copy them from: their address in our memory, and how many.

        A buffer, not a mapping of the store: setting up and tearing down a mapping's page tables costs as much, and
        faults are not allowed where the kernel copies from.
        """
        count = os.preadv(self._store.fileno(self.address_space), [self._view[: min(length, LARGEST_READ)]], origin)
        if count < PAGE or count % PAGE:
            raise Bug(f"the page store ends before {origin + count:#x}, which it should hold")
        return self._address, count

    def release(self, first: int, last: int) -> None:
        """Free the pages of a range of numbers that nobody wants any more."""
        wanted = 0
        for sharer in self.sharers:
            wanted |= int.from_bytes(sharer.missing[first:last], "little")
        spare = (int.from_bytes(self.held[first:last], "little") & ~wanted).to_bytes(last - first, "little")
        at = spare.find(1)
        while at >= 0:
            origin, room = self.index.place(first + at)
            stop = spare.find(0, at)
            count = min(room, (stop if stop >= 0 else len(spare)) - at)
            self._store.punch(self.address_space, origin, origin + count * PAGE)
            self.held[first + at : first + at + count] = bytes(count)
            at = spare.find(1, at + count)

    def release_between(self, start: int, end: int) -> None:
        """Free the pages between two addresses that nobody wants."""
        for first, last in self.index.numbers(start, end):
            self.release(first, last)

    def release_all(self) -> None:
        """Free whatever nobody wants, all over the copy."""
        step = 1 << 16
        for first in range(0, self.index.count, step):
            self.release(first, min(first + step, self.index.count))
