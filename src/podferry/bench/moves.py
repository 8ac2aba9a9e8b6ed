"""What moves a benchmark's job from one node to the other: podferry in its modes. `runc.py` has what there was before."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from podferry.bench import agent_usage, job
from podferry.bench.job import BUNDLES, Job
from podferry.bench.workload import Workload
from podferry.errors import PodferryError
from podferry.lab import Lab, containers
from podferry.model import Outcome

SOURCE, TARGET = "node-a", "node-b"
NAME = "bench"


@dataclass(frozen=True)
class Moved:
    """One move. Moments are ns of unix time; `frozen` is one at which the job certainly stood still, `home` when all
    of its memory was on the target, both `None` where it did not come to that."""

    outcome: str
    began: int
    ended: int
    frozen: int | None
    home: int | None
    facts: dict[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A way to move a job from `SOURCE` to `TARGET`."""

    def start(self, lab: Lab, workload: Workload) -> Job:
        """Start the job on the source and wait until it is ready."""
        ...

    def move(self, job: Job) -> Moved:
        """Move it. `job.node` is where it is afterwards. Raises only where the benchmark itself cannot go on."""
        ...

    def stop(self, lab: Lab) -> None:
        """Remove the job, wherever it is, as far as there is one."""
        ...


@dataclass(frozen=True)
class Podferry:
    """podferry itself. `options` are those of the agent's `migrate`; `watch` samples memory on the target meanwhile."""

    mode: str
    options: dict[str, Any] = field(default_factory=dict)
    watch: bool = False

    def start(self, lab: Lab, workload: Workload) -> Job:
        """Start the job through containerd and podferry-runc."""
        return job.start(lab, SOURCE, NAME, workload)

    def move(self, job: Job) -> Moved:
        """Ask the source's agent, as `podferry migrate` does."""
        lab = job.lab
        pid = int((lab.root(SOURCE) / BUNDLES / NAME / "init.pid").read_text())
        memory = agent_usage.anonymous_bytes(lab, SOURCE, pid)
        for node in (SOURCE, TARGET):
            agent_usage.forget_peak(lab, node)
        began = time.time_ns()
        samples: list[agent_usage.Sample] = []
        order = {"name": NAME, "to": TARGET, "mode": self.mode, **self.options}
        try:
            if self.watch:
                with agent_usage.TargetSampler(lab, TARGET, BUNDLES / NAME) as watch:
                    record = agent_usage.ask(lab, SOURCE, "migrate", **order)
                samples = watch.samples
            else:
                record = agent_usage.ask(lab, SOURCE, "migrate", **order)
        except PodferryError as error:
            return Moved("refused", began, time.time_ns(), None, None, {"error": error.to_dict()})
        ended = time.time_ns()
        if record["outcome"] == Outcome.COMPLETED:
            job.node = TARGET
        at, spans = _timeline(record)
        frozen, home = spans.get("freeze") if "downtime" in spans else None, None
        for arrival in agent_usage.ask(lab, TARGET, "status", id=record["id"]):
            there, on_target = _timeline(arrival)
            home = there(on_target["fill"]["end_ms"]) if "fill" in on_target else None
        facts = {
            "id": record["id"],
            "reason": record["reason"],
            "error": record["error"],
            "agents_downtime_ms": record["downtime_ms"],
            "agents_total_ms": record["total_ms"],
            "wire_bytes": record["wire_bytes"],
            "nonzero_bytes": memory,
            "rounds": record["rounds"],
            "rounds_detail": record["rounds_detail"],
            "phases": record["phases"],
            "spans": record["spans"],
            "tracker": record.get("tracker"),
            "dump": record.get("dump"),
            "postcopy": record.get("postcopy_dependency", False),
            "agent_bytes": {node: agent_usage.peak_bytes(lab, node) for node in (SOURCE, TARGET)},
            "samples": [[one.at, one.store, one.daemon, one.job] for one in samples],
        }
        return Moved(
            outcome=record["outcome"],
            began=at(0),
            ended=ended,
            frozen=at(frozen["end_ms"]) if frozen else None,
            home=home,
            facts=facts,
        )

    def stop(self, lab: Lab) -> None:
        """Remove the container."""
        if containers.holders(lab, NAME):
            containers.stop(lab, NAME)


def _timeline(record: dict[str, Any]) -> tuple[Callable[[float], int], dict[str, dict[str, Any]]]:
    """From a record's milliseconds to ns of unix time, and its spans by name."""
    return lambda ms: int(record["started_at"] * 1e9 + ms * 1e6), {span["name"]: span for span in record["spans"]}
