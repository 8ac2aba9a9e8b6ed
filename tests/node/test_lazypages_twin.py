"""A job that is fed while it maps, writes, forks, moves and unmaps has the memory of a twin that was never moved."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lazypages_job import MOVED, fill_store, live, live_threaded, write_images

from podferry.lazypages import daemon, task
from podferry.lazypages.daemon_status import DaemonState, read_status
from podferry.memory.kernel.page_size import PAGE

pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: userfaultfd with fork events"),
]

PID, PAGES, STEPS = 42, 256, 150
DEADLINE = 30


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in memory; the store's files are sparse up to the largest address."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="feeder-"))
    yield path
    shutil.rmtree(path)


def in_child(body: object, *arguments: object) -> int:
    """Fork a process that runs `body`; returns its pid. It ends with status 0 if nothing was raised."""
    pid = os.fork()
    if pid:
        return pid
    ended = 1
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a handler does not run in a process that waits for a page
    signal.alarm(DEADLINE)
    try:
        ended = body(*arguments) or 0  # type: ignore[operator]
    except BaseException:  # noqa: BLE001 - a forked child must not return into pytest
        traceback.print_exc()
    finally:
        os._exit(ended)


def feed_slowly(place: Path, seed: int, ready: int) -> int:
    """Be the daemon, in steps so small that the job gets its word in."""
    chance = random.Random(seed)
    task.AROUND = chance.choice([1, 4, 16])
    task.SMALLEST_STEP = task.LARGEST_STEP = chance.choice([1, 1, 2, 8, 64])
    if chance.random() < 0.5:
        fill, pause = task.FedTask.fill, chance.choice([0.0002, 0.001])

        def fill_slowly(task: task.FedTask) -> task.FaultAnswer:
            if not task.forked:  # of these there may be dozens
                time.sleep(pause)
            return fill(task)

        task.FedTask.fill = fill_slowly  # type: ignore[method-assign]
    sys.stdout = os.fdopen(ready, "w")
    return daemon.main(
        [
            "--work",
            str(place),
            "--images",
            str(place),
            "--store",
            str(place / "store"),
            "--status",
            str(place / "status"),
        ]
    )


def play(place: Path, seed: int, life: Callable[..., None] = live) -> None:
    """One job, one daemon, one seed."""
    fill_store(place / "store", PID, seed, PAGES)
    write_images(place, {PID: [(MOVED, MOVED + PAGES * PAGE)]})
    reader, writer = os.pipe()
    server = in_child(feed_slowly, place, seed, writer)
    os.close(writer)
    try:
        assert os.read(reader, 16) == b"ready\n"
        job = in_child(life, place, PID, seed, PAGES, STEPS)
        _, status = os.waitpid(job, 0)
        assert status == 0, f"seed {seed}: {read_status(place / 'status')}"
        _, status = os.waitpid(server, 0)
        server = 0
        told = read_status(place / "status")
        assert (status, told.state, told.bytes_left, told.tasks) == (0, DaemonState.DONE, 0, 0), f"seed {seed}: {told}"
        assert sum(path.stat().st_blocks for path in (place / "store").glob("space-*")) == 0, (
            f"seed {seed}: not punched"
        )
    finally:
        os.close(reader)
        if server:
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
        shutil.rmtree(place / "store")


@pytest.mark.parametrize("seeds", [range(n, n + 25) for n in range(0, 300, 25)], ids=lambda seeds: f"from{seeds.start}")
def test_a_job_that_is_being_fed_equals_its_twin(place: Path, seeds: range) -> None:
    for seed in seeds:
        play(place, seed)


@pytest.mark.parametrize("seeds", [range(n, n + 20) for n in range(0, 60, 20)], ids=lambda seeds: f"from{seeds.start}")
def test_threads_that_change_one_address_space_at_once_lose_nothing(place: Path, seeds: range) -> None:
    for seed in seeds:
        play(place, seed, live_threaded)


@pytest.mark.slow
@pytest.mark.parametrize("thousand", range(1, 6))
def test_thousands_of_jobs_equal_their_twins(place: Path, thousand: int) -> None:
    for seed in range(1000 * thousand, 1000 * thousand + 1000):
        play(place, seed)
