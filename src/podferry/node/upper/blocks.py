"""What is known of the content that the target has: one digest for each block of a large file.

When a file has changed, nothing but reading it can tell where: the source reads it, and sends only blocks whose digest differs
from the one of the last pass are sent. A log that grew by a line costs one block on the link.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

BLOCK = 128 * 1024
"""Bytes. Smaller blocks send less of a file that changed here and there and cost more digests: these take 0.012 %."""

DIGEST = 16
HOLE = bytes(DIGEST)
"""Stands for a block that is all hole, and for one past the end of the file."""

_LEAF = 1024  # blocks


class Blocks:
    """The digests of one file's blocks by index; a sparse file costs memory only where it has data."""

    def __init__(self) -> None:
        self._leaves: dict[int, bytearray] = {}

    def get(self, index: int) -> bytes:
        leaf = self._leaves.get(index // _LEAF)
        if leaf is None:
            return HOLE
        start = index % _LEAF * DIGEST
        return bytes(leaf[start : start + DIGEST]) or HOLE

    def put(self, index: int, digest: bytes) -> None:
        leaf = self._leaves.setdefault(index // _LEAF, bytearray())
        start = index % _LEAF * DIGEST
        if len(leaf) < start:
            leaf.extend(bytes(start - len(leaf)))
        leaf[start : start + DIGEST] = digest

    def with_data(self) -> Iterator[int]:
        """The indexes of the blocks that are not holes, in order."""
        for number in sorted(self._leaves):
            leaf = self._leaves[number]
            for start in range(0, len(leaf), DIGEST):
                if leaf[start : start + DIGEST] != HOLE:
                    yield number * _LEAF + start // DIGEST


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a file from `offset` on; never more than a block, never across the border of two."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Block:
    index: int
    pieces: list[Piece]
    digest: bytes


class Shrunk(Exception):
    """The file ended before the size that it had when it was opened."""


def read_blocks(fd: int, size: int, *, sparse: bool) -> Iterator[Block]:
    """The blocks of the first `size` bytes that hold data, in order; holes are left out if `sparse`.

    A block with holes in it comes in several pieces. Raises `Shrunk` and `OSError`.
    """
    index, pieces, hasher = -1, list[Piece](), xxhash.xxh3_128()
    for offset, end in _spans(fd, size) if sparse else _split(0, size):
        if offset // BLOCK != index:
            if pieces:
                yield Block(index, pieces, hasher.digest())
            index, pieces = offset // BLOCK, []
            hasher.reset()
        data = os.pread(fd, end - offset, offset)
        if len(data) < end - offset:
            raise Shrunk
        # Where the pieces lie is hashed as well: a block is equal only if its holes are, too.
        hasher.update(b"%d %d " % (offset % BLOCK, len(data)))
        hasher.update(data)
        pieces.append(Piece(offset, data))
    if pieces:
        yield Block(index, pieces, hasher.digest())


def _spans(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of the file that are not holes, split at the borders of blocks (`lseek(2)`, SEEK_DATA)."""
    offset = 0
    while offset < size:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        end = os.lseek(fd, offset, os.SEEK_HOLE)
        yield from _split(offset, min(end, size))
        offset = end


def _split(offset: int, end: int) -> Iterator[tuple[int, int]]:
    while offset < end:
        border = min(end, offset - offset % BLOCK + BLOCK)
        yield offset, border
        offset = border
