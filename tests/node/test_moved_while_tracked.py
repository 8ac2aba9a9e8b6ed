"""A container whose memory is copied while it computes, by the tracker that this kernel has: frozen, dumped, restored and fed from
the copies, it runs on under another name. What two agents do with it, without agents, and on one node."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from node_job import Arrival, Job
from test_lazypages_criu import PROCESSES, WILD

from podferry.criu.dump_images import missing
from podferry.criu.restored_group import group_to_restore
from podferry.engine.journal import Journal, Part
from podferry.engine.ports import DirtySet
from podferry.lazypages.daemon_status import DaemonState, read_status
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.store.page_store import PageStore, Totals
from podferry.memory.tracking.tracker import choose, probe
from podferry.node.cgroup import Frozen
from podferry.node.containerd import Containerd
from podferry.node.records import Stdio, upper_dir
from podferry.wire.frames import Pages
from podferry.workload.config import Config
from podferry.workload.makers.containerd import ContainerdOwner
from podferry.workload.nodefacts import version
from podferry.workload.offered import log_file
from podferry.workload.source import SourceWorkload
from podferry.workload.source_container import Output, RunningContainer, SourceContainer

KIND = choose(probe()).kind
ROUNDS = 4
# As in test_lazypages_criu.py, with an eighth of the memory.
SMALL_AND_WILD = WILD.replace("8192", "1024").replace("5120", "640").replace("ATTEMPT", "tracked")

pytestmark = [pytest.mark.node, pytest.mark.anyio]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def work() -> Iterator[Path]:
    """For the agent's side: on a tmpfs."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="tracked-"))
    yield path
    shutil.rmtree(path)


def leaving(job: Job, work: Path) -> SourceWorkload:
    record, task = job.record, job.task
    log = log_file(Stdio(task.stdin, task.stdout, task.stderr, task.terminal))
    upper = upper_dir(job.client.mounts(record.snapshotter, record.snapshot_key))
    config = Config("here", "", work, state=work / "state", run=work / "run")
    journal = Journal(config.migrations / "moved")
    running = RunningContainer(record, task, upper, Output(log), ("--file-locks",))
    container = SourceContainer(config, job.client, Part(journal, 0), running, KIND)
    return SourceWorkload([container], ContainerdOwner(job.client, log))


def take_in(store: PageStore, source: SourceWorkload, change: DirtySet, number: int) -> int:
    """What the target does with the frames of a round. Returns how many pages came."""
    pages = 0
    for frame in source.read(change, number):
        if isinstance(frame, Pages):
            pages += frame.count
            for address, data in frame.pieces():
                store.write(frame.address_space, address, data, number)
        else:
            for start, end in frame.runs:
                store.drop(frame.address_space, start, end)
    return pages


async def test_a_container_computes_while_it_is_copied_and_goes_on_with_all_it_wrote(
    job: Job, client: Containerd, work: Path
) -> None:
    job.start(SMALL_AND_WILD)
    job.wait_lines(PROCESSES * 4)
    source, arrival = leaving(job, work), Arrival(job, "tracked-target")
    directory = work / "store"
    try:
        with arrival.telling(), closing(PageStore.create(directory)) as store:
            rounds = []
            for number in range(1, ROUNDS + 1):
                rounds.append(take_in(store, source, await source.scan_dirty(), number))
                job.wait_lines(PROCESSES)  # it computes between the rounds
            arrival.make_ready()
            await source.stand_by()
            await source.lock_exec()
            await source.freeze()
            assert job.cgroup.state() is Frozen.FROZEN
            assert not source.executing()
            rounds.append(take_in(store, source, await source.final_scan(), ROUNDS + 1))
            images = await source.dump()
            for (_, name), data in images.items():
                (arrival.incoming.images / name).write_bytes(data if isinstance(data, bytes) else data.read_bytes())
            for one in source.memory_totals():
                store.complete(one.address_space)
            store.verify({one.address_space: Totals(1, one.pages, one.pages * PAGE) for one in source.memory_totals()})
            assert missing(store, arrival.incoming.images) == {}
            store.sync()
        assert not source.executing()
        names = [line.split() for line in job.lines() if " is " in line]  # the log goes with the original
        await source.commit()  # which nothing needs any more
        with arrival.feeding(directory):
            arrival.incoming.belongs_in(group_to_restore(arrival.record.spec_json(), version("runc")))
            arrival.incoming.restore()
            assert arrival.created is not None
            arrival.created.result(60)
            client.start_task(arrival.job.id)
        here = arrival.job.family()
        speakers = {name: here[int(pid)] for name, _, pid in names}
        assert set(speakers.values()) <= set(arrival.job.cgroup.pids())
        arrival.job.wait_reported("whole", speakers)
        assert len(names) == PROCESSES
        assert not any("BAD" in line for line in arrival.job.lines())
        status = read_status(job.place / "feeder.json")
        assert (status.state, status.bytes_left, status.error) == (DaemonState.DONE, 0, None)
        print(f"tracker {KIND}, dump {source.dumped()}, pages in each round {rounds}")
    finally:
        await source.close()
        arrival.close()
