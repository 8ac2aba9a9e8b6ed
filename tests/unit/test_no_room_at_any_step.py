"""A file system without room, or a killed agent, at every single step by which a target makes something: nothing is left.

The ports' contracts fail between steps, the kill matrix between phases; what is made under another name first, or before the ledger
has it, is left by what happens in between.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from podferry.engine.journal import Journal
from podferry.errors import PodferryError
from podferry.node.cri import SharedMountKind, Volume
from podferry.node.records import Container, Opaque, SnapshotMount, Stdio
from podferry.workload.config import Config
from podferry.workload.kinds.alone import ContainersAlone
from podferry.workload.kinds.kubelet_pods import KubeletPods
from podferry.workload.offered import OfferedContainer, OfferedPod, PodPart
from podferry.workload.pod.cluster_port import PodName
from podferry.workload.target import TargetWorkload

pytestmark = [pytest.mark.unit, pytest.mark.anyio]
SPEC = b'{"linux": {"namespaces": [{"type": "network"}], "cgroupsPath": "/default/job"}}'
MAKES = {"mkdir": os, "mkfifo": os, "mknod": os, "rename": os, "symlink": os, "link": os, "write": os}


class Killed(BaseException):
    """The agent is killed here."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Disk:
    """Counts what takes room, or makes a name, and fails once `left` of it have gone well, until it is mended."""

    left: int
    error: Callable[[], BaseException]
    struck: bool = False
    mended: bool = False

    def step(self) -> None:
        if self.mended:
            return
        self.left -= 1
        if self.left < 0:
            self.struck = True
            raise self.error()

    @contextmanager
    def watched(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        def before(function: Callable[..., Any], takes: Callable[..., bool], *args: Any, **more: Any) -> Any:
            if takes(*args, **more):
                self.step()
            return function(*args, **more)

        def opens(path: Any, flags: int, *rest: Any, **more: Any) -> bool:
            return bool(flags & (os.O_CREAT | os.O_TRUNC))

        def opens_file(path: Any, mode: str = "r", *rest: Any, **more: Any) -> bool:
            return not isinstance(path, int) and any(letter in mode for letter in "wax+")

        with monkeypatch.context() as patch:
            for name, module in MAKES.items():
                patch.setattr(module, name, partial(before, getattr(module, name), lambda *_, **__: True))
            patch.setattr(os, "open", partial(before, os.open, opens))
            patch.setattr(io, "open", partial(before, io.open, opens_file))
            yield


@dataclass
class Containerd:
    """What containerd has, in a directory of its own."""

    place: Path
    has: set[str] = field(default_factory=set)

    def create_container(self, record: Container) -> None:
        self.has.add("container")

    def prepare(self, *names: Any, **about: Any) -> list[SnapshotMount]:
        self.has.add("snapshot")
        return [SnapshotMount("overlay", "overlay", (f"upperdir={self.place}", f"workdir={self.place}"))]

    def delete_container(self, id: str) -> None:
        self.has.discard("container")

    def remove_snapshot(self, snapshotter: str, key: str) -> None:
        self.has.discard("snapshot")


class Cluster:
    def keeps_name(self, id: str) -> bool:
        return False

    async def target_pod(self, id: str) -> PodName:
        return PodName("default", "job.2", "0c1d3a52-5a43-4f6e-9a57-0a4b1c9e7d11")

    async def give_back(self, id: str) -> None:
        pass


Step = Callable[[TargetWorkload], Awaitable[object]]


def alone(config: Config, journal: Journal, runtime: Containerd) -> tuple[TargetWorkload, dict[str, Any]]:
    record = Container("job", "image", "overlayfs", "job", Opaque("spec", SPEC))
    log = f"file://{config.logs}/podferry-jobs/job.log"
    offered = OfferedContainer(record, stdio=Stdio("", log, log))
    kind = ContainersAlone(config, runtime)  # type: ignore[arg-type]
    return kind.target(journal, "job", offered), kind.target_handlers()


def pod(config: Config, journal: Journal, runtime: Containerd) -> tuple[TargetWorkload, dict[str, Any]]:
    parts = tuple(PodPart(f"c{number}", str(number), ()) for number in range(2))
    volumes = (Volume("data", SharedMountKind.DISK), Volume("cache", SharedMountKind.MEMORY))
    offered = OfferedPod(PodName("default", "job", "uid"), parts, volumes)
    kind = KubeletPods(config, runtime, Cluster())  # type: ignore[arg-type]
    return kind.target(journal, "default/job", offered), kind.target_handlers()


async def prepare(workload: TargetWorkload) -> None:
    await workload.prepare()
    await workload._maker.begin(workload._containers)
    for one in workload._containers:
        one.maker.mark_arrived()


def left(place: Path) -> list[str]:
    """Files and directories; those which every migration uses are no trace of one."""
    common = ("run", "run/arriving", "run/incoming", "run/staging", "state", "state/staging", "state/arrived", "logs")
    known = {place / one for one in common} | {place / "logs/podferry-jobs"}
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path not in known)


@pytest.mark.parametrize("kind", [alone, pod])
@pytest.mark.parametrize("error", [partial(OSError, errno.ENOSPC, "No space left on device"), Killed])
async def test_nothing_is_left(
    kind: Callable[..., tuple[TargetWorkload, dict[str, Any]]],
    error: Callable[[], BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = 0
    while True:
        place, upper = tmp_path / f"node-{steps}", tmp_path / f"upper-{steps}"
        for directory in (place / "run", place / "state", place / "logs/podferry-jobs", upper):
            directory.mkdir(parents=True)
        config = Config("b", "b:1", tmp_path, run=place / "run", state=place / "state", logs=place / "logs")
        runtime = Containerd(upper)
        journal = Journal(tmp_path / f"journal-{steps}")
        workload, handlers = kind(config, journal, runtime)
        disk = Disk(steps, error)
        prepared = False
        with disk.watched(monkeypatch), suppress(OSError, PodferryError, Killed):
            await prepare(workload)
            prepared = True
        assert prepared is not disk.struck
        disk.mended = True
        if disk.struck and error is Killed:  # another agent takes it back, which knows what the journal says
            journal.close()
            journal = Journal(journal.directory)
            _, handlers = kind(config, journal, runtime)
        else:
            await workload.close()
        assert await journal.ledger.unwind(handlers) == []
        journal.close()
        assert (left(place), runtime.has) == ([], set()), f"step {steps}"
        if not disk.struck:
            break
        steps += 1
    assert steps > 20, "the steps are not seen"
