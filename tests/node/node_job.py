"""Containers for the node tests: started by ctr, held, restored under another name on the same node, removed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from node_facts_of import ended, family, inside, portrait, said

from podferry.criu.checkpoint import HeldDump
from podferry.criu.dump_images import lazy_runs
from podferry.criu.incoming import Incoming
from podferry.errors import Failed
from podferry.memory.store.page_store import PageStore
from podferry.node.cgroup import Cgroup
from podferry.node.containerd import Containerd
from podferry.node.containerd_errors import ContainerdFailed, ContainerdNotFound
from podferry.node.process import run, spawn
from podferry.node.records import Container, Opaque, Stdio, Task
from podferry.protos.runc_pb2 import Options

IMAGE = "podferry.local/job:1"
RUNTIME = "/usr/local/sbin/podferry-runc"
COUNT = "import time\nn = 0\nwhile True:\n    print(n, flush=True)\n    n += 1\n    time.sleep(0.01)\n"
PIECE = 1 << 20
SHARED, PLAIN = "podferry", "overlayfs"
QUIET = 60.0
"""Seconds in which a process that has been saying something says nothing: it will say nothing more."""


class Job:
    """A container that runs `script`, and prints into `log`."""

    def __init__(self, client: Containerd, id: str, place: Path) -> None:
        self.client = client
        self.id = id
        self.place = place
        self.log = place / f"{id}.log"
        self._held: HeldDump | None = None

    def start(self, script: str = COUNT, *options: str) -> None:
        """Start it anew."""
        uri = f"--log-uri=file://{self.log}"
        snapshotter = SHARED if Path("/run/podferry/snapshotter.sock").exists() else PLAIN
        argv = ["ctr", "run", "--detach", "--snapshotter", snapshotter, "--runc-binary", RUNTIME, uri, *options]
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

    def family(self) -> dict[int, int]:
        """Its processes, by their pids inside, zombies too."""
        return family(self.task.pid)

    def wait_reported(self, word: str, speakers: dict[str, int]) -> None:
        """Wait until every speaker has said a line `NAME WORD ...`. `speakers` are the names, and their pids here.

        Each has to go on saying lines that begin with its name. One that ends, or says `NAME BAD ...`, ends the wait at once.
        """
        heard = dict.fromkeys(speakers, (0, time.monotonic()))
        while True:
            ends = {name: how for name, pid in speakers.items() if (how := ended(pid))}
            lines = self.lines()
            for name in heard:
                own = [line for line in lines if line.startswith(f"{name} ")]
                assert not any(line.startswith(f"{name} BAD") for line in own), own[-3:]
                if len(own) > heard[name][0]:
                    heard[name] = (len(own), time.monotonic())
            assert not ends, f"processes of {self.id} ended: {ends}"
            waiting = [name for name in speakers if not any(line.startswith(f"{name} {word}") for line in lines)]
            if not waiting:
                return
            silent = [name for name in waiting if time.monotonic() > heard[name][1] + QUIET]
            assert not silent, f"{silent} of {self.id} said nothing for {QUIET:g} s"
            threading.Event().wait(0.05)

    def held(self, **options: object) -> HeldDump:
        """Freeze it and have CRIU hold it."""
        self.cgroup.freeze()
        held = self._start_held_dump(**options)
        held.wait_ready()
        return held

    def start_dump_early(self, **options: object) -> HeldDump:
        """Have runc wait with the dump. The job runs on."""
        return self._start_held_dump(wait=True, **options)

    def _start_held_dump(self, **options: object) -> HeldDump:
        work = self.place / f"{self.id}-hold"
        shutil.rmtree(work, ignore_errors=True)
        root = self.client.runc_root(self.record)
        held = self._held = HeldDump.start(
            self.id, self.cgroup, runc_root=root, images=work / "images", work=work / "work", **options
        )  # type: ignore[arg-type]
        return held

    def remove(self) -> None:
        """Remove what is left of it."""
        with contextlib.suppress(ContainerdNotFound):
            record = self.record
            with contextlib.suppress(ContainerdNotFound):
                task = self.task
                with contextlib.suppress(Failed):
                    (self._held.commit if self._held else self.cgroup.kill)()
                with contextlib.suppress(ContainerdFailed):
                    self.client.wait_task(task.id, 20)
                with contextlib.suppress(ContainerdFailed):
                    self.client.delete_task(task.id)
            self.client.delete_container(self.id)
            with contextlib.suppress(ContainerdNotFound):
                self.client.remove_snapshot(record.snapshotter, record.snapshot_key)


class Arrival:
    """The container that a `Job` becomes: prepared, then given a verdict."""

    def __init__(self, source: Job, id: str) -> None:
        self.job = Job(source.client, id, source.place)
        self.source = source
        self.incoming = Incoming.prepare(id)
        self.incoming.let_run()  # nobody looks at what is restored before it runs
        self._pool = ThreadPoolExecutor(2)
        self.created: Future[int] | None = None
        self._told = False
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

    def make_ready(self) -> None:
        """Have containerd create the task up to where the wrapper waits."""
        client = self.source.client
        client.create_container(self.record)
        mounts = client.prepare(self.record.snapshotter, self.record.id, self.layers, image=self.record.image)
        log = f"file://{self.job.log}"
        self.created = self._pool.submit(client.create_task, self.record.id, mounts, Stdio(stdout=log, stderr=log))
        self.created.add_done_callback(self._abandon)
        self.incoming.wait_prepared(60)

    def _abandon(self, created: Future[int]) -> None:
        if error := created.exception():
            self.incoming.abandon(Failed.because("the task was not created", error))

    @contextlib.contextmanager
    def fed(self, images: Path) -> Iterator[None]:
        """Bring the images, and every page from the frozen source, and feed them to what is restored meanwhile."""
        shutil.copytree(images, self.incoming.images, dirs_exist_ok=True)
        directory = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="store-"))  # sparse up to the largest address
        with contextlib.closing(PageStore.create(directory)) as store:
            for address_space, runs in lazy_runs(images).items():
                memory = os.open(f"/proc/{self._source_pid(address_space)}/mem", os.O_RDONLY)
                for start, end in runs:
                    for at in range(start, end, PIECE):
                        store.write(address_space, at, os.pread(memory, min(PIECE, end - at), at), 0)
                os.close(memory)
                store.complete(address_space)
            store.sync()
        with self.feeding(directory):
            yield

    @contextlib.contextmanager
    def feeding(self, store: Path) -> Iterator[None]:
        """Feed what a page store has to what is restored meanwhile. The store is gone afterwards."""
        argv = ["python3", "-m", "podferry.lazypages.daemon", "--work", self.incoming.work, "--store", store]
        argv += ["--images", self.incoming.images, "--status", self.source.place / "feeder.json"]
        with (self.source.place / "feeder.log").open("wb") as log:
            environment = {"PYTHONPATH": os.environ["PYTHONPATH"]}
            daemon = spawn(argv, env=environment, stdout=subprocess.PIPE, stderr=log)
        assert daemon.stdout is not None
        try:
            with self.telling():
                assert daemon.stdout.readline() == b"ready\n"
                yield
                assert daemon.wait(60) == 0
        finally:
            daemon.kill()
            daemon.wait()
            daemon.stdout.close()
            shutil.rmtree(store)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """A failure inside tells all that there is to know: while the processes are still there, and once."""
        try:
            yield
        except BaseException as error:
            if not self._told:
                self._told = True
                error.add_note(self.looks())
            raise

    def looks(self) -> str:
        """How the lazy-pages daemon, CRIU and the processes here and there are, and what they said last."""
        threading.Event().wait(0.5)  # what a process said as it ended is still on its way into the log
        place = self.source.place
        files = {name: said(place / name) for name in ("feeder.json", "feeder.log")}
        files |= {"restore.log": said(self.incoming.work / "restore.log")}
        for job in (self.source, self.job):
            last = {line.split(" ", 1)[0]: line for line in job.lines()}
            files[f"{job.id}, the last line of each"] = "\n".join(last.values())
            with contextlib.suppress(Failed, ContainerdNotFound, OSError):
                files |= {f"{job.id}, process {number}": portrait(pid) for number, pid in job.family().items()}
        return "\n".join(f"--- {name}\n{text}" for name, text in files.items())

    def _source_pid(self, number: int) -> int:
        """The pid here of the source's process that has this pid inside."""
        for pid in self.source.cgroup.pids():
            if inside(pid) == number:
                return pid
        raise AssertionError(f"no process {number} in {self.source.id}")

    def close(self) -> None:
        self.incoming.close()
        with contextlib.suppress(Failed):
            self.job.remove()
        self._pool.shutdown()
