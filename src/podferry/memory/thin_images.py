"""Completing the images of a thin dump: what CRIU said to be in a parent image (`podferry.node.thin`) is there nowhere.

CRIU marks pages PE_PARENT that it would else have declared lazy, or written. Which of the two is its own rule (`generate_iovs`
in criu/mem.c, `vma_entry_can_be_lazy` in criu/include/vma.h, 4.1.1 and 4.2). What is lazy is fed on the target; the rest is read
from the process, which CRIU holds, and goes into the pages image. There the pages of PE_PRESENT entries lie one behind the
other, in the order of the entries, so that image is written anew.

The rule has an exception that is not one: CRIU means to write the page in which a stack pointer is, but compares the offset
in the page where it should compare the page. It declares stacks lazy, and the restore bears it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from podferry.errors import Failed, PeerMisbehaved
from podferry.memory.criu_images import (
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    Mapped,
    PageMap,
    anonymous_areas,
    page_map,
    tasks,
)
from podferry.memory.ranges import Runs

PARENT = "parent"
"""The link to the parent image, which CRIU leaves in the images."""

_CHUNK = 1 << 20  # bytes
_PIECE_WORTH_SPARING = 1 << 19  # bytes


def worth_sparing(memory: Runs) -> bool:
    """Whether it is quicker to leave a process' memory where it is and to complete its page map.

    Handing it to pipes takes CRIU 35 ms a GiB; to complete the map takes 14 us for each piece that lies alone (measured).
    """
    return memory.size >= len(memory) * _PIECE_WORTH_SPARING


def is_thin(images: Path) -> bool:
    """Whether these images are those of a thin dump, and must be completed."""
    return (images / PARENT).is_symlink()


def complete(images: Path, pids: Mapping[int, int]) -> None:
    """Make the images of a thin dump what they would be without a parent; others stay as they are.

    `pids` has the pids here for those inside the container; the processes must stand still. Raises `Failed` where memory
    cannot be read, `PeerMisbehaved` for images that do not hold together, and `OSError`.
    """
    if not is_thin(images):
        return
    for inside in tasks(images):
        if (images / f"pagemap-{inside}.img").exists():
            _complete(images, inside, pids)
    (images / PARENT).unlink()


class Piece(NamedTuple):
    """Pages [start, end), their PE_ flags, and whether CRIU itself has dealt with them."""

    start: int
    end: int
    flags: int
    done: bool


def settled(entries: Sequence[Mapped], lazy: Runs) -> list[Piece]:
    """What the entries of a page map are without a parent, in order, where `lazy` may be fed."""
    holes = Runs((start, end) for start, end, flags in entries if flags & PE_PARENT)
    pieces = [Piece(*entry, done=True) for entry in entries if not entry.flags & PE_PARENT]
    pieces += [Piece(start, end, PE_LAZY, False) for start, end in holes & lazy]
    pieces += [Piece(start, end, PE_PRESENT, False) for start, end in holes - lazy]
    return sorted(pieces)


def _complete(images: Path, inside: int, pids: Mapping[int, int]) -> None:
    before = page_map(images, inside)
    if not any(entry.flags & PE_PARENT for entry in before.entries):
        return
    if inside not in pids:
        raise Failed(f"process {inside} was dumped, and its memory cannot be found", why="it is not in the container")
    after = settled(before.entries, anonymous_areas(images, inside).runs())
    pages = images / f"pages-{before.pages_id}.img"
    written = pages.with_suffix(".new")
    memory = os.open(f"/proc/{pids[inside]}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with pages.open("rb") as old, written.open("wb") as new:
            for piece in after:
                if piece.flags & PE_PRESENT:
                    new.writelines(_next_pages(old.fileno(), piece) if piece.done else _pages_at(memory, piece, inside))
    finally:
        os.close(memory)
    written.replace(pages)
    entries = [Mapped(piece.start, piece.end, piece.flags) for piece in after]
    (images / f"pagemap-{inside}.img").write_bytes(PageMap(before.pages_id, entries).encode())


def _next_pages(file: int, piece: Piece) -> Iterator[bytes]:
    """The next pages of a pages image."""
    left = piece.end - piece.start
    while left:
        data = os.read(file, min(left, _CHUNK))
        if not data:
            raise PeerMisbehaved("a pages image is shorter than its page map says")
        left -= len(data)
        yield data


def _pages_at(memory: int, piece: Piece, inside: int) -> Iterator[bytes]:
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
