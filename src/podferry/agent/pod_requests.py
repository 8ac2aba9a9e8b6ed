"""Migrations of pods, begun and followed for the agent's Kubernetes side: `Pods` of `podferry.workload.pod.cluster_port`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from podferry.agent.migrations import MIGRATION, Migrations, pod_of
from podferry.core.phases import SourceEvent
from podferry.core.strict import to_json
from podferry.engine.journal import Journal
from podferry.engine.rehearsal import REHEARSAL, RehearsalAlone
from podferry.engine.source import Source
from podferry.engine.target import Target
from podferry.errors import Refused, UsageError
from podferry.workload.pod.cluster_port import PodMigration, PodName, PodOrder

Json = dict[str, Any]


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


class PodRequests:
    """What the Kubernetes side asks for of this node's `migrations`."""

    def __init__(self, migrations: Migrations) -> None:
        self._migrations = migrations

    async def move(self, order: PodOrder) -> PodMigration:
        """Set out, unless this migration was here before."""
        if not MIGRATION.fullmatch(order.id):
            raise UsageError(f"{order.id[:80]!r} cannot be a migration's name")
        if (known := self._known(order.id)) is not None:
            return known
        pods, name = self._migrations.pods, str(order.pod)
        self._migrations.refuse_second(name, order.pod)
        source = self._migrations.set_out(
            order.id,
            name,
            order.target,
            pods,
            partial(pods.view, order.pod, order.containers, order.probes, order.memory_limits),
            order=replace(REHEARSAL, connections=order.order.connections) if order.rehearse else order.order,
            half=RehearsalAlone if order.rehearse else Source,
            mode=order.order.mode,
            pod=to_json(order.pod),
        )
        return Half(source, order.pod)

    def migrations(self) -> Mapping[str, PodMigration]:
        """Every half on this node since the agent's start, by id."""
        halves: dict[str, PodMigration] = {}
        for side in self._migrations.all():
            if (pod := pod_of(side.journal)) is not None:
                halves[side.record.id] = Half(side, pod)
        return halves

    def _known(self, id: str) -> PodMigration | None:
        if (half := self.migrations().get(id)) is not None:
            return half
        directory = self._migrations.directory(id)
        if not directory.exists():
            return None
        journal = Journal(directory)
        journal.close()
        pod, record = pod_of(journal), journal.load_record() or journal.facts.get("record")
        if pod is None or record is None:
            raise UsageError(f"{id} is the name of another migration", why="it was not of a pod")
        return Remembered(record, pod)
