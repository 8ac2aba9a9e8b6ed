"""A pod of two fake containers on two nodes: the real composite over the fakes of one container each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
from agent_fakes import FakeContainerMaker, Memory, SourceNode, TargetNode
from agent_rig import Guarded, Rig, guarded

from podferry.core.phases import SourcePhase, TargetPhase
from podferry.workload.makers import kubelet
from podferry.workload.makers.kubelet import KubeletMaker, KubeletOwner
from podferry.workload.numbers import address_space_of
from podferry.workload.offered import OfferedPod, PodPart
from podferry.workload.pod.cluster_port import PodName

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
        return {address_space_of(node.number, pid): pages for node in self.nodes for pid, pages in node.memory.items()}

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


class FakeKubeletContainer(FakeContainerMaker):
    """`podferry.workload.makers.kubelet.KubeletContainer` on a `TargetNode`."""

    @property
    def key(self) -> str:
        return f"m_{self.node.number}"

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.node.number)

    def mark_arrived(self) -> None:
        self.node.marked = True

    async def crash(self) -> None:
        self.node.task = self.node.running = self.node.container = False
        self.node.crashed = True


class Named(Guarded):
    """A part's fake behind points of its own."""

    def __init__(self, job: Any, ports: tuple[type, ...], rig: Rig, side: str, prefix: str) -> None:
        super().__init__(job, ports, rig, side)
        self._names -= {"entrust"}  # it only writes to the journal, whose lines are points
        self._prefix = prefix

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._job, name)
        if name in ("memory", "tree", "maker") and not callable(method):
            return Named(method, (type(method),), self._rig, self._side, f"{self._prefix} {name}")
        if not callable(method):
            return method
        return guarded(self._rig, self._side, f"{self._prefix} {name}", method) if name in self._names else method


@dataclass
class PodRig(Rig):
    """The rig, its job a pod of two containers. The second's methods are points as well: `1 dump`."""

    keeps: bool = False
    """Whether the target pod has the source's name."""
    was_replaced: bool = False
    """Whether the source's object is gone for the target pod's."""
    given_back: list[str] = field(default_factory=list)
    handed_over: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source = SourcePod([SourceNode(number) for number in range(SIZE)])  # type: ignore[assignment]
        self.target = Several([TargetNode(number) for number in range(SIZE)])  # type: ignore[assignment]

    # `podferry.workload.pod.cluster_port.Cluster`.

    async def target_pod(self, id: str) -> PodName:
        await self.apoint("target", "target_pod", "before")
        if self.keeps:
            if not self.passed_the_right:
                self.violations.append("the source's object goes before the right to run has passed")
            self.configs["b"].incoming.mkdir(parents=True, exist_ok=True)
            self.was_replaced = True
            await self.apoint("target", "target_pod", "after")
        return PodName("ns", "job.2", "uid-target")

    def keeps_name(self, id: str) -> bool:
        return self.keeps

    async def replaced(self, id: str) -> bool:
        await self.apoint("source", "replaced", "before")
        return self.was_replaced

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
        first, *others = found = super().containers(fake, side, journal)
        if side == "target":
            for one in found:
                one.maker = FakeKubeletContainer(one.node)
        return [first, *(Named(one, (fake,), self, side, str(number)) for number, one in enumerate(others, 1))]

    def owner(self, journal: Any) -> Any:
        return KubeletOwner(
            journal, lambda: self.hand_over("m"), departed=self.departed, replaced=lambda: self.replaced("m")
        )

    def maker(self, config: Any, journal: Any) -> Any:
        return KubeletMaker(config, journal, self)  # type: ignore[arg-type]

    def handlers(self, side: str) -> dict[str, Any]:
        there: Any = self
        if side == "source":
            return {**kubelet.source_handlers(), **super().handlers(side)}
        return {**kubelet.target_handlers(self.configs["b"], there, there, there), **super().handlers(side)}

    @property
    def departed(self) -> Path:
        return self.configs["a"].departed / POD.uid

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
            assert not self.was_replaced, "a job goes on in a pod that is not there"
            with suppress(IndexError):
                assert self.given_back or self.keeps or "prepared" not in self.phases("b")
