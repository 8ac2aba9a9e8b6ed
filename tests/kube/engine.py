"""An engine of a few lines in place of the real one: `Pods` of `workload.pod.cluster_port`, whose halves do what the test says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import anyio

from podferry.agent.kubernetes import Kubernetes
from podferry.core.phases import SourcePhase, TargetPhase
from podferry.errors import Cancelled, PodferryError, Refused
from podferry.workload.pod.cluster_port import PodMigration, PodName, PodOrder

Json = dict[str, Any]


class Half:
    """One half; `enter` and `end` are the test's."""

    def __init__(self, id: str, role: str, pod: PodName) -> None:
        self.id, self.role, self.pod = id, role, pod
        self.ended = anyio.Event()
        self.cancelled = self.resolved = ""
        self.owes = False
        self._listeners: list[Callable[[Json], None]] = []
        self._record: Json = {
            "phase": "",
            "outcome": None,
            "reason": "",
            "error": None,
            "wire_bytes": 0,
            "rounds": 0,
            "downtime_ms": None,
        }

    def record(self) -> Json:
        return dict(self._record)

    def listen(self, listener: Callable[[Json], None]) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def wait(self) -> Json:
        await self.ended.wait()
        return self.record()

    def cancel(self) -> bool:
        if self.role != "source" or self.cancelled or self.ended.is_set():
            return False
        self.cancelled = "yes"
        self.end("cancelled", Cancelled("the migration was cancelled"))
        return True

    def resolve(self, *, run_on_source: bool) -> None:
        if self._record["phase"] != SourcePhase.LOST:
            raise Refused("there is nothing to resolve")
        if self.owes and not run_on_source:
            raise Refused("the job on the target may lack pages")
        self.resolved = "source" if run_on_source else "target"
        self.end("rolled-back" if run_on_source else "completed")

    def enter(self, phase: str, **changes: Any) -> None:
        self._record |= {"phase": str(phase), **changes}
        for listener in list(self._listeners):
            listener({"phase": phase, "total_bytes": 1000, "rate": 100, "eta_s": 3.0})

    def end(self, outcome: str, error: PodferryError | None = None) -> None:
        reason = str(error) if error else "the job runs on the target"
        self.enter(outcome, outcome=outcome, reason=reason, error=error and error.to_dict())
        self.ended.set()


class Engine:
    """The engine of one node."""

    def __init__(self) -> None:
        self.halves: dict[str, Half] = {}
        self.orders: list[PodOrder] = []
        self.refuses: PodferryError | None = None

    async def move(self, order: PodOrder) -> PodMigration:
        if self.refuses is not None:
            raise self.refuses
        self.orders.append(order)
        half = self.halves[order.id] = Half(order.id, "source", order.pod)
        half.enter(SourcePhase.CHECK)
        return half

    def migrations(self) -> Mapping[str, PodMigration]:
        return self.halves

    async def move_whole(
        self, id: str, here: Kubernetes, there: Engine, cluster_there: Kubernetes, resume: Any
    ) -> None:
        """Both halves of a move that goes well, as the real engine asks its `Cluster`."""
        source = self.halves[id]
        target = there.halves[id] = Half(id, "target", source.pod)
        target.enter(TargetPhase.RECEIVE)
        source.enter(SourcePhase.PRECOPY, wire_bytes=500, rounds=2)
        source.enter(SourcePhase.PREPARE_TARGET)
        await cluster_there.target_pod(id)
        target.enter(TargetPhase.PREPARED)
        source.enter(SourcePhase.CUTOVER)
        source.enter(SourcePhase.RESUME)
        await resume()
        target.enter(TargetPhase.FILL)
        source.enter(SourcePhase.COMMIT, downtime_ms=321.0)
        await here.hand_over(id)
        source.enter(SourcePhase.DRAIN)
        target.enter(TargetPhase.DONE)
        target.ended.set()
        source.end("completed")
