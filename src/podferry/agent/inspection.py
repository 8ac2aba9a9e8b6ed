"""Looking at containers and nodes before anything is touched."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from podferry.agent.config import Config
from podferry.agent.offered import Offered, log_file
from podferry.errors import Refused, UsageError
from podferry.memory.tracker import Choice, Kind, choose, probe
from podferry.model import Mode
from podferry.node.cgroup import Cgroup
from podferry.node.containerd import Containerd, NotFound
from podferry.node.records import Container, Status, Stdio, Task, upper_dir
from podferry.wire.messages import Offer

RUNTIME = "podferry-runc"
DUMP_FLAGS = ("--file-locks",)


@dataclass(frozen=True)
class View:
    """A container as a migration needs to know it."""

    offered: Offered
    task: Task
    upper: Path
    memory_bytes: int
    upper_bytes: int
    tracker: Choice
    refusals: tuple[Refused, ...] = ()
    warnings: list[str] = field(default_factory=list)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def offer(self, migration: str, mode: Mode) -> Offer:
        """What the target is asked."""
        return Offer(
            migration,
            self.offered.record.id,
            mode,
            self.offered.to_dict(),
            dict(self.facts),
            self.memory_bytes,
            self.upper_bytes,
        )

    def demand_movable(self, mode: Mode) -> Choice:
        """How it will be tracked in `mode`. Raises the first reason for which it cannot move."""
        if self.refusals:
            raise self.refusals[0]
        if mode is not Mode.LIVE:
            return Choice(Kind.NONE, f"mode {mode} tracks nothing")
        if self.tracker.kind is Kind.NONE:
            raise Refused(
                "no live migration here", why=self.tracker.reason, remedy="use --mode stop or --mode postcopy"
            )
        return self.tracker


class Inspection:
    """The eyes of an agent."""

    def __init__(self, config: Config, containerd: Containerd) -> None:
        self._config, self._containerd = config, containerd
        self._choice = choose(probe())

    def containers(self) -> list[dict[str, Any]]:
        """All containers here, as `podferry ps` shows them."""
        tasks = {task.id: task for task in self._containerd.tasks()}
        rows = []
        for record in self._containerd.containers():
            task = tasks.get(record.id)
            why = why_not(record, task)
            rows.append(
                {
                    "name": record.id,
                    "node": self._config.node,
                    "state": task.status.name.lower() if task else "no task",
                    "memory_bytes": self._memory(record) if task else 0,
                    "image": record.image,
                    "movable": why is None,
                    "why": str(why or ""),
                }
            )
        return rows

    def container(self, name: str) -> View:
        """Look at one container. Raises `UsageError` where there is none, `Refused` where it cannot be looked at."""
        try:
            record = self._containerd.container(name)
        except NotFound as missing:
            raise UsageError(
                f"there is no container {name} on {self._config.node}", remedy="podferry ps lists them"
            ) from missing
        try:
            task = self._containerd.task(name)
        except NotFound:
            task = None
        if (why := why_not(record, task)) is not None or task is None:
            raise why or Refused(f"{name} has no task")
        mounts = self._containerd.mounts(record.snapshotter, record.snapshot_key)
        upper = upper_dir(mounts)
        parent = self._containerd.snapshot(record.snapshotter, record.snapshot_key).parent
        stdio = Stdio(task.stdin, task.stdout, task.stderr, task.terminal)
        log_file(stdio)
        return View(
            Offered(record, parent, stdio, DUMP_FLAGS),
            task,
            upper,
            self._memory(record),
            disk_usage(upper),
            self._choice,
        )

    def weigh(self, offer: Offer, offered: Offered) -> dict[str, Any]:
        """Can this node take what is offered? Returns its facts. Raises `Refused` with the first reason why not."""
        record = offered.record
        if any(one.id == record.id for one in self._containerd.containers()):
            raise Refused(
                f"there is a container named {record.id} on {self._config.node} already",
                remedy="remove it, or rename one",
            )
        try:
            self._containerd.snapshot(record.snapshotter, offered.parent)
        except NotFound as missing:
            raise Refused(
                f"the image {record.image} is not on {self._config.node}",
                why=str(missing),
                remedy=f"pull {record.image} there, for the snapshotter {record.snapshotter}",
            ) from missing
        free = available_memory()
        if offer.memory_bytes > free:
            raise Refused(
                f"{self._config.node} has too little memory",
                why=f"the job uses {offer.memory_bytes >> 20} MiB, {free >> 20} MiB are available there",
                remedy="free memory there, or choose another node",
            )
        room = shutil.disk_usage(self._config.state).free
        if offer.upper_bytes > room:
            raise Refused(
                f"{self._config.node} has too little disk",
                why=f"the upper layer holds {offer.upper_bytes >> 20} MiB, {room >> 20} MiB are free there",
                remedy="free disk space there, or choose another node",
            )
        return {}

    def _memory(self, record: Container) -> int:
        cgroup = Cgroup.of_container(self._containerd.runc_root(record), record.id)
        return sum(resident(pid) for pid in cgroup.pids())


def why_not(record: Container, task: Task | None) -> Refused | None:
    """What can be said against moving a container from its records alone."""
    binary = record.runc_options().binary_name
    if Path(binary).name != RUNTIME:
        return Refused(
            f"{record.id} was not started through {RUNTIME}",
            why=f"its OCI runtime is {binary or 'runc'}",
            remedy=f"start it with the runtime {RUNTIME} (ctr run --runc-binary, or runtimeClassName: podferry)",
        )
    if task is None:
        return Refused(f"{record.id} does not run", why="it has no task", remedy="start it first")
    if task.status is not Status.RUNNING:
        return Refused(
            f"{record.id} does not run", why=f"its task is {task.status.name.lower()}", remedy="start it first"
        )
    return None


def resident(pid: int) -> int:
    """Bytes of private anonymous memory that a process has, in memory or swapped out."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    sizes = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return sum(int(sizes[name].split()[0]) << 10 for name in ("RssAnon", "VmSwap") if name in sizes)


def disk_usage(root: Path) -> int:
    """Bytes that the files below `root` take up."""
    total = 0
    for path in root.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except OSError:
            continue
    return total


def available_memory() -> int:
    """Bytes that the kernel could give away without swapping."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10
