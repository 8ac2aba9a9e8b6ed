"""Migrations of pods, as the agent's Kubernetes side begins and follows them: `podferry.workload.pod.ports.Pods`, fulfilled."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from podferry.core.facts import ContainerFacts, NodeFacts
from podferry.core.phases import SourceEvent
from podferry.core.preflight import Question, refusals
from podferry.core.strict import from_json, to_json
from podferry.engine.journal import Journal, Part
from podferry.engine.migration_record import MigrationRecord
from podferry.engine.rehearsal import REHEARSAL, RehearsalAlone
from podferry.engine.source import Order, Source
from podferry.engine.target import Target
from podferry.errors import Refused, UsageError
from podferry.model import Mode
from podferry.node.containerd import Containerd
from podferry.node.cri import NAMESPACE
from podferry.node.crio import Crio
from podferry.node.records import Container, Opaque
from podferry.node.runtime import ContainerRuntime
from podferry.wire.channel import Channel
from podferry.wire.messages import Offer
from podferry.workload.account import Promise
from podferry.workload.config import Config
from podferry.workload.frozen import FrozenContainer
from podferry.workload.makers import kubelet
from podferry.workload.makers.kubelet import KubeletOwner
from podferry.workload.pod.inspection import PodInspection
from podferry.workload.pod.offered import OfferedPod
from podferry.workload.pod.ports import Cluster, PodMigration, PodName, PodOrder
from podferry.workload.source import FrozenWorkload, SourceWorkload
from podferry.workload.threads import run

Json = dict[str, Any]
Start = Callable[[Callable[[], Awaitable[None]]], None]
Dial = Callable[[str], AbstractAsyncContextManager[Channel]]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")


class Half:
    """One half of a pod's migration that is under way, or has ended since the agent's start."""

    def __init__(self, side: Source | Target, pod: PodName) -> None:
        self._side, self._pod = side, pod

    @property
    def id(self) -> str:
        """The Migration's uid."""
        return self._side.record.id

    @property
    def role(self) -> str:
        """`source` or `target`."""
        return self._side.role

    @property
    def pod(self) -> PodName:
        """The pod that moves: the source's."""
        return self._pod

    def record(self) -> Json:
        """All that is known now."""
        return self._side.record.to_dict()

    def listen(self, listener: Callable[[Json], None]) -> Callable[[], None]:
        """Call `listener` with each event."""
        return self._side.record.listen(listener)

    async def wait(self) -> Json:
        """Return the record once this half has ended."""
        await self._side.ended.wait()
        return self.record()

    def cancel(self) -> bool:
        """Ask for the way back."""
        return isinstance(self._side, Source) and self._side.cancel()

    def resolve(self, *, run_on_source: bool) -> None:
        """An arbiter's verdict on a migration that lost contact after GO."""
        if not isinstance(self._side, Source):
            raise Refused("only the source's side of a migration can be resolved, and this is the target's")
        self._side.resolve(SourceEvent.RESOLVED_HERE if run_on_source else SourceEvent.RESOLVED_THERE)


class Remembered:
    """The source's half of a migration that had ended before the agent's start."""

    role = "source"

    def __init__(self, record: Json, pod: PodName) -> None:
        self._record, self._pod = record, pod

    @property
    def id(self) -> str:
        """The Migration's uid."""
        return str(self._record["id"])

    @property
    def pod(self) -> PodName:
        """The pod that moved."""
        return self._pod

    def record(self) -> Json:
        """All that is known."""
        return self._record

    def listen(self, listener: Callable[[Json], None]) -> Callable[[], None]:
        """There is nothing more to tell."""
        return lambda: None

    async def wait(self) -> Json:
        """It has ended."""
        return self._record

    def cancel(self) -> bool:
        """It is too late."""
        return False

    def resolve(self, *, run_on_source: bool) -> None:
        """It has ended."""
        raise Refused("there is nothing to resolve: the migration has ended")


