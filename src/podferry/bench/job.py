"""A benchmark's job while it runs: where it is, whether it is ready, what it has to report."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from podferry.bench.load import REPORT
from podferry.bench.workload import DIRECTORY, Report, Workload
from podferry.errors import Failed, PodferryError, TimedOut
from podferry.lab import Lab, containers

BUNDLES = Path("run/containerd/io.containerd.runtime.v2.task") / containers.NAMESPACE
PATIENCE = 180.0
POLL_INTERVAL = 0.02


@dataclass
class Job:
    """A job in a container. `root` is its root directory below that of the node that it is on; `signal` sends it one."""

    lab: Lab
    node: str
    root: Path
    signal: Callable[[str, signal.Signals], object]
    alive: Callable[[str], bool]
    _reports: int = field(default=0)

    def ready(self) -> None:
        """Wait until the job's memory is filled."""
        self._published(0)

    def report(self) -> Report:
        """What the job has seen so far; checking its memory takes it about a second a GiB."""
        self._reports += 1
        self.signal(self.node, signal.SIGUSR1)
        return Report.from_dict(self._published(self._reports))

    def _published(self, number: int) -> dict[str, Any]:
        path = self.lab.root(self.node) / self.root / DIRECTORY / REPORT.format(number)
        deadline = time.monotonic() + PATIENCE
        while True:
            with suppress(FileNotFoundError):
                report: dict[str, Any] = json.loads(path.read_text())
                return report
            if not self.alive(self.node):
                raise Failed(f"the benchmark's job has ended on {self.node}", remedy="see its log")
            if time.monotonic() > deadline:
                raise TimedOut(f"the benchmark's job says nothing after {PATIENCE:.0f} s")
            time.sleep(POLL_INTERVAL)  # a file's birth is an event only to inotify, which Python does not have


def start(lab: Lab, node: str, name: str, workload: Workload) -> Job:
    """Start a job in a container that podferry can move, and wait until it is ready. `stop` removes it."""
    containers.start(lab, node, name, workload.argv())

    def send(where: str, number: signal.Signals) -> None:
        lab.exec(where, ["ctr", "-n", containers.NAMESPACE, "task", "kill", "-s", number.name, name])

    job = Job(lab, node, BUNDLES / name / "rootfs", send, lambda where: _runs(lab, where, name))
    try:
        job.ready()
    except PodferryError as error:
        with suppress(PodferryError):
            error.evidence += b"".join(containers.output(lab, name)).decode(errors="replace").splitlines()[-20:]
            containers.stop(lab, name)
        raise
    return job


def _runs(lab: Lab, node: str, name: str) -> bool:
    """Whether containerd says that the container's task runs."""
    tasks = lab.exec(node, ["ctr", "-n", containers.NAMESPACE, "tasks", "list"]).stdout.splitlines()
    return any(line.split()[0] == name and line.endswith("RUNNING") for line in tasks)
