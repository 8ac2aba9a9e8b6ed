"""Post-copy on the source: the memory that the target has not got yet, read from the frozen original when it is wanted.

What the job waits for goes first; the rest is pushed in the background. A page is given once for the asking and once by the push at
most: the target takes the first and ignores the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from podferry.engine.ports import OriginalGone
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.kernel.reader import Data, Gone, Reader
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
        """The number of bytes still to be pushed."""
        given = sum((self._given.get(address_space, EMPTY) & runs).size for address_space, runs in self._runs.items())
        return sum(runs.size for runs in self._runs.values()) - given

    def answer(self, address_space: int, address: int) -> Iterator[Pages | Drop]:
        """The frames that answer for the page at `address` of `address_space`, and for the remote pages around it."""
        page, remote_pages = Runs.of(address, address + PAGE), self._runs.get(address_space, EMPTY)
        if address_space not in self._pids or not remote_pages & page:
            yield Drop(address_space, tuple(page))
            return
        start = address // WINDOW * WINDOW
        near = remote_pages.clip(start, start + WINDOW) - self._given.get(address_space, EMPTY)
        if not near & page:
            return  # it is on its way already, and may be overtaken by nothing that says otherwise
        reader = self._asking[address_space] = self._asking.get(address_space) or self._reader(address_space)
        yield from self._read(reader, address_space, near)

    def rest(self) -> Iterator[Pages | Drop]:
        """All that is still remote, in frames that are short enough for a wanted page to get between them."""
        for address_space, runs in self._runs.items():
            with self._reader(address_space) as reader:
                for start, end in runs.pieces(PUSH):
                    if left := Runs.of(start, end) - self._given.get(address_space, EMPTY):
                        yield from self._read(reader, address_space, left)

    def start_over(self) -> None:
        """Count all pages handed out as remote again, since it is unknown which of them arrived."""
        self._given.clear()

    def close(self) -> None:
        """Let go of the processes."""
        for reader in self._asking.values():
            reader.close()
        self._asking.clear()

    def _reader(self, address_space: int) -> Reader:
        try:
            return Reader(self._pids[address_space], piece=PUSH)
        except OSError as error:
            raise OriginalGone.because("the frozen original has ended", error) from error

    def _read(self, reader: Reader, address_space: int, runs: Runs) -> Iterator[Pages | Drop]:
        """What cannot be read was unmapped before the freeze, and reads as zeros, unless the process has ended."""
        batch, void = PageBatch(address_space, ROUND), []
        self._given[address_space] = self._given.get(address_space, EMPTY) | runs
        gone = False
        for piece in reader.read(runs):
            if isinstance(piece, Data):
                yield from batch.add(piece.address, piece.memory)
            else:
                gone = gone or isinstance(piece, Gone)
                void.append((piece.start, piece.end))
        yield from batch.flush()
        if gone and _has_no_memory(self._pids[address_space]):
            raise OriginalGone(
                "the frozen original has ended", why=f"process {self._pids[address_space]} has no memory any more"
            )
        for first in range(0, len(void), MAX_DROPS):
            yield Drop(address_space, tuple(void[first : first + MAX_DROPS]))


def _has_no_memory(pid: int) -> bool:
    """Whether a process has ended, be it reaped or not."""
    try:
        return not Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return True
