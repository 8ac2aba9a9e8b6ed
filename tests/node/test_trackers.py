"""Trackers against programs that do everything to their memory. Needs root and a kernel, no CRIU."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from trackers_zoo import Zoo

from podferry.memory.kernel.maps import private_anonymous, read_areas
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.kernel.reader import Data, Gone, Reader, Zero
from podferry.memory.tracking.tracker import DirtyScan, Tracker, TrackerKind, choose, probe
from podferry.memory.tracking.trackers import create

FACTS = probe()
SEEDS = 300
MANY_SEEDS = 5000

pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
KIND = choose(FACTS).kind
needs_tracker = pytest.mark.skipif(KIND is TrackerKind.NONE, reason=f"no tracker here: {choose(FACTS).reason}")


class Copy:
    """What the other side would have: the pages reported so far, by process."""

    def __init__(self) -> None:
        self.pages: dict[int, dict[int, bytes]] = {}

    def apply(self, seen: DirtyScan) -> None:
        for pid in seen.gone:
            self.pages.pop(pid, None)
        for pid, address_space in seen.address_spaces.items():
            pages = self.pages.setdefault(pid, {})
            assert not address_space.written & address_space.dropped
            for page, _ in address_space.dropped.pieces(PAGE):
                del pages[page]  # a KeyError would be a page dropped that was never reported
            try:
                with Reader(pid) as reader:
                    for piece in reader.read(address_space.written):
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
def tracking(zoo: Zoo) -> Iterator[Tracker]:
    with contextlib.closing(create(KIND, lambda: list(zoo.jobs), pause=zoo.paused)) as tracker:
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
        assert not last.address_spaces[pid].deferred
        copy.check(pid)


def live_through_all(zoo: Zoo, seeds: range) -> None:
    for seed in seeds:
        with tracking(zoo) as tracker:
            try:
                live_through(zoo, tracker, seed)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}") from error
        zoo.clear()


@needs_tracker
@pytest.mark.parametrize("first", range(0, SEEDS, 50))
def test_the_copy_is_the_process(jobs: Zoo, first: int) -> None:
    live_through_all(jobs, range(first, first + 50))


@needs_tracker
@pytest.mark.slow
@pytest.mark.parametrize("first", range(SEEDS, MANY_SEEDS, 100))
def test_the_copy_is_the_process_for_thousands(jobs: Zoo, first: int) -> None:
    live_through_all(jobs, range(first, first + 100))
