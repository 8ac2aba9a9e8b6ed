"""Trackers against programs that do everything to their memory. Needs root and a kernel, no CRIU."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from podferry.memory.maps import PAGE, private_anonymous, read_areas
from podferry.memory.reader import Data, Gone, Reader, Zero
from podferry.memory.tracker import Kind, Round, Tracker, choose, create, probe

DRIVER = Path(__file__).with_name("trackers_driver.py")
FACTS = probe()
SEEDS = 300
MANY_SEEDS = 5000

pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
needs_uffd = pytest.mark.skipif(
    choose(FACTS).kind is not Kind.UFFD, reason=f"no uffd tracker here: {choose(FACTS).reason}"
)


class Job:
    """One driver process, and the line to it."""

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rw")
        self.pid = int(self._file.readline().split()[0])
        self._owed = 0

    def ask(self, line: str) -> None:
        """Give an order without waiting for the answer."""
        self._file.write(line + "\n")
        self._file.flush()
        self._owed += 1

    def answer(self) -> str:
        """Wait until all orders are done; the last answer."""
        last = ""
        while self._owed:
            last = self._file.readline().strip()
            assert last, f"job {self.pid} died"
            self._owed -= 1
        return last

    def do(self, expression: str) -> str:
        self.ask(f"do {expression}")
        return self.answer()


class Zoo:
    """Driver processes; the first is a warm one that others are forked from."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(512)
        self._program = subprocess.Popen([sys.executable, "-S", "-I", str(DRIVER), str(path)])
        self.mother = self.arrival()
        self.jobs: dict[int, Job] = {}

    def arrival(self) -> Job:
        sock, _ = self._listener.accept()
        return Job(sock)

    def fork(self, parent: Job | None = None) -> Job:
        parent = parent or self.mother
        parent.answer()
        parent.ask("fork")
        child = self.arrival()
        assert int(parent.answer()) == child.pid
        self.jobs[child.pid] = child
        return child

    def exec(self, job: Job) -> Job:
        job.answer()
        job.ask("exec")
        job.answer()
        self.jobs[job.pid] = self.arrival()
        assert job.pid in self.jobs
        return self.jobs[job.pid]

    def exit(self, job: Job) -> None:
        job.answer()
        job.ask("exit")
        del self.jobs[job.pid]

    def freeze(self) -> None:
        for job in self.jobs.values():
            job.answer()
            os.kill(job.pid, signal.SIGSTOP)
        for job in self.jobs.values():
            wait_for_state(job.pid, "T")

    def clear(self) -> None:
        for pid in self.jobs:
            os.kill(pid, signal.SIGKILL)
        self.jobs.clear()

    def close(self) -> None:
        self.clear()
        self._program.kill()
        self._program.wait()
        self._listener.close()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for_state(pid: int, state: str) -> None:
    while state_of(pid) != state:
        os.sched_yield()


class Copy:
    """What the other side would have: the pages reported so far, by process."""

    def __init__(self) -> None:
        self.pages: dict[int, dict[int, bytes]] = {}

    def apply(self, seen: Round) -> None:
        for pid in seen.gone:
            self.pages.pop(pid, None)
        for pid, space in seen.spaces.items():
            pages = self.pages.setdefault(pid, {})
            assert not space.written & space.dropped
            for page, _ in space.dropped.pieces(PAGE):
                del pages[page]  # a KeyError would be a page dropped that was never reported
            try:
                with Reader(pid) as reader:
                    for piece in reader.read(space.written):
                        match piece:
                            case Data(address, memory):
                                for offset in range(0, len(memory), PAGE):
                                    pages[address + offset] = memory[offset : offset + PAGE].tobytes()
                            case Zero(start, end) | Gone(start, end):
                                for page in range(start, end, PAGE):
                                    pages[page] = bytes(PAGE)
            except (FileNotFoundError, ProcessLookupError):
                continue

    def check(self, pid: int) -> None:
        """Compare with the memory of a process that stands still."""
        pages = dict(self.pages[pid])
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as mem:
            for area in private_anonymous(read_areas(pid)):
                for page in range(area.start, area.end, PAGE):
                    try:
                        truth = os.pread(mem.fileno(), PAGE, page)
                    except OSError:  # a guard
                        truth = bytes(PAGE)
                    assert pages.pop(page, bytes(PAGE)) == truth, f"{page:#x} of {area} differs"
        assert not pages, f"kept though not mapped: {[hex(page) for page in pages]}"


@pytest.fixture(scope="module")
def zoo() -> Iterator[Zoo]:
    with tempfile.TemporaryDirectory() as directory, contextlib.closing(Zoo(Path(directory) / "zoo")) as made:
        yield made


@pytest.fixture
def jobs(zoo: Zoo) -> Iterator[Zoo]:
    yield zoo
    zoo.clear()


@contextlib.contextmanager
def tracking(kind: Kind, pids: Callable[[], list[int]]) -> Iterator[Tracker]:
    with contextlib.closing(create(kind, pids)) as tracker:
        yield tracker


def live_through(zoo: Zoo, tracker: Tracker, seed: int) -> None:
    """A random life of up to four processes, looked at now and then, also while they are busy."""
    rng = random.Random(seed)
    zoo.fork()
    copy = Copy()
    for _ in range(rng.randint(2, 8)):
        for job in list(zoo.jobs.values()):
            job.ask(f"step {rng.randrange(1 << 30)} {rng.randint(1, 25)}")
        if rng.random() < 0.6:
            for job in zoo.jobs.values():
                job.answer()
        fate, job = rng.random(), rng.choice(list(zoo.jobs.values()))
        if fate < 0.2 and len(zoo.jobs) < 4:
            zoo.fork(job)
        elif fate < 0.27:
            zoo.exec(job)
        elif fate < 0.35 and len(zoo.jobs) > 1:
            zoo.exit(job)
        copy.apply(tracker.collect())
    for job in zoo.jobs.values():
        job.ask(f"step {rng.randrange(1 << 30)} {rng.randint(0, 10)}")
    zoo.freeze()
    last = tracker.final()
    copy.apply(last)
    assert set(copy.pages) == set(zoo.jobs)
    for pid in zoo.jobs:
        assert not last.spaces[pid].deferred
        copy.check(pid)


@needs_uffd
@pytest.mark.parametrize("first", range(0, SEEDS, 50))
def test_the_copy_is_the_process(jobs: Zoo, first: int) -> None:
    for seed in range(first, first + 50):
        with tracking(Kind.UFFD, lambda: list(jobs.jobs)) as tracker:
            try:
                live_through(jobs, tracker, seed)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}") from error
        jobs.clear()
