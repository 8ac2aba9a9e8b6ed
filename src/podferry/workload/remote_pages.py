"""Post-copy on the source: the memory that the target has not got yet, read from the frozen original when it is wanted.

What the job waits for goes first; the rest is pushed in the background. A page is given once for the asking and once by the push at
most: the target takes the first and ignores the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from podferry.engine.ports import OriginalGone
from podferry.memory.kernel.reader import Data, Gone, Reader
from podferry.memory.kernel.uffd import PAGE
from podferry.memory.ranges import EMPTY, Runs
from podferry.wire.batch import PageBatch
from podferry.wire.frames import MAX_DROPS, Drop, Pages

WINDOW = 64 << 10
"""Bytes around a wanted page that go with it: what is read next is often near."""
PUSH = 256 << 10
"""Bytes in a pushed frame: as long as it is on its way, a wanted page waits."""
ROUND = 0


class FrozenPages:
    """`RemotePages`: the runs of memory `runs` of the frozen processes `pids`, both by space, of all containers of a workload."""

    def __init__(self, pids: Mapping[int, int], runs: Mapping[int, Runs]) -> None:
        self._pids, self._runs = dict(pids), dict(runs)
        self._given: dict[int, Runs] = {}
        self._asking: dict[int, Reader] = {}

    @property
    def bytes(self) -> int:
        """How much is still to be pushed."""
        given = sum((self._given.get(space, EMPTY) & runs).size for space, runs in self._runs.items())
        return sum(runs.size for runs in self._runs.values()) - given

    def wanted(self, space: int, address: int) -> Iterator[Pages | Drop]:
        """The frames that answer for the page at `address` of `space`, and for what is owed around it."""
        page, owed = Runs.of(address, address + PAGE), self._runs.get(space, EMPTY)
        if space not in self._pids or not owed & page:
            yield Drop(space, tuple(page))
            return
        start = address // WINDOW * WINDOW
        near = owed.clip(start, start + WINDOW) - self._given.get(space, EMPTY)
        if not near & page:
            return  # it is on its way already, and may be overtaken by nothing that says otherwise
        reader = self._asking[space] = self._asking.get(space) or self._reader(space)
        yield from self._read(reader, space, near)

    def rest(self) -> Iterator[Pages | Drop]:
        """All that is still owed, in frames that are short enough for a wanted page to get between them."""
        for space, runs in self._runs.items():
            with self._reader(space) as reader:
                for start, end in runs.pieces(PUSH):
                    if left := Runs.of(start, end) - self._given.get(space, EMPTY):
                        yield from self._read(reader, space, left)

    def start_over(self) -> None:
        """Nobody knows what arrived of what was given: all of it is owed again."""
        self._given.clear()

    def close(self) -> None:
        """Let go of the processes."""
        for reader in self._asking.values():
            reader.close()
        self._asking.clear()

    def _reader(self, space: int) -> Reader:
        try:
            return Reader(self._pids[space], piece=PUSH)
        except OSError as error:
            raise OriginalGone.because("the frozen original has ended", error) from error

    def _read(self, reader: Reader, space: int, runs: Runs) -> Iterator[Pages | Drop]:
        """What cannot be read was unmapped before the freeze, and reads as zeros, unless the process has ended."""
        batch, void = PageBatch(space, ROUND), []
        self._given[space] = self._given.get(space, EMPTY) | runs
        gone = False
        for piece in reader.read(runs):
            if isinstance(piece, Data):
                yield from batch.add(piece.address, piece.memory)
            else:
                gone = gone or isinstance(piece, Gone)
                void.append((piece.start, piece.end))
        yield from batch.flush()
        if gone and _has_no_memory(self._pids[space]):
            raise OriginalGone(
                "the frozen original has ended", why=f"process {self._pids[space]} has no memory any more"
            )
        for first in range(0, len(void), MAX_DROPS):
            yield Drop(space, tuple(void[first : first + MAX_DROPS]))


def _has_no_memory(pid: int) -> bool:
    """Whether a process has ended, be it reaped or not."""
    try:
        return not Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return True
