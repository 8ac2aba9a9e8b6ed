"""What there was before podferry: runc and CRIU alone, and the floor that nothing built on them can go below."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from podferry.bench import inside
from podferry.bench.job import Job
from podferry.bench.moves import SOURCE, TARGET, Moved
from podferry.bench.workload import Workload
from podferry.errors import Failed, PodferryError
from podferry.lab import Lab, containers
from podferry.lab.root_images import JOB_IMAGE
from podferry.node.process import spawn

ENVIRONMENT = {"PYTHONPATH": "/opt/podferry/src:/opt/podferry/site", "PYTHONDONTWRITEBYTECODE": "1"}
_INSIDE = ["python3", "-P", "-m", "podferry.bench.inside"]
_RUNC = [str(word) for word in inside.RUNC]


def call(lab: Lab, node: str, command: str, *arguments: str) -> dict[str, Any]:
    """Run one of `inside.COMMANDS` in a node and return what it says."""
    said = lab.exec(node, [*_INSIDE, command, *arguments], env=ENVIRONMENT, timeout=inside.TIMEOUT).stdout
    answer: dict[str, Any] = json.loads(said)
    return answer


class RuncAnswer:
    """A command of `inside` that runs in a node beside us, up to the point where it says that it is ready."""

    def __init__(self, lab: Lab, node: str, command: str, *arguments: str) -> None:
        self._what = f"{command} on {node}"
        reader, writer = os.pipe()
        complaints, complain = os.pipe()
        argv = lab.command(node, [*_INSIDE, command, *arguments])
        self._child = spawn(argv, env=ENVIRONMENT, stdout=writer, stderr=complain)
        os.close(writer)
        os.close(complain)
        self._said, self._complaints = os.fdopen(reader, "rb"), os.fdopen(complaints, "rb")
        if self._said.readline() != inside.READY:
            raise self._failed()

    def result(self) -> dict[str, Any]:
        """Wait for its end and return what it said. Raises `Failed`."""
        said = self._said.read()
        if self._child.wait(inside.TIMEOUT):
            raise self._failed()
        self._close()
        answer: dict[str, Any] = json.loads(said)
        return answer

    def abandon(self) -> None:
        """End it: nobody wants to know any more."""
        self._child.kill()
        self._child.wait()
        self._close()

    def _failed(self) -> Failed:
        evidence = self._complaints.read().decode(errors="replace").splitlines()
        self._close()
        return Failed(f"the baseline failed: {self._what}", evidence=evidence)

    def _close(self) -> None:
        self._said.close()
        self._complaints.close()


@dataclass(frozen=True)
class Runc:
    """`runc checkpoint`, a copy over the link, `runc restore`; `lazy`: with CRIU's own lazy migration."""

    lazy: bool = False

    def start(self, lab: Lab, workload: Workload) -> Job:
        """Start the job with runc alone, and prepare its bundle on the target."""
        for node in (SOURCE, TARGET):
            containers.pull(lab, node, JOB_IMAGE)
            call(lab, node, "prepare", json.dumps(workload.argv()), JOB_IMAGE)
        call(lab, SOURCE, "start")

        def send(node: str, number: signal.Signals) -> None:
            lab.exec(node, [*_RUNC, "kill", inside.ID, number.name])

        def alive(node: str) -> bool:
            return '"status": "running"' in lab.exec(node, [*_RUNC, "state", inside.ID], check=False).stdout

        job = Job(lab, SOURCE, Path(str(inside.ROOTFS).lstrip("/")), send, alive)
        job.ready()
        return job

    def move(self, job: Job) -> Moved:
        """Checkpoint there, restore here; both at once as far as CRIU can."""
        lab = job.lab
        addresses = {node.name: node.address for node in lab.status().nodes}
        how = ["-lazily"] if self.lazy else []
        there = RuncAnswer(lab, TARGET, "".join(["arrive", *how]), *[addresses[SOURCE]] * self.lazy)
        try:
            left = call(lab, SOURCE, "".join(["leave", *how]), addresses[TARGET])
        except PodferryError:
            there.abandon()
            raise
        came = there.result()
        job.node = TARGET
        moments = {**came, **left}
        return Moved(
            "completed", left["began"], max(came["home"], came["restored"]), left["frozen"], came["home"], moments
        )

    def stop(self, lab: Lab) -> None:
        """Remove the container and its bundles."""
        for node in (SOURCE, TARGET):
            call(lab, node, "clean")


def floor(lab: Lab) -> dict[str, Any]:
    """Pause, checkpoint and restore of an idle `sleep` that stays where it is."""
    containers.pull(lab, SOURCE, JOB_IMAGE)
    call(lab, SOURCE, "prepare", json.dumps(["sleep", "infinity"]), JOB_IMAGE)
    try:
        call(lab, SOURCE, "start")
        return call(lab, SOURCE, "floor")
    finally:
        call(lab, SOURCE, "clean")
