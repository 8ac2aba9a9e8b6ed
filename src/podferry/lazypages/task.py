"""One task that is being fed: what it lacks, where that belongs, and how the kernel answers when it is put there."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from podferry.errors import Bug, Failed
from podferry.lazypages.address_space import AddressSpace
from podferry.lazypages.copying import LARGEST_READ, Copy
from podferry.lazypages.page_source import Frame, PageSource, Word
from podferry.memory.kernel import uffd
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.store.runs import Run

AROUND = 16
"""Pages put in place for one fault, if they are missing: 64 KiB."""
SMALLEST_STEP, LARGEST_STEP = 16, LARGEST_READ // PAGE
"""Pages of one step of filling: from 64 KiB right after a fault to 256 KiB when it is quiet. Larger ones are no faster, and
a fault waits for the step that it finds under way."""


class FaultAnswer(Enum):
    """What became of an attempt to put pages in place."""

    DONE = "done"
    BUSY = "busy"
    """The address space is changing: try again, after reading its events."""
    FULL = "full"
    """No memory, most likely in the task's cgroup: try again later."""
    ABSENT = "absent"
    """The store has not got the page yet."""
    GONE = "gone"
    """The address space is no more."""


@dataclass
class Counts:
    """What was done, over all tasks. `unplaced` pages had no place though nothing was reported to have taken it."""

    fed: int = 0
    faults: int = 0
    unplaced: int = 0


