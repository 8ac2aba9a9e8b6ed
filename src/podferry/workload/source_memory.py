"""The memory of a running container on the source: what the tracker finds dirty, what was read of it, what is left for later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from podferry.criu.skipped_pages import worth_skipping
from podferry.engine.ports import DirtySet, OriginalGone
from podferry.errors import Bug
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.kernel.reader import Data, Reader
from podferry.memory.ranges import EMPTY, Growing, Runs
from podferry.memory.tracking.tracker import DirtyScan, Tracker
from podferry.node.pid_namespace import number_inside
from podferry.wire.batch import PageBatch
from podferry.wire.frames import MAX_DROPS, Drop, Pages
from podferry.wire.messages import AddressSpaceSum
from podferry.workload.numbers import address_space_of, container_of_address_space


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
        self.address_spaces: dict[int, int] = {}
        """The spaces of the processes that live, by pid."""
        self.skippable: dict[int, bool] = {}
        """Whether it pays to have the dump skip a process's memory, by pid."""

    def found(self, seen: DirtyScan) -> DirtySet:
        """What the tracker saw: what is to be sent, and what the target must forget."""
        dropped: dict[int, Runs] = {}
        for pid in seen.gone:
            if (address_space := self.address_spaces.pop(pid, None)) is not None:
                dropped[address_space] = self._sent.get(address_space, EMPTY)
                self._close_reader(address_space)
        written: dict[int, Runs] = {}
        for pid, found in seen.address_spaces.items():
            try:
                address_space = self.address_spaces[pid] = self.address_spaces.get(pid) or address_space_of(
                    self._number, number_inside(pid)
                )
            except OSError:  # it came and went around the scan: nobody has heard of it
                continue
            self._pids[address_space] = pid
            if found.fresh:
                self._close_reader(address_space)
                self.skippable[pid] = worth_skipping(found.written)
            written[address_space] = found.written
            dropped[address_space] = dropped.get(address_space, EMPTY) | found.dropped
        return DirtySet(written, dropped)

    def _close_reader(self, address_space: int) -> None:
        if (reader := self._readers.pop(address_space, None)) is not None:
            reader.close()

    def _own(self, address_spaces: Mapping[int, Runs]) -> Iterator[tuple[int, Runs]]:
        return (
            (address_space, runs)
            for address_space, runs in address_spaces.items()
            if container_of_address_space(address_space)[0] == self._number
        )

    def read(self, dirty: DirtySet, round: int) -> Iterator[Pages | Drop]:
        """Read what `change` lists of this container, as frames of up to a megabyte. Send each before the next is taken."""
        for address_space, dropped in self._own(dirty.dropped):
            yield from self._forget(address_space, dropped)
        for address_space, written in self._own(dirty.written):
            yield from self._read_address_space(address_space, written, round)

    def leave(self, dirty: DirtySet) -> Iterator[Drop]:
        """Post-copy: leave what `change` lists of this container for later. The frames make the target forget what it has of it.
        Raises `OriginalGone`."""
        dropped, written = dict(self._own(dirty.dropped)), dict(self._own(dirty.written))
        for address_space in {**dropped, **written}:
            yield from self._forget(
                address_space, dropped.get(address_space, EMPTY) | written.get(address_space, EMPTY)
            )
        if not self._pids:
            raise OriginalGone("the frozen original has ended")
        living = set(self.address_spaces.values())  # nobody will ask for what a process wrote that has exited since
        self._left = Left(
            self._pids, {address_space: runs for address_space, runs in written.items() if address_space in living}
        )

    @property
    def left(self) -> Left:
        """What `leave` left."""
        if self._left is None:
            raise Bug("nothing was left for later")
        return self._left

    def _read_address_space(self, address_space: int, written: Runs, round: int) -> Iterator[Pages | Drop]:
        """Pages that hold only zeros are dropped instead: absent pages of a complete space are zero."""
        batch = PageBatch(address_space, round)
        sent, void = Growing(), Growing()
        try:
            reader = self._readers[address_space] = self._readers.get(address_space) or Reader(
                self._pids[address_space]
            )
        except OSError:
            return
        for piece in reader.read(written):
            if isinstance(piece, Data):
                sent.add(piece.address, piece.address + len(piece.memory))
                yield from batch.add(piece.address, piece.memory)
            else:
                void.add(piece.start, piece.end)
        yield from batch.flush()
        self._sent[address_space] = self._sent.get(address_space, EMPTY) | sent.runs()
        yield from self._forget(address_space, void.runs())

    def _forget(self, address_space: int, runs: Runs) -> Iterator[Drop]:
        known = self._sent.get(address_space, EMPTY)
        void = known & runs
        self._sent[address_space] = known - runs
        listed = iter(void)
        while some := tuple(islice(listed, MAX_DROPS)):
            yield Drop(address_space, some)

    def totals(self) -> tuple[AddressSpaceSum, ...]:
        """The number of pages of each address space that the target must hold by now."""
        return tuple(
            AddressSpaceSum(address_space, runs.size // PAGE) for address_space, runs in sorted(self._sent.items())
        )

    def close(self) -> None:
        """Let go of descriptors."""
        self.tracker.close()
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
