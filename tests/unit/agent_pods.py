"""A pod of two fake containers on two nodes: the real composite over the fakes of one container each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
from agent_fakes import FakeArriving, FakeChannel, Memory, SourceNode, TargetNode
from agent_rig import RECORD, Guarded, Rig, guarded

from podferry.core.phases import SourcePhase, TargetPhase
from podferry.engine.ports import ArrivingJob
from podferry.model import Mode
from podferry.node.records import Container
from podferry.workload.makers import kubelet
from podferry.workload.makers.kubelet import KubeletOwner
from podferry.workload.numbers import space_of
from podferry.workload.pod import arriving as arriving_pod
from podferry.workload.pod.arriving import ArrivingPod
from podferry.workload.pod.offered import OfferedPod, PodPart
from podferry.workload.pod.ports import PodName

POD = PodName("ns", "job", "uid-source")
OFFERED = OfferedPod(POD, (PodPart("main", "c0", ()), PodPart("side", "c1", ())), ())
SIZE = len(OFFERED.containers)


class Several:
    """Nodes' shares of a pod's containers, as the rig looks at one."""

    def __init__(self, nodes: list[Any]) -> None:
        self.nodes = nodes

    @property
    def executing(self) -> bool:
        return any(node.executing for node in self.nodes)

    @property
    def memory(self) -> Memory:
        return {space_of(node.number, pid): pages for node in self.nodes for pid, pages in node.memory.items()}

    @property
    def files(self) -> dict[str, bytes]:
        return {f"{node.number}/{name}": data for node in self.nodes for name, data in node.files.items()}

    @property
    def log(self) -> list[bytes]:
        return [node.log for node in self.nodes]

    def residue(self) -> list[str]:
        return [kind for node in self.nodes for kind in node.residue()]

    def handlers(self) -> dict[str, Any]:
        def of(kind: str) -> Callable[[Mapping[str, Any]], Any]:
            return lambda facts: self.nodes[facts["node"]].handlers()[kind](facts)

        return {kind: of(kind) for kind in self.nodes[0].handlers()}


class SourcePod(Several):
    """The original pod. Where it ends by itself, its last container does."""

    @property
    def alive(self) -> bool:
        return any(node.alive for node in self.nodes)

    @property
    def ended(self) -> anyio.Event:
        ended: anyio.Event = self.nodes[-1].ended
        return ended

    def tick(self) -> None:
        for node in self.nodes:
            node.tick()

    def end_by_itself(self) -> bool:
        return bool(self.nodes[-1].end_by_itself())


class FakePart(FakeArriving):
    """`podferry.workload.pod.arriving_part.ArrivingPart` on a `TargetNode`."""

    name = "part"

    def has_connections(self) -> bool:
        return False

    def expect(self, uid: str) -> None:
        self.uid = uid

    async def made(self, timeout: float) -> Container:
        await anyio.sleep(0.05)
        return RECORD

    async def crash(self) -> None:
        self.node.task = self.node.running = self.node.container = False
        self.node.crashed = True

    async def filled(self) -> dict[str, Any]:
        while self.node.absent:
            await self.node.news.wait()
        return {"pages": 1}

    def entrust(self) -> None:
        for kind in ("task", "container"):
            self.journal.release(kind)

    def mark_arrived(self) -> None:
        self.node.marked = True


class Named(Guarded):
    """A part's fake behind points of its own."""

    def __init__(self, job: Any, ports: tuple[type, ...], rig: Rig, side: str, prefix: str) -> None:
        super().__init__(job, ports, rig, side)
        self._prefix = prefix

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._job, name)
        if name == "dumped":
            return method
        if name in ("memory", "tree") and not callable(method):
            return Named(method, (type(method),), self._rig, self._side, f"{self._prefix} {name}")
        return guarded(self._rig, self._side, f"{self._prefix} {name}", method) if name in self._names else method


@dataclass
class PodRig(Rig):
    """The rig, its job a pod of two containers. The second's methods are points as well: `1 dump`."""

    given_back: list[str] = field(default_factory=list)
    handed_over: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source = SourcePod([SourceNode(number) for number in range(SIZE)])  # type: ignore[assignment]
        self.target = Several([TargetNode(number) for number in range(SIZE)])  # type: ignore[assignment]
        for node in self.target.nodes:  # type: ignore[attr-defined]
            node.crashed = node.marked = False

    # `podferry.workload.pod.ports.Cluster`.

    async def target_pod(self, id: str) -> PodName:
        await self.apoint("target", "target_pod", "before")
        return PodName("ns", "job.2", "uid-target")

    async def give_back(self, id: str) -> None:
        await self.apoint("target", "give_back", "before")
        self.given_back.append(id)

    async def hand_over(self, id: str) -> None:
        await self.apoint("source", "hand_over", "before")
        there = [node.executing or node.crashed for node in self.target.nodes]  # type: ignore[attr-defined]
        if self.source.executing or not all(there):
            self.violations.append("the owner is told of a pod that does not run, or not of it alone")
        self.handed_over.append(id)

    # What the agents are made with.

    def nodes(self, side: str) -> list[Any]:
        there: list[Any] = (self.source if side == "source" else self.target).nodes  # type: ignore[attr-defined]
        return there

    def containers(self, fake: Any, side: str, journal: Any) -> list[Any]:
        first, *others = super().containers(fake, side, journal)
        port = fake if side == "source" else ArrivingJob
        return [first, *(Named(one, (port,), self, side, str(number)) for number, one in enumerate(others, 1))]

    def owner(self, journal: Any) -> Any:
        return KubeletOwner(journal, lambda: self.hand_over("m"), departed=self.departed)

    def arriving(self, config: Any, containerd: None, journal: Any, offered: Any, *_: Any) -> Guarded:
        journal = journal._journal
        parts = self.containers(FakePart, "target", journal)
        return Guarded(ArrivingPod(config, journal, OFFERED, parts, self), (ArrivingJob,), self, "target")

    def handlers(self, side: str) -> dict[str, Any]:
        of_pods = kubelet.source_handlers() if side == "source" else arriving_pod.handlers(None, self)  # type: ignore[arg-type]
        return {**super().handlers(side), **of_pods}

    @property
    def departed(self) -> Path:
        return self.configs["a"].departed / POD.uid

    def move(self, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> Rig:
        with monkeypatch.context() as patch:
            patch.setattr(arriving_pod, "FeederChannel", FakeChannel)
            return super().move(mode, monkeypatch)

    def check(self) -> None:
        """All containers or none, and the marks and the owner told accordingly."""
        super().check()
        source, target = SourcePhase(self.phase("a") or SourcePhase.CHECK), self.phase("b")
        runs_there = [node.running for node in self.target.nodes]  # type: ignore[attr-defined]
        crashed = any(node.crashed for node in self.target.nodes)  # type: ignore[attr-defined]
        assert len(set(runs_there)) == 1 or target == TargetPhase.DIED or crashed, "a part of the pod runs"
        if source is SourcePhase.COMPLETED:
            assert self.handed_over
            assert self.departed.exists(), "what has left may start again"
        elif source.value in ("rolled-back", "cancelled", "refused"):
            assert not self.handed_over
            assert not self.departed.exists(), "what is still here may not start again"
            with suppress(IndexError):
                assert self.given_back or "poised" not in self.phases("b")
