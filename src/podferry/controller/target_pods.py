"""Making the target pod, once the target's agent has asked for it.

A pod that keeps its name is made of what was kept of the source, whose object goes before: two pods of one name cannot be. From the
line in the status that says so (`SourceReplaced`) the job can only go on in the target pod. It is written when the target's agent
has said that the right to run is there, with all of the job's state, and when an admission policy is seen to keep the name from the
pod's owner, who would be faster. Deleting and creating are repeated until both are done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

from podferry.controller import failures, pods
from podferry.controller.status_writer import StatusWriter, clock
from podferry.controller.verdicts import given_up
from podferry.core.migration import MigrationPhase
from podferry.core.phases import TargetPhase
from podferry.kube import status as store
from podferry.kube.api_errors import ApiFailed, Conflict, Forbidden, ObjectAlreadyExists, transient
from podferry.kube.client import PODS, Api, Json
from podferry.kube.migration import (
    MOST_KEPT,
    SOURCE_REPLACED,
    TARGET_CREATED,
    Ending,
    EnginePhases,
    Migration,
    PodReference,
)

POLL_AGAIN = 2.0
REMADE_IN = 0.5


class TargetPods:
    """Does what is next for the target pod of one migration."""

    def __init__(
        self,
        api: Api,
        writer: StatusWriter,
        patience: float,
        remove: Callable[[Migration, list[Json]], Awaitable[None]],
    ) -> None:
        """`patience`: seconds for which a refusal of a pod that keeps its name is tried again; `remove` deletes pods."""
        self._api, self._writer, self._patience, self._remove = api, writer, patience, remove

    async def step(self, migration: Migration, source: Json | None, target: Json | None) -> float | Ending:
        """Seconds until the next look; or why there will be no target pod."""
        if migration.status.keeps_name:
            return await self._replace(migration, source, target)
        assert source is not None
        if target is not None:
            return await self._dress(migration, source, target)
        body = pods.target_pod(source, migration, migration.status.target_node or "", clock())
        return await self._make(migration, source, body)

    async def _replace(self, migration: Migration, source: Json | None, target: Json | None) -> float | Ending:
        if not migration.status.holds(SOURCE_REPLACED):
            assert source is not None
            kept = pods.keep_place(source, migration, migration.status.target_node or "", clock())
            if (failure := await self._against(migration, source, kept)) is not None:
                return failure
            migration = await store.change(self._api, migration, given_up(kept))
        if (place := pods.kept_place(migration)) is None:
            return REMADE_IN  # it is being taken back: the next look finds why
        if source is not None:
            about = source["metadata"]
            with contextlib.suppress(Conflict):  # another pod has the name by now
                await self._api.delete(PODS, about["name"], migration.namespace, uid=about["uid"], grace=0)
        if target is not None:
            return await self._dress(migration, place.source, target)
        found = await self._make(migration, place.source, place.target)
        since = migration.status.condition(SOURCE_REPLACED)
        if isinstance(found, Ending) and since and failures.age(since.last_transition_time, clock()) < self._patience:
            return REMADE_IN  # the quota may not know yet that the source is gone, say
        return found

    async def _against(self, migration: Migration, source: Json, kept: str) -> Ending | None:
        """What speaks against giving the source's object up."""
        engine = migration.status.engine or EnginePhases()
        if engine.target != TargetPhase.RESUME:
            return failures.of_old_agent(migration)
        if len(kept) > MOST_KEPT:
            return failures.of_large_pod(source)
        if not await self._name_is_kept(migration, pods.probe(kept)):
            return failures.of_free_name(source)
        return None

    async def _name_is_kept(self, migration: Migration, probe: Json) -> bool:
        """Whether the API server refuses a pod of this name, as it would its owner's, and as an admission policy has it."""
        try:
            await self._api.create(PODS, probe, migration.namespace, dry=True)
        except Forbidden as refused:
            return pods.KEPT_NAMES in refused.why
        except ObjectAlreadyExists:
            pass
        return False

    async def _make(self, migration: Migration, source: Json, body: Json) -> float | Ending:
        name = pods.name_of(source, migration, pods.PLACEHOLDER)
        placeholder = await self._api.find(PODS, name, migration.namespace)
        if placeholder is not None and pods.made_by(placeholder, migration):
            await self._api.delete(PODS, name, migration.namespace, uid=placeholder["metadata"]["uid"], grace=0)
        try:
            target = await self._api.create(PODS, body, migration.namespace)
        except ObjectAlreadyExists:
            target = await self._api.get(PODS, body["metadata"]["name"], migration.namespace)
            if not pods.as_made(target, body):
                if not pods.made_by(target, migration):
                    return failures.of_taken_name(body, "the target pod")
                # An earlier try of ours that admission has added to, or somebody's pod that names us as its owner: nothing tells
                # the two apart. It is the Migration's to remove, and not to adopt.
                if (await self._writer.fresh(migration)).status.target_pod is None:
                    await self._remove(migration, [target])
                return REMADE_IN
        except ApiFailed as refused:
            if transient(refused) and "webhook" not in refused.why:
                raise
            failure = failures.of_creation(refused, "the target pod")
            await self._writer.set_condition(migration, TARGET_CREATED, False, failure.reason, failure.message)
            return failure

        def noted(now: Migration) -> bool:
            now.status.target_pod = PodReference(name=target["metadata"]["name"], uid=target["metadata"]["uid"])
            return now.status.phase is MigrationPhase.RUNNING

        # Its uid before all else: by that it is ours, whatever admission and a restart of this controller come between.
        return await self._dress(await store.change(self._api, migration, noted), source, target)

    async def _dress(self, migration: Migration, source: Json, target: Json) -> float:
        """The target gets the source's labels, and the agents hear of it only then."""
        if (labels := pods.wear_labels(source, target)) is not None:
            about = target["metadata"]
            target = await self._api.patch(PODS, about["name"], labels, migration.namespace, uid=about["uid"])

        def made(now: Migration) -> bool:
            now.status.set_condition(TARGET_CREATED, True, "PodCreated", target["metadata"]["name"])
            return now.status.phase is MigrationPhase.RUNNING

        await store.change(self._api, migration, made)
        await self._writer.publish_pod_event(
            target, "MigrationTarget", f"waits for {migration.spec.pod_name} to move in"
        )
        return POLL_AGAIN
