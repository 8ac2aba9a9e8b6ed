"""The contracts' cases over real containers: containerd, runc, CRIU, cgroups."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
from node_job import Job

from podferry.engine.journal import Journal, Part
from podferry.errors import PodferryError
from podferry.node.containerd_errors import ContainerdNotFound
from podferry.node.records import Stdio, TaskStatus, upper_dir
from podferry.workload import frozen
from podferry.workload.config import Config
from podferry.workload.helpers import process_of
from podferry.workload.kinds.kind import DUMP_FLAGS
from podferry.workload.makers.containerd import ContainerdContainer, target_handlers
from podferry.workload.offered import OfferedContainer
from podferry.workload.page_channel import DaemonPageChannel
from podferry.workload.remote_pages import FrozenPages
from podferry.workload.source_container import Output, RunningContainer, SourceContainer
from podferry.workload.target_container import TargetContainer

WORKS = """
import time
data = bytearray(1 << 20)
n = 0
while True:
    data[n * 4096 % len(data)] = n % 250 + 1
    print(n, flush=True)
    n += 1
    time.sleep(0.01)
"""


def config(place: Path) -> Config:
    """An agent's, whose directories are the test's own but for those where podferry-runc looks."""
    return Config("node-a", "127.0.0.1:7400", place, state=place / "state", logs=place)


class RealSourceCase:
    def __init__(self, job: Job, place: Path, kind: Any) -> None:
        self.job, self.config = job, config(place)
        job.start(WORKS)
        job.wait_lines()
        self.directory = place / "contract"
        self.journal = Journal(self.directory)
        record = job.record
        upper = upper_dir(job.client.mounts(record.snapshotter, record.snapshot_key))
        running = RunningContainer(record, job.task, upper, Output(job.log), flags=DUMP_FLAGS)
        self.container = SourceContainer(self.config, job.client, Part(self.journal, 0), running, kind)
        self.quota = job.cgroup.cpu_quota()

    async def works(self) -> None:
        await anyio.to_thread.run_sync(self.job.wait_lines)

    async def stands_still(self) -> None:
        before = self.job.lines()
        await anyio.sleep(0.1)
        assert len(self.job.lines()) <= len(before) + 1, "a line was on its way at most"

    async def take_back(self) -> None:
        if self._spoil().is_file():
            self._spoil().unlink()
        assert await self.journal.ledger.unwind(frozen.handlers()) == []

    async def end(self) -> None:
        self.job.client.kill_task(self.job.id, signal.SIGKILL, everyone=True)
        await anyio.to_thread.run_sync(self.job.client.wait_task, self.job.id, 20.0)

    def spoil_the_dump(self) -> None:
        self._spoil().parent.mkdir(exist_ok=True)
        self._spoil().write_text("in the way of a directory")

    def _spoil(self) -> Path:
        return self.config.outgoing / f"{self.directory.name}.0"

    def residue(self) -> list[str]:
        found = [path.name for path in (self.config.outgoing, self.config.run / "leaving") if [*path.glob("*")]]
        with suppress(PodferryError):  # it has ended
            if self.job.cgroup.cpu_quota() != self.quota:
                found.append("quota")
        return found

    def printed(self) -> bytes:
        return self.job.log.read_bytes()

    def found_by_another_agent(self) -> Any:
        return frozen.FrozenContainer(Part(Journal(self.directory), 0), self.job.client, self.job.record)

    async def close(self) -> None:
        await self.take_back()
        await self.container.close()
        self.journal.close()
        shutil.rmtree(self.config.outgoing, ignore_errors=True)


NAME = "contract-target"


class RealTargetCase:
    def __init__(self, job: Job, place: Path, kind: Any) -> None:
        self.leaving = RealSourceCase(job, place, kind)
        self.source, self.config, self.client = self.leaving.container, self.leaving.config, job.client
        self.job = Job(self.client, NAME, place)
        self.job.remove()
        record, spec = job.record, job.record.spec_json()
        spec["linux"]["cgroupsPath"] = f"/default/{NAME}"
        spec_as_text = replace(record.spec, value=json.dumps(spec).encode())
        log = f"file://{self.job.log}"
        self.offered = OfferedContainer(
            replace(record, id=NAME, spec=spec_as_text),
            tuple(self.client.lineage(record.snapshotter, record.snapshot_key)),
            Stdio("", log, log),
            DUMP_FLAGS,
        )
        self.directory = place / "arriving"
        self.whole_journal = Journal(self.directory)
        self.journal = Part(self.whole_journal, 0)
        self.container = self._container(self.journal)

    def _container(self, journal: Part) -> TargetContainer:
        maker = ContainerdContainer(self.config, self.client, self.offered)
        return TargetContainer(self.config, self.client, journal, maker)

    async def take_back(self) -> None:
        handlers = target_handlers(self.config, self.client)
        assert await self.whole_journal.ledger.unwind(handlers) == []

    def residue(self) -> list[str]:
        run = self.config.run
        paths = [run / "arriving" / f"{self.directory.name}.0", run / "incoming" / NAME, run / "restored" / NAME]
        found = [str(path) for path in [*paths, self.job.log] if path.exists()]
        with suppress(ContainerdNotFound):
            found.append(f"container {self.client.container(NAME).id}")
        with suppress(ContainerdNotFound):
            found.append(f"task {self.client.task(NAME).id}")
        with suppress(ContainerdNotFound):
            self.client.mounts(self.offered.record.snapshotter, NAME)
            found.append("snapshot")
        return found + [f"process {pid}" for pid in processes_of(str(paths[0]))]

    async def works(self) -> None:
        await anyio.to_thread.run_sync(self.job.wait_lines)

    def take_the_name(self) -> Callable[[], bool]:
        self.job.start(WORKS)
        self.job.wait_lines()
        return lambda: self.job.task.status is TaskStatus.RUNNING

    def kill_wrapper(self) -> None:
        os.kill(self.container.incoming.wrapper, signal.SIGKILL)

    def kill_feeder(self) -> None:
        daemon = process_of(self.journal.held("lazy-pages-daemon"))
        assert daemon is not None
        daemon.kill()
        assert daemon.wait(20.0)

    def found_by_another_agent(self) -> TargetContainer:
        return self._container(Part(Journal(self.directory), 0))

    def channel(self) -> DaemonPageChannel:
        return DaemonPageChannel([self.container.daemon_socket()])

    def remote_pages(self) -> FrozenPages:
        left = self.source.left()
        return FrozenPages(left.pids, left.runs)

    async def close(self) -> None:
        await self.container.close()
        await self.whole_journal.ledger.unwind(target_handlers(self.config, self.client))
        self.job.remove()
        self.whole_journal.close()
        await self.leaving.close()


def processes_of(word: str) -> list[int]:
    """The processes that have `word` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if word in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
    return found