class PodEngine:
    """What an agent does for pods. `sources` and `targets` are the halves of all its migrations, which it adds to."""

    def __init__(
        self,
        config: Config,
        cluster: Cluster | None,
        *,
        sources: dict[str, Source],
        targets: dict[str, Target],
        start: Start,
        dial: Dial,
    ) -> None:
        self._config, self._given_cluster = config, cluster
        self.runtime = runtime_of_pods(config)
        self._inspection = PodInspection(config, self.runtime)
        self._sources, self._targets, self._start, self._dial = sources, targets, start, dial

    @property
    def _cluster(self) -> Cluster:
        if self._given_cluster is None:
            raise Refused(
                f"the agent of {self._config.node} does not belong to a Kubernetes cluster",
                remedy="run podferry's DaemonSet there",
            )
        return self._given_cluster

    # What the Kubernetes side asks.

    async def move(self, order: PodOrder) -> PodMigration:
        """Set out, unless this migration was here before."""
        if not _ID.fullmatch(order.id):
            raise UsageError(f"{order.id[:80]!r} cannot be a migration's name")
        if (known := self._known(order.id)) is not None:
            return known
        self._refuse_second(order.pod)
        self._start(partial(run, self.sweep))
        journal = Journal(self._config.migrations / order.id)
        migration_record = MigrationRecord(order.id, str(order.pod), self._config.node, order.target, order.order.mode)
        journal.note(role="source", record=migration_record.to_dict(), pod=to_json(order.pod))
        engine, half = (REHEARSAL, RehearsalAlone) if order.rehearse else (order.order, Source)
        source = half(engine, partial(self._dial, order.target), journal, migration_record, kubelet.source_handlers())
        self._sources[order.id] = source

        async def propose() -> tuple[Offer, SourceWorkload]:
            view = await run(self._inspection.pod, order.pod, order.containers)
            choice = view.demand_movable(order.order.mode)
            migration_record.extra["tracker"], migration_record.extra["tracker_reason"] = (
                str(choice.kind),
                choice.reason,
            )
            migration_record.extra["warnings"] = view.warnings(order.order.mode)
            journal.note(offered=view.offered.to_dict(), record=migration_record.to_dict())
            hand_over = partial(self._cluster.hand_over, order.id)
            job = view.source(self._config, self.runtime, journal, choice.kind, hand_over, order.probes)
            return replace(view.offer(order.id, order.order.mode), rehearsal=order.rehearse), job

        self._start(partial(source.run, propose))
        return Half(source, order.pod)

    def migrations(self) -> Mapping[str, PodMigration]:
        """Every half on this node since the agent's start, by id."""
        halves: dict[str, PodMigration] = {}
        sides: list[Source | Target] = [*self._sources.values(), *self._targets.values()]
        for side in sides:
            if (pod := pod_of(side.journal)) is not None:
                halves[side.record.id] = Half(side, pod)
        return halves

    def _known(self, id: str) -> PodMigration | None:
        if (half := self.migrations().get(id)) is not None:
            return half
        directory = self._config.migrations / id
        if not directory.exists():
            return None
        journal = Journal(directory)
        journal.close()
        pod, record = pod_of(journal), journal.load_record() or journal.facts.get("record")
        if pod is None or record is None:
            raise UsageError(f"{id} is the name of another migration", why="it was not of a pod")
        return Remembered(record, pod)

    def _refuse_second(self, pod: PodName) -> None:
        for half in self.migrations().values():
            if half.pod == pod and half.record()["outcome"] is None:
                raise Refused(
                    f"{pod} is being migrated already", why=f"migration {half.id}", remedy="wait for it, or cancel it"
                )

    # What the agent asks for halves of pods.

    def node_facts(self) -> NodeFacts:
        """What this node is and has."""
        return self._inspection.node_facts()

    def weigh(self, offer: Offer) -> tuple[NodeFacts, list[Refused]]:
        """Can this node take the pod that is offered?"""
        here = self._inspection.node_facts()
        container = ContainerFacts.from_dict(offer.facts.get("container"))
        source = NodeFacts.from_dict(offer.facts.get("node"))
        found = refusals(Question(container, source, here, Mode(offer.mode)))
        try:
            _ = self._cluster
        except Refused as outside:
            found.insert(0, outside)
        return here, found

    def target(
        self, journal: Journal, migration_record: MigrationRecord, offered: OfferedPod, promise: Promise | None = None
    ) -> Target:
        """The target's half. `promise` is what the pod was promised of memory and disk."""
        self._start(partial(run, self.sweep))
        job = kubelet.target(self._config, self.runtime, journal, offered, self._cluster, promise)
        handlers = kubelet.target_handlers(self._config, self.runtime, self._cluster)
        return Target(job, journal, migration_record, handlers)

    def source_again(self, journal: Journal, migration_record: MigrationRecord) -> Source:
        """The source's half that an earlier agent left."""
        held = None
        if "offered" in journal.facts:
            offered = OfferedPod.from_dict(journal.facts["offered"], migration_record.name)
            containers = [
                FrozenContainer(Part(journal, number), self.runtime, _record(one.id))
                for number, one in enumerate(offered.containers)
            ]
            departed = self._config.departed / offered.pod.uid
            held = FrozenWorkload(
                containers,
                KubeletOwner(journal, partial(self._cluster.hand_over, migration_record.id), departed=departed),
            )
        return Source(
            Order(migration_record.mode),
            partial(self._dial, migration_record.target),
            journal,
            migration_record,
            kubelet.source_handlers(),
            held,
        )

    def target_again(self, journal: Journal, migration_record: MigrationRecord) -> Target:
        """The target's half that an earlier agent left."""
        return self.target(
            journal, migration_record, OfferedPod.from_dict(journal.facts["offered"], migration_record.name)
        )

    def sweep(self) -> None:
        """Remove the marks of pods that are gone from this node."""
        for mark in self._marks():
            uid = mark.name.partition("_")[0]
            if not self.runtime.holds_pod(uid):
                mark.unlink(missing_ok=True)

    def _marks(self) -> Iterator[Path]:
        for directory in (self._config.arrived, self._config.departed):
            with suppress(FileNotFoundError):
                yield from directory.iterdir()


def runtime_of_pods(config: Config) -> ContainerRuntime:
    """What makes the pods' containers on this node."""
    return Crio(Path(config.crio)) if config.crio else Containerd(config.containerd, NAMESPACE)


def pod_of(journal: Journal) -> PodName | None:
    """The pod whose migration a journal tells, or None where it is of a container alone."""
    found = journal.facts.get("pod") or journal.facts.get("offered", {}).get("pod")
    return from_json(PodName, json.loads(json.dumps(found))) if found else None


def _record(id: str) -> Container:
    """What must be known of a container of the kubelet's to find its groups."""
    return Container(id, image="", snapshotter="", snapshot_key="", spec=Opaque("", b"{}"))
