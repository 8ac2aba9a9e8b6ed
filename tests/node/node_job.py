"""Containers for the node tests: started by ctr, held, restored under another name on the same node, removed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from podferry.errors import Failed
from podferry.memory.criu_images import lazy_runs
from podferry.memory.store import PageStore
from podferry.node.cgroup import Cgroup
from podferry.node.checkpoint import Hold
from podferry.node.containerd import Containerd, ContainerdFailed, NotFound
from podferry.node.incoming import Incoming
from podferry.node.process import run, spawn
from podferry.node.records import Container, Opaque, Stdio, Task
from podferry.protos.runc_pb2 import Options

IMAGE = "podferry.local/job:1"
RUNTIME = "/usr/local/sbin/podferry-runc"
COUNT = "import time\nn = 0\nwhile True:\n    print(n, flush=True)\n    n += 1\n    time.sleep(0.01)\n"
PIECE = 1 << 20


class Job:
    """A container that runs `script`, and prints into `log`."""

    def __init__(self, client: Containerd, id: str, place: Path) -> None:
        self.client = client
        self.id = id
        self.place = place
        self.log = place / f"{id}.log"
        self._hold: Hold | None = None

    def start(self, script: str = COUNT, *options: str) -> None:
        """Start it anew."""
        uri = f"--log-uri=file://{self.log}"
        argv = ["ctr", "run", "--detach", "--snapshotter", "podferry", "--runc-binary", RUNTIME, uri, *options]
        run([*argv, IMAGE, self.id, "python3", "-c", script])

    @property
    def record(self) -> Container:
        return self.client.container(self.id)

    @property
    def task(self) -> Task:
        return self.client.task(self.id)

    @property
    def cgroup(self) -> Cgroup:
        return Cgroup.of_container(self.client.runc_root(self.record), self.id)

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def wait_lines(self, more: int = 3) -> None:
        """Wait until it has printed so many lines more: it runs."""
        wanted = len(self.lines()) + more
        for _ in range(2000):
            if len(self.lines()) >= wanted:
                return
            threading.Event().wait(0.01)
        raise AssertionError(f"{self.id} prints no more: {self.lines()[-5:]}")

    def hold(self, **options: object) -> Hold:
        """Freeze it and have CRIU hold it."""
        self.cgroup.freeze()
        hold = self._start_hold(**options)
        hold.wait_ready()
        return hold

    def hold_early(self) -> Hold:
        """Have runc wait with the dump. The job runs on."""
        return self._start_hold(wait=True)

    def _start_hold(self, **options: object) -> Hold:
        work = self.place / f"{self.id}-hold"
        shutil.rmtree(work, ignore_errors=True)
        root = self.client.runc_root(self.record)
        hold = self._hold = Hold.start(
            self.id, self.cgroup, runc_root=root, images=work / "images", work=work / "work", **options
        )  # type: ignore[arg-type]
        return hold

    def remove(self) -> None:
        """Remove what is left of it."""
        with contextlib.suppress(NotFound):
            record = self.record
            with contextlib.suppress(NotFound):
                task = self.task
                with contextlib.suppress(Failed):
                    (self._hold.commit if self._hold else self.cgroup.kill)()
                with contextlib.suppress(ContainerdFailed):
                    self.client.wait_task(task.id, 20)
                with contextlib.suppress(ContainerdFailed):
                    self.client.delete_task(task.id)
            self.client.delete_container(self.id)
            with contextlib.suppress(NotFound):
                self.client.remove_snapshot(record.snapshotter, record.snapshot_key)


class Arrival:
    """The container that a `Job` becomes: poised, then given a verdict."""

    def __init__(self, source: Job, id: str) -> None:
        self.job = Job(source.client, id, source.place)
        self.source = source
        self.incoming = Incoming.prepare(id)
        self._pool = ThreadPoolExecutor(2)
        self.created: Future[int] | None = None
        record = source.record
        self.layers = source.client.lineage(record.snapshotter, record.snapshot_key)
        spec = record.spec_json()
        spec["linux"]["cgroupsPath"] = f"/default/{id}"
        self.record = replace(
            record,
            id=id,
            snapshot_key=id,
            spec=replace(record.spec, value=json.dumps(spec).encode()),
            options=Opaque("containerd.runc.v1.Options", Options(binary_name=RUNTIME).SerializeToString()),
        )

    def poise(self) -> None:
        """Have containerd create the task up to where the wrapper waits."""
        client = self.source.client
        client.create_container(self.record)
        mounts = client.prepare(self.record.snapshotter, self.record.id, self.layers, image=self.record.image)
        log = f"file://{self.job.log}"
        self.created = self._pool.submit(client.create_task, self.record.id, mounts, Stdio(stdout=log, stderr=log))
        self.created.add_done_callback(self._abandon)
        self.incoming.wait_poised(60)

    def _abandon(self, created: Future[int]) -> None:
        if error := created.exception():
            self.incoming.abandon(Failed.because("the task was not created", error))

    @contextlib.contextmanager
    def fed(self, images: Path) -> Iterator[None]:
        """Bring the images, and every page from the frozen source, and feed them to what is restored meanwhile."""
        shutil.copytree(images, self.incoming.images, dirs_exist_ok=True)
        directory = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="store-"))  # sparse up to the largest address
        with contextlib.closing(PageStore.create(directory)) as store:
            for space, runs in lazy_runs(images).items():
                memory = os.open(f"/proc/{self._source_pid(space)}/mem", os.O_RDONLY)
                for start, end in runs:
                    for at in range(start, end, PIECE):
                        store.write(space, at, os.pread(memory, min(PIECE, end - at), at), 0)
                os.close(memory)
                store.complete(space)
            store.sync()
        argv = ["python3", "-m", "podferry.memory.feeder", "--work", self.incoming.work, "--store", directory]
        argv += ["--images", self.incoming.images, "--status", self.source.place / "feeder.json"]
        feeder = spawn(argv, env={"PYTHONPATH": os.environ["PYTHONPATH"]}, stdout=subprocess.PIPE)
        assert feeder.stdout is not None
        try:
            assert feeder.stdout.readline() == b"ready\n"
            yield
            assert feeder.wait(60) == 0, (self.source.place / "feeder.json").read_text()
        finally:
            feeder.kill()
            feeder.wait()
            feeder.stdout.close()
            shutil.rmtree(directory)

    def _source_pid(self, inside: int) -> int:
        """The pid here of the source's process that is `inside` in the container."""
        for pid in self.source.cgroup.pids():
            status = Path(f"/proc/{pid}/status").read_text()
            if int(status.partition("NSpid:")[2].split("\n", 1)[0].split()[-1]) == inside:
                return pid
        raise AssertionError(f"no process {inside} in {self.source.id}")

    def close(self) -> None:
        self.incoming.close()
        with contextlib.suppress(Failed):
            self.job.remove()
        self._pool.shutdown()