@dataclass
class FedTask:
    """An address space with a userfaultfd, fed from `copy`.

    `missing[n]` is 1 while page n has yet to reach its place, `left` counts these. `forked` tasks came out of a fork while
    we were feeding. `faults` holds the addresses that threads wait for and that could not be answered yet.
    """

    pid: int
    fd: int
    address_space: AddressSpace
    copy: Copy
    source: PageSource
    counts: Counts
    missing: bytearray
    forked: bool = False
    gone: bool = False
    left: int = 0
    faults: list[int] = field(default_factory=list)
    _absent: list[int] = field(default_factory=list)
    _queue: deque[Iterator[tuple[int, int]]] = field(default_factory=deque)
    _range: tuple[int, int] = (0, 0)
    _step: int = SMALLEST_STEP

    def __post_init__(self) -> None:
        self.left = self.missing.count(1)
        self.copy.sharers.append(self)
        self._queue.append(iter([(0, self.copy.index.count)]))

    def prefer(self, ranges: Iterator[tuple[int, int]]) -> None:
        """Fill these ranges of page numbers before all others."""
        self._queue.appendleft(iter([self._range]))
        self._queue.appendleft(ranges)
        self._range = (0, 0)

    def receive(self, frame: Frame) -> None:
        """Take in what the agent says: pages that have come are put in place next, pages that are zero are not missing."""
        for first, last in list(self.copy.index.numbers(frame.start, frame.end)):
            if frame.word is Word.ARRIVED:
                self.prefer(iter([(first, last)]))
            else:
                for start, end in self.copy.lacking(first, last):
                    self._settle(start, end)
        self.faults, self._absent = self.faults + self._absent, []

    # --- events ------------------------------------------------------------------------------------------------------

    def follow(self, message: uffd.Message) -> FedTask | None:
        """Take in a change of the address space; returns the child of a fork."""
        match message:
            case uffd.Unmap(start, end):
                self._forgive(self.address_space.unmap(start, end))
            case uffd.Remove(start, end):
                self._forgive(self.address_space.origins(start, end))
            case uffd.Remap():
                self.address_space.remap(message)
            case uffd.Fork(fd):
                return self._fork(fd)
            case uffd.PageFault(address):
                self.counts.faults += 1
                self._step = SMALLEST_STEP
                self.faults.append(address & -PAGE)
        return None

    def settle(self) -> bool:
        """Whether no change of the address space is under way. Carries out what waited for that."""
        if uffd.changing(self.fd):
            return False
        if self.address_space.unsettled():
            self._forgive(self.address_space.settle())
        return True

    def _fork(self, fd: int) -> FedTask:
        address_space, lost = self.address_space.fork()
        child = FedTask(self.pid, fd, address_space, self.copy, self.source, self.counts, self.missing[:], forked=True)
        child._forgive(lost)
        return child

    def _forgive(self, origins: list[Run]) -> None:
        """The task no longer wants the pages of these origins."""
        for run in origins:
            for first, last in self.copy.index.numbers(run.start, run.end):
                self._settle(first, last)

    def _settle(self, first: int, last: int) -> None:
        self.left -= self.missing.count(1, first, last)
        self.missing[first:last] = bytes(last - first)
        self.copy.release(first, last)

    # --- putting pages in place --------------------------------------------------------------------------------------

    def answer(self) -> FaultAnswer:
        """Answer the faults that wait; those that cannot be answered yet stay."""
        worst, faults, self.faults = FaultAnswer.DONE, self.faults, []
        if self.address_space.unsettled() and not self.settle():
            self.faults = faults
            return FaultAnswer.BUSY
        for address in faults:
            answer = self._fault(address)
            if answer in (FaultAnswer.BUSY, FaultAnswer.FULL):
                self.faults.append(address)
            elif answer is FaultAnswer.ABSENT:
                self._absent.append(address)
            if answer not in (FaultAnswer.DONE, FaultAnswer.ABSENT):
                worst = answer
            if answer is FaultAnswer.GONE:
                break
        return worst

    def fill(self) -> FaultAnswer:
        """One step of filling. `DONE`: again; `ABSENT`: the rest is not in the store yet, or nothing is left."""
        if self.address_space.unsettled() and not self.settle():
            return FaultAnswer.BUSY
        number = self._next()
        if number is None:
            return FaultAnswer.ABSENT
        answer = self._feed(number, self._step)
        if answer is FaultAnswer.DONE:
            self._step = min(self._step + SMALLEST_STEP, LARGEST_STEP)
        return answer

    @property
    def has_all(self) -> bool:
        """Whether the task has all its pages, and nobody in it waits for us."""
        return not self.left and not self.faults

    def finished(self) -> bool:
        """Whether it has all, or is no more, and no change is under way: its userfaultfd can be closed."""
        return self.gone or (self.has_all and self.settle())

    def close(self) -> None:
        """Let the address space go; from now on the kernel answers its faults. What only it wanted is freed."""
        os.close(self.fd)
        self.copy.sharers.remove(self)
        if len(self.copy.sharers) <= 1:  # not for every short-lived child: it looks at the whole copy
            self.copy.release_all()

    def _fault(self, address: int) -> FaultAnswer:
        origin = self.address_space.origin(address)
        if origin is not None:
            number = self.copy.index.number(origin)
            if self.missing[number]:
                if not self.copy.held[number]:
                    self.source.want(self.copy.address_space, origin)
                    return FaultAnswer.ABSENT
                return self._feed(number, AROUND)
        return self._outcome(uffd.zeropage(self.fd, address, PAGE).error, address)

    def _next(self) -> int | None:
        """The next page to fill: missing, held, in the order of the queue."""
        while True:
            first, last = self._range
            while first < last:
                first = self.missing.find(1, first, last)
                if first < 0:
                    break
                if self.copy.held[first]:
                    self._range = (first, last)
                    return first
                first = self.copy.held.find(1, first, last)
                if first < 0:
                    break
            if not self._queue:
                self._range = (0, 0)
                return None
            following = next(self._queue[0], None)
            if following is None:
                self._queue.popleft()
            else:
                self._range = following

    def _feed(self, number: int, most: int) -> FaultAnswer:
        """Put up to `most` missing pages in place, from `number` on."""
        last = min(number + most, self.copy.index.count)
        for state in (self.missing, self.copy.held):
            stop = state.find(0, number, last)
            last = stop if stop >= 0 else last
        origin, room = self.copy.index.place(number)
        target = self.address_space.target(origin, min(last - number, room) * PAGE)
        if target is None or target.start != origin:
            raise Bug(f"the page {origin:#x} is missing in the process {self.pid} but has no place there")
        source, length = self.copy.read(origin, target.end - origin)
        while True:
            done, error = uffd.copy(self.fd, target.value, source, length)
            if done:
                self.counts.fed += done
                self._settle(number, number + done // PAGE)
                return FaultAnswer.DONE
            if error != errno.ENOENT or length == PAGE:
                break
            length = length // PAGE // 2 * PAGE  # it may reach over the end of one area into another
        if error == errno.ENOENT and uffd.changing(self.fd):
            return FaultAnswer.BUSY  # the kernel looks for the area before it looks for changes under way
        if error in (errno.EEXIST, errno.ENOENT):
            self.counts.unplaced += error == errno.ENOENT and not self.forked
            self._settle(number, number + 1)
        return self._outcome(error, target.value)

    def _outcome(self, error: int, address: int) -> FaultAnswer:
        match error:
            case 0:
                return FaultAnswer.DONE
            case (
                errno.EEXIST | errno.ENOENT
            ):  # it is there, or nobody feeds that place: let whoever waits see for itself
                uffd.wake(self.fd, address, PAGE)
                return FaultAnswer.DONE
            case (
                errno.EAGAIN
            ):  # a fork, mremap or munmap is under way, whose event must be read first (ioctl_userfaultfd(2))
                return FaultAnswer.BUSY
            case errno.ENOMEM:  # the job's cgroup, or the node, is out of memory
                return FaultAnswer.FULL
            case (
                errno.ESRCH | errno.ENOSPC
            ):  # the process has exited; before Linux 4.13 the kernel said ENOSPC for that
                self.gone = True
                return FaultAnswer.GONE
        raise Failed(f"the kernel refuses a page for the process {self.pid} at {address:#x}", why=os.strerror(error))
