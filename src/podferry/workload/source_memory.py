"""The memory of a running container on the source: what the tracker finds dirty, what was read of it, what is left for later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from podferry.criu.skipped_pages import worth_sparing
from podferry.engine.ports import Change, OriginalGone
from podferry.errors import Bug
from podferry.memory.kernel.reader import Data, Reader
from podferry.memory.kernel.uffd import PAGE
from podferry.memory.ranges import EMPTY, Growing, Runs
from podferry.memory.tracking.tracker import DirtyScan, Tracker
from podferry.wire.batch import PageBatch
from podferry.wire.frames import MAX_DROPS, Drop, Pages
from podferry.wire.messages import SpaceSum
from podferry.workload.numbers import container_of_space, space_of


@dataclass(frozen=True)
class Left:
    """What was left for after the switchover, by space, and the processes that have it."""

    pids: Mapping[int, int]
    runs: Mapping[int, Runs]


class SourceMemory:
    """The memory of container `number`, seen by `tracker`."""

    def __init__(self, number: int, tracker: Tracker) -> None:
        self._number, self.tracker = number, tracker
        self._readers: dict[int, Reader] = {}
        self._pids: dict[int, int] = {}
        self._sent: dict[int, Runs] = {}
        self._left: Left | None = None
        self.spaces: dict[int, int] = {}
        """The spaces of the processes that live, by pid."""
        self.skippable: dict[int, bool] = {}
        """Whether it pays to have the dump skip a process's memory, by pid."""

    def found(self, seen: DirtyScan) -> Change:
        """What the tracker saw: what is to be sent, and what the target must forget."""
        dropped: dict[int, Runs] = {}
        for pid in seen.gone:
            if (space := self.spaces.pop(pid, None)) is not None:
                dropped[space] = self._sent.get(space, EMPTY)
                self._close_reader(space)
        written: dict[int, Runs] = {}
        for pid, found in seen.spaces.items():
            try:
                space = self.spaces[pid] = self.spaces.get(pid) or space_of(self._number, pid_inside(pid))
            except OSError:  # it came and went around the scan: nobody has heard of it
                continue
            self._pids[space] = pid
            if found.fresh:
                self._close_reader(space)
                self.skippable[pid] = worth_sparing(found.written)
            written[space] = found.written
            dropped[space] = dropped.get(space, EMPTY) | found.dropped
        return Change(written, dropped)

    def _close_reader(self, space: int) -> None:
        if (reader := self._readers.pop(space, None)) is not None:
            reader.close()

    def _own(self, spaces: Mapping[int, Runs]) -> Iterator[tuple[int, Runs]]:
        return ((space, runs) for space, runs in spaces.items() if container_of_space(space)[0] == self._number)

    def read(self, change: Change, round: int) -> Iterator[Pages | Drop]:
        """Read what `change` lists of this container, as frames of up to a megabyte. Send each before the next is taken."""
        for space, dropped in self._own(change.dropped):
            yield from self._forget(space, dropped)
        for space, written in self._own(change.written):
            yield from self._read_space(space, written, round)

    def leave(self, change: Change) -> Iterator[Drop]:
        """Post-copy: leave what `change` lists of this container for later. The frames make the target forget what it has of it.
        Raises `OriginalGone`."""
        dropped, written = dict(self._own(change.dropped)), dict(self._own(change.written))
        for space in {**dropped, **written}:
            yield from self._forget(space, dropped.get(space, EMPTY) | written.get(space, EMPTY))
        if not self._pids:
            raise OriginalGone("the frozen original has ended")
        living = set(self.spaces.values())  # nobody will ask for what a process wrote that has exited since
        self._left = Left(self._pids, {space: runs for space, runs in written.items() if space in living})

    @property
    def left(self) -> Left:
        """What `leave` left."""
        if self._left is None:
            raise Bug("nothing was left for later")
        return self._left

    def _read_space(self, space: int, written: Runs, round: int) -> Iterator[Pages | Drop]:
        """Pages that hold only zeros are dropped instead: absent pages of a complete space are zero."""
        batch = PageBatch(space, round)
        sent, void = Growing(), Growing()
        try:
            reader = self._readers[space] = self._readers.get(space) or Reader(self._pids[space])
        except OSError:
            return
        for piece in reader.read(written):
            if isinstance(piece, Data):
                sent.add(piece.address, piece.address + len(piece.memory))
                yield from batch.add(piece.address, piece.memory)
            else:
                void.add(piece.start, piece.end)
        yield from batch.flush()
        self._sent[space] = self._sent.get(space, EMPTY) | sent.runs()
        yield from self._forget(space, void.runs())

    def _forget(self, space: int, runs: Runs) -> Iterator[Drop]:
        known = self._sent.get(space, EMPTY)
        void = known & runs
        self._sent[space] = known - runs
        listed = iter(void)
        while some := tuple(islice(listed, MAX_DROPS)):
            yield Drop(space, some)

    def totals(self) -> tuple[SpaceSum, ...]:
        """How many pages of each space the target must hold by now."""
        return tuple(SpaceSum(space, runs.size // PAGE) for space, runs in sorted(self._sent.items()))

    def close(self) -> None:
        """Let go of descriptors."""
        self.tracker.close()
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()


def pid_inside(pid: int) -> int:
    """The pid that a process has in its own pid namespace, by which CRIU's images name it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nNSpid:")[2].split("\n", 1)[0].split()[-1])
