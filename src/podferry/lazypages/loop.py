"""The lazy-pages daemon's loop: events first, then faults, then a step of filling.

Before the restore has finished only faults are served: until then CRIU is still moving areas to their places and registering
them, so a page put in place unasked could land beside the area it belongs to (CRIU, commit 879764563, for the same
reason). Afterwards tasks that were restored are filled in the order they came in, then those forked meanwhile: many of these
exec or end before their turn comes.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from podferry.criu.dump_images import anonymous_areas, lazy_pages
from podferry.errors import Failed
from podferry.lazypages.address_space import AddressSpace
from podferry.lazypages.copying import Copy
from podferry.lazypages.criu_socket import CriuSocket, Restored
from podferry.lazypages.daemon_status import DaemonState, StatusFile
from podferry.lazypages.descriptor_holder import DescriptorHolder
from podferry.lazypages.page_source import Frame, PageSource, Word
from podferry.lazypages.task import Counts, FaultAnswer, FedTask
from podferry.memory.kernel import uffd
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.store.page_store import PageStore

_SPINS = 50
"""Tries at once after EAGAIN: the thread that changes its address space goes on within microseconds, and the kernel has
no event for that moment."""
_PAUSE = 0.001


class Loop:
    """Feeds all tasks of one restore. `run` returns when every task has every page."""

    def __init__(
        self,
        criu: CriuSocket,
        images: Path,
        store: Callable[[], PageStore],
        source: PageSource,
        holder: DescriptorHolder,
        report: StatusFile,
    ) -> None:
        """`store` opens the page store; it is called when CRIU connects, for only then the store is whole."""
        self._criu, self._images, self._open_store, self._source, self._report = criu, images, store, source, report
        self._holder = holder
        self._store: PageStore | None = None
        self._copies: dict[int, Copy] = {}
        self._tasks: dict[int, FedTask] = {}
        self._counts = Counts()
        self._filling = False
        self._stuck = 0
        self._more = False
        self._looked = time.monotonic()
        self._poll = select.epoll()
        self._poll.register(criu.fileno(), select.EPOLLIN)
        if (fd := source.fileno()) is not None:
            self._poll.register(fd, select.EPOLLIN)

    @property
    def holds_memory(self) -> bool:
        """Whether running tasks would lose pages if their descriptors were closed now."""
        return self._filling and bool(self._tasks)

    def give_up(self) -> bool:
        """Feed no more. Returns whether the descriptors must stay open, since the tasks run or are about to.

        While CRIU restores they need not: it finds its socket closed and gives up before the tasks run.
        """
        if not self._filling:
            self._filling = self._criu.refuse()
        return self.holds_memory

    def run(self) -> None:
        """Listen, feed, return when done. Raises `PodferryError`; the tasks' descriptors then stay open."""
        while not self._filling or self._tasks:
            answers = self._listen()
            if self._filling:
                answers += self._fill()
                answers += self._part()
            self._note(answers)
            self._write_status()
        self._source.close()
        if self._counts.unplaced:
            raise Failed(
                f"{self._counts.unplaced} pages had no place in the restored address space",
                why="an area that CRIU's images name was not there, or not registered",
            )

    # --- what comes in -----------------------------------------------------------------------------------------------

    def _listen(self) -> list[FaultAnswer]:
        """Wait for something to do, take in all events, and answer the faults."""
        timeout = self._patience()
        before = self._looked
        ready = {fd for fd, _ in self._poll.poll(timeout)}
        self._looked = time.monotonic()
        for fd in ready & self._tasks.keys():
            self._read(self._tasks[fd])
        for frame in self._source.news() if self._source.fileno() in ready else ():
            self._receive_from_agent(frame)
        answers = self._answer(before if timeout == 0 else self._looked)
        if self._criu.fileno() in ready:
            self._receive_from_criu()
        return answers

    def _patience(self) -> float | None:
        """Seconds to wait for an event; None for as long as it takes."""
        if self._stuck > _SPINS:
            return _PAUSE
        return 0 if self._stuck or self._more else None

    def _read(self, task: FedTask) -> None:
        for message in uffd.read(task.fd):
            child = task.follow(message)
            if child:
                self._add(child)

    def _receive_from_criu(self) -> None:
        if not self._criu.connected:
            self._poll.unregister(self._criu.fileno())
            self._criu.accept()
            self._poll.register(self._criu.fileno(), select.EPOLLIN)
            self._store = self._open_store()
            self._report.enter(DaemonState.RESTORING)
            return
        for event in self._criu.events():
            if isinstance(event, Restored):
                self._welcome(event)
            else:
                self._poll.unregister(self._criu.fileno())
                self._criu.close()
                self._begin_filling()

    def _welcome(self, restored: Restored) -> None:
        assert self._store is not None
        pid = restored.pid
        if pid in self._copies:
            raise Failed(f"CRIU restored the process {pid} twice")
        pages = lazy_pages(self._images, pid)
        copy = self._copies[pid] = Copy(self._store, pid, pages)
        if not self._source.endless and not self._store.is_complete(pid) and 0 in copy.held:
            raise Failed(
                f"the page store lacks pages of the process {pid}",
                why="the source did not confirm that it had sent them all",
            )
        missing = bytearray(b"\1" * copy.index.count) if self._source.endless else copy.held[:]
        address_space = AddressSpace(pages, anonymous_areas(self._images, pid))
        self._add(FedTask(pid, restored.uffd, address_space, copy, self._source, self._counts, missing))

    def _add(self, task: FedTask) -> None:
        self._holder.hold(task.fd)
        self._tasks[task.fd] = task
        self._poll.register(task.fd, select.EPOLLIN)

    def _receive_from_agent(self, frame: Frame) -> None:
        copy = self._copies.get(frame.address_space)
        if copy is None:
            return
        if frame.word is Word.ARRIVED:
            copy.hold(frame.start, frame.end)
        for task in self._tasks.values():
            if task.copy is copy:
                task.receive(frame)
        copy.release_between(frame.start, frame.end)

    # --- what goes out -----------------------------------------------------------------------------------------------

    def _answer(self, since: float) -> list[FaultAnswer]:
        answers = [task.answer() for task in self._tasks.values() if task.faults]
        if answers:
            slowest = (time.monotonic() - since) * 1e3
            self._report.status.slowest_ms = max(self._report.status.slowest_ms, slowest)
        return answers

    def _begin_filling(self) -> None:
        self._filling = True
        for task in self._tasks.values():
            if not task.forked:
                task.prefer(self._last_written(task.copy))
        self._report.status.resumed_ns = time.monotonic_ns()
        self._report.enter(DaemonState.FILLING)

    def _last_written(self, copy: Copy) -> Iterator[tuple[int, int]]:
        """The pages written after the first round, the last first: what the job is about to use again."""
        assert self._store is not None
        first = self._store.first_round(copy.address_space)
        for run in self._store.newest_first(copy.address_space):
            if run.value > first:
                yield from copy.index.numbers(run.start, run.end)

    def _fill(self) -> list[FaultAnswer]:
        """One step, for the first task that can be filled."""
        answers = []
        for task in self._tasks.values():
            answers.append(task.fill())
            if answers[-1] is FaultAnswer.DONE:
                break
        self._more = FaultAnswer.DONE in answers
        return answers

    def _note(self, answers: list[FaultAnswer]) -> None:
        """Remember whether something must be tried again although no event will say when: all answers of a turn count, since a
        fault may have to wait where nothing is left to be filled."""
        if FaultAnswer.BUSY in answers or FaultAnswer.FULL in answers:
            self._stuck += 1
            self._report.status.waiting = (
                "no memory for the tasks" if FaultAnswer.FULL in answers else "an address space is changing"
            )
        else:
            self._stuck = 0
            self._report.status.waiting = ""

    def _part(self) -> list[FaultAnswer]:
        """Let go of the tasks that have everything; `BUSY` for each that has it and is changing right now."""
        changing = []
        for task in list(self._tasks.values()):
            if task.finished():
                del self._tasks[task.fd]
                self._poll.unregister(task.fd)
                self._holder.release(task.fd)
                task.close()
            elif task.has_all:
                changing.append(FaultAnswer.BUSY)
        return changing

    def _write_status(self) -> None:
        status = self._report.status
        status.tasks = len(self._tasks)
        status.bytes_fed, status.faults = self._counts.fed, self._counts.faults
        status.bytes_left = sum(task.left for task in self._tasks.values()) * PAGE
        self._report.tick()
