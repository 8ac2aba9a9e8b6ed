"""Completes the images of a memory-skipping dump (`podferry.criu.memory_skipping`).

In them CRIU found no memory in the processes that it skipped.

Which pages there are, is looked up while CRIU dumps everything else; the processes stand still. Which of these pages CRIU would
have declared lazy, and which written, is its own rule (`generate_vma_iovs` in criu/mem.c, `vma_entry_is_private` and
`vma_entry_can_be_lazy` in criu/include/vma.h, 4.1.1 and 4.2). What is lazy is fed on the target; the rest is read from the
process and goes into the pages image. There the pages of PE_PRESENT entries lie one behind the other, in the order of the
entries, so that image is written anew. What CRIU wrote itself (the vDSO) stays.

The rule has an exception that is not one: CRIU means to write the page in which a stack pointer is, but compares the offset
in the page where it should compare the page. It declares stacks lazy, and the restore bears it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from podferry.criu.dump_images import (
    PE_LAZY,
    PE_PRESENT,
    Mapped,
    PageMap,
    add_guards,
    dumped_areas,
    page_map,
)
from podferry.errors import Failed, PeerMisbehaved
from podferry.fs.replacing import replacement
from podferry.memory.kernel.guards import hides_guards
from podferry.memory.kernel.maps import KERNEL_AREAS, read_areas
from podferry.memory.kernel.pagemap import (
    HELD,
    Category,
    Scanner,
    ScanQuery,
    has_scan,
    is_alive,
    open_pagemap,
    read_entries,
    reports_guards,
)
from podferry.memory.ranges import EMPTY, Runs

_CHUNK = 1 << 20  # bytes
_PIECE_WORTH_SKIPPING = 1 << 17  # bytes
_FEW_PIECES = 1000  # some 5 ms


def possible() -> bool:
    """Whether the kernel tells all that must be known of a process whose memory CRIU does not look at."""
    return not hides_guards()


def worth_skipping(memory: Runs) -> bool:
    """Whether it is quicker to leave a process' memory where it is and to complete its page map.

    Looking at it and handing it to pipes takes CRIU 50 ms a GiB; to complete the map takes 5 us for each piece that lies alone
    (measured).
    """
    return len(memory) <= _FEW_PIECES or memory.size >= len(memory) * _PIECE_WORTH_SKIPPING


@dataclass(frozen=True)
class Population:
    """Which pages of its private areas the process `pid` holds, as CRIU would find them; and which addresses are guards."""

    pid: int
    held: Runs
    guards: Runs = EMPTY


def population(pid: int) -> Population:
    """Look it up, in some 3 ms a GiB. Raises `Failed` where the process has ended, and `OSError`."""
    areas = [(one.start, one.end) for one in read_areas(pid) if one.private and one.name not in KERNEL_AREAS]
    pagemap = open_pagemap(pid)
    try:
        if not has_scan():
            found = Population(pid, read_entries(pagemap, areas).present)
        else:
            told = Category.GUARD if reports_guards() else Category(0)
            skipped = Category.PFNZERO | Category.FILE
            regions = Scanner().scan(pagemap, areas, ScanQuery(skipped, skipped, HELD, told))
            guards = regions.having(told)
            found = Population(pid, regions.all() - guards, guards)
        if not is_alive(pagemap):
            raise Failed(f"the memory of process {pid} cannot be looked up", why="it has ended")
    finally:
        os.close(pagemap)
    return found


def complete(images: Path, populations: Mapping[int, Population], *, guards: bool) -> bool:
    """Make the images of a memory-skipping dump what they would be had CRIU looked at the memory of these processes, by
    their pids inside.

    `guards` says whether this CRIU saves guard pages (4.2). Returns whether it has left all of their memory where it is.
    Raises `Failed` where memory cannot be read, `PeerMisbehaved` for images that do not hold together, and `OSError`.
    """
    left = [_complete(images, inside, found, guards) for inside, found in populations.items()]
    return all(left)


class PageRun(NamedTuple):
    """Pages [start, end), their PE_ flags, and whether CRIU itself has written them."""

    start: int
    end: int
    flags: int
    done: bool


def settled(entries: Sequence[Mapped], lazy: Runs, rest: Runs) -> list[PageRun]:
    """The page map, in order: what CRIU wrote, the pages that may be fed, and `rest`."""
    written = Runs((start, end) for start, end, flags in entries if flags & PE_PRESENT)
    pieces = [PageRun(*entry, done=True) for entry in entries if entry.flags & PE_PRESENT]
    pieces += [PageRun(start, end, PE_LAZY, False) for start, end in lazy - written]
    pieces += [PageRun(start, end, PE_PRESENT, False) for start, end in rest - written]
    return sorted(pieces)


def _complete(images: Path, inside: int, found: Population, guards: bool) -> bool:
    if found.guards and not guards:
        raise Failed(
            f"process {inside} has guard pages", why="CRIU saves them from 4.2 on, and it had none before the migration"
        )
    before = page_map(images, inside)
    lazy, others = dumped_areas(images, inside)
    after = settled(before.entries, found.held & lazy, found.held & others)
    pages = images / f"pages-{before.pages_id}.img"
    memory = os.open(f"/proc/{found.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with pages.open("rb") as old, replacement(pages) as new:
            for piece in after:
                if piece.flags & PE_PRESENT:
                    new.writelines(_next_pages(old.fileno(), piece) if piece.done else _pages_at(memory, piece, inside))
    finally:
        os.close(memory)
    entries = [Mapped(piece.start, piece.end, piece.flags) for piece in after]
    (images / f"pagemap-{inside}.img").write_bytes(PageMap(before.pages_id, entries).encode())
    if found.guards:
        add_guards(images, inside, found.guards)
    return not any(entry.flags & PE_LAZY for entry in before.entries)


def _next_pages(file: int, piece: PageRun) -> Iterator[bytes]:
    """The next pages of a pages image."""
    left = piece.end - piece.start
    while left:
        data = os.read(file, min(left, _CHUNK))
        if not data:
            raise PeerMisbehaved("a pages image is shorter than its page map says")
        left -= len(data)
        yield data


def _pages_at(memory: int, piece: PageRun, inside: int) -> Iterator[bytes]:
    """The contents of a process' pages, from its /proc/PID/mem."""
    at = piece.start
    while at < piece.end:
        try:
            data = os.pread(memory, min(piece.end - at, _CHUNK), at)
        except OSError as error:
            raise Failed.because(f"page {at:#x} of process {inside} cannot be read", error) from error
        if not data:
            raise Failed(f"page {at:#x} of process {inside} cannot be read", why="it has no memory any more")
        at += len(data)
        yield data
