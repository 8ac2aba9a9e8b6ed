"""What a move is compared with where lost work counts: a job that stays, and one that is killed and begins again elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass

from podferry.bench import job as jobs
from podferry.bench.job import Job
from podferry.bench.moves import NAME, SOURCE, TARGET, Moved
from podferry.bench.workload import Workload
from podferry.lab import Lab, containers
from podferry.lab.network import bits_per_second
from podferry.model import Outcome

SETTLING = 3.0
"""Seconds that a move takes beside carrying the memory, about."""
UNLIMITED_BITS = 4_000_000_000


def _remove(lab: Lab) -> None:
    if containers.holders(lab, NAME):
        containers.stop(lab, NAME)


@dataclass(frozen=True)
class Unmoved:
    """The control: the same job for as long as a move takes (`seconds`), and nobody moves it."""

    seconds: float

    def start(self, lab: Lab, workload: Workload) -> Job:
        """Start the job as for podferry."""
        return jobs.start(lab, SOURCE, NAME, workload)

    def move(self, job: Job) -> Moved:
        """Let it run."""
        began = time.time_ns()
        time.sleep(self.seconds)
        return Moved(Outcome.COMPLETED, began, time.time_ns(), None, None)

    def stop(self, lab: Lab) -> None:
        """Remove the container."""
        _remove(lab)


def unmoved(workload: Workload, link: str) -> Unmoved:
    """A twin that is watched for about as long as a move over `link` takes."""
    return Unmoved(round((workload.memory << 20) * 8 / (bits_per_second(link) or UNLIMITED_BITS) + SETTLING, 1))


@dataclass
class Restart:
    """Without migration: the job is killed and begins again on the other node, until its memory is filled as at its first start."""

    _workload: Workload | None = None

    def start(self, lab: Lab, workload: Workload) -> Job:
        """Start the job as for podferry."""
        self._workload = workload
        return jobs.start(lab, SOURCE, NAME, workload)

    def move(self, job: Job) -> Moved:
        """Kill it, and start it on the target. `job` is the new one afterwards, and its reports are counted anew."""
        assert self._workload is not None, "it was started here"
        began = time.time_ns()
        _remove(job.lab)
        again = jobs.start(job.lab, TARGET, NAME, self._workload)
        ended = time.time_ns()
        job.node, job.root, job.signal, job.alive = again.node, again.root, again.signal, again.alive
        return Moved(Outcome.COMPLETED, began, ended, None, None, {"restart_ms": (ended - began) / 1e6})

    def stop(self, lab: Lab) -> None:
        """Remove the container."""
        _remove(lab)
