"""Read and write a Migration's state: its pods, phase and conditions, its events, and its end."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable

import structlog

from podferry import __version__
from podferry.controller import failures, pods
from podferry.core.migration import MIGRATION_ENDS, MigrationEvent, migration_machine
from podferry.kube import status as store
from podferry.kube.api_errors import ObjectNotFound
from podferry.kube.client import MIGRATIONS, PODS, Api, Json
from podferry.kube.conditions import Condition
from podferry.kube.events import Events
from podferry.kube.migration import (
    CANCELLED,
    COMPLETED,
    FAILED,
    FINALIZER,
    READABLE,
    REHEARSED,
    UID_LABEL,
    Ending,
    Migration,
    MigrationUnreadable,
    PodReference,
)
from podferry.kube.quantities import timestamp
from podferry.model import Outcome


class StatusWriter:
    """Reads and writes; decides nothing. Every write is a compare-and-swap or names the uid that it means."""

    def __init__(self, api: Api, ended: Callable[[Migration], object] = lambda _: None) -> None:
        """`ended` hears of each Migration that ends by a write of these books."""
        self._api, self._ended = api, ended
        self._events = Events(api, "podferry-controller")
        self._log = structlog.get_logger()

    async def read(self, namespace: str, name: str) -> Migration | None:
        """The Migration as it is now; None where there is none, or none that this version understands: that is left alone, and
        its condition says so."""
        body = await self._api.find(MIGRATIONS, name, namespace)
        if body is None:
            return None
        try:
            migration = Migration.from_json(body)
        except MigrationUnreadable as error:
            await self._leave_alone(body, error)
            return None
        if migration.status.condition(READABLE) is not None and not migration.status.holds(READABLE):
            migration = await self.set_condition(migration, READABLE, True, "Understood")
        return migration

    async def fresh(self, migration: Migration) -> Migration:
        """The Migration as the API server has it, whatever is remembered of it. Raises `ObjectNotFound`."""
        now = Migration.from_json(await self._api.get(MIGRATIONS, migration.name, migration.namespace))
        if now.uid != migration.uid:
            raise ObjectNotFound(f"the Migration {migration.name} is gone", why="another one has its name")
        return now

    async def _leave_alone(self, body: Json, error: MigrationUnreadable) -> None:
        status = body.get("status") or {}
        others = [one for one in status.get("conditions") or [] if one.get("type") != READABLE]
        if any(one.get("status") == "False" for one in status.get("conditions") or [] if one.get("type") == READABLE):
            return
        self._log.error(
            "a Migration is skipped", namespace=body["metadata"]["namespace"], error=str(error), why=error.why
        )
        said = Condition(
            type=READABLE,
            status="False",
            reason="NewerVersion",
            message=f"podferry {__version__} leaves it alone: {error.why}"[:32000],
            last_transition_time=timestamp(),
        )
        conditions = [*others, said.model_dump(mode="json", by_alias=True)]
        await self._api.replace(MIGRATIONS, {**body, "status": {**status, "conditions": conditions}}, "status")

    # Its pods.

    async def source(self, migration: Migration) -> Json | None:
        """The pod that leaves, where it is still there."""
        return await self._pod(migration, migration.status.source_pod)

    async def target(self, migration: Migration) -> Json | None:
        """The pod that takes its place, where it is there."""
        return await self._pod(migration, migration.status.target_pod)

    async def _pod(self, migration: Migration, wanted: PodReference | None) -> Json | None:
        """The very pod; one of the same name with another uid is somebody else."""
        if wanted is None:
            return None
        pod = await self._api.find(PODS, wanted.name, migration.namespace)
        return pod if pod is not None and pod["metadata"]["uid"] == wanted.uid else None

    async def release(self, pod: Json | None) -> None:
        """The pod is an ordinary one again."""
        if pod is not None and UID_LABEL in (pod["metadata"].get("labels") or {}):
            about = pod["metadata"]
            with contextlib.suppress(ObjectNotFound):
                await self._api.patch(PODS, about["name"], pods.unclaim(pod), about["namespace"], uid=about["uid"])

    # What is said.

    async def fire(
        self,
        migration: Migration,
        event: MigrationEvent,
        change: Callable[[Migration], object] | None = None,
        *,
        ending: Ending | None = None,
        message: str = "",
    ) -> Migration:
        """Take `event`, with what else belongs to it, in one write. Where another controller was faster, nothing is done."""
        before, after = migration.status.phase, migration_machine(migration.status.phase).next(event)
        written = False

        def moved(now: Migration) -> bool:
            nonlocal written
            if now.status.phase is not before:
                return False
            now.status.phase, now.status.message = after, message or now.status.message
            now.status.observed_generation = now.metadata.get("generation")
            if change is not None:
                change(now)
            if ending is not None and after in MIGRATION_ENDS:
                _end(now, ending)
            written = True
            return True

        migration = await store.change(self._api, migration, moved)
        if written:
            self._log.info(
                "phase",
                migration=migration.name,
                namespace=migration.namespace,
                pod=migration.spec.pod_name,
                phase=str(after),
                because=str(event),
                requested_by=migration.spec.requested_by or "",
            )
            if after in MIGRATION_ENDS:
                self._ended(migration)
            if ending is not None and after in MIGRATION_ENDS:
                await self._announce(migration, ending)
        return migration

    async def _announce(self, migration: Migration, end: Ending) -> None:
        warning = end.outcome not in (Outcome.COMPLETED, Outcome.REHEARSED)
        reason = f"Migration{migration.status.phase}"
        await self.publish_event(migration, reason, end.message, warning=warning)
        pod = (await self.target(migration)) or (await self.source(migration))
        if pod is not None:
            await self.publish_pod_event(pod, reason, f"{migration.name}: {end.message}", warning=warning)

    async def set_condition(
        self, migration: Migration, type: str, holds: bool, reason: str, message: str = ""
    ) -> Migration:
        """Set a condition."""

        def said(now: Migration) -> bool:
            now.status.set_condition(type, holds, reason, message)
            return True

        return await store.change(self._api, migration, said)

    async def publish_event(self, migration: Migration, reason: str, message: str, *, warning: bool = False) -> None:
        """An event about the Migration."""
        await self._events.publish(migration.to_json(), reason, message, warning=warning)

    async def publish_pod_event(self, pod: Json, reason: str, message: str, *, warning: bool = False) -> None:
        """An event about a pod."""
        await self._events.publish(pods.reference(pod), reason, message, warning=warning)

    # Its own life.

    async def hold_on(self, migration: Migration) -> bool:
        """Our finalizer is there, or was put there just now (False: read again)."""
        finalizers = migration.metadata.get("finalizers") or []
        if FINALIZER in finalizers or "deletionTimestamp" in migration.metadata:
            return True
        await self._finalizers(migration, [*finalizers, FINALIZER])
        return False

    async def close(self, migration: Migration) -> float | None:
        """It is let go, and deleted in its time."""
        finalizers = migration.metadata.get("finalizers") or []
        if FINALIZER in finalizers:
            await self._finalizers(migration, [one for one in finalizers if one != FINALIZER])
            return 0.0
        left = failures.of_age(migration, clock())
        if left is None or "deletionTimestamp" in migration.metadata:
            return None
        if left > 0:
            return left
        version = migration.metadata["resourceVersion"]  # its time may have been changed just now
        await self._api.delete(MIGRATIONS, migration.name, migration.namespace, uid=migration.uid, version=version)
        self._log.info("deleted in its time", migration=migration.name, namespace=migration.namespace)
        return None

    async def _finalizers(self, migration: Migration, wanted: list[str]) -> None:
        about = {"resourceVersion": migration.metadata["resourceVersion"], "finalizers": wanted}
        with contextlib.suppress(ObjectNotFound):
            await self._api.patch(
                MIGRATIONS, migration.name, {"metadata": about}, migration.namespace, uid=migration.uid
            )


def _end(migration: Migration, end: Ending) -> None:
    """The last write of a Migration's status."""
    status = migration.status
    status.kept_place = None
    status.ending, status.message, status.completion_time = end, end.message, timestamp()
    completed = end.outcome == Outcome.COMPLETED
    status.set_condition(COMPLETED, completed, end.reason, end.message)
    well = completed or end.outcome in (Outcome.CANCELLED, Outcome.REHEARSED)
    status.set_condition(FAILED, not well, end.reason, end.message)
    status.set_condition(CANCELLED, end.outcome == Outcome.CANCELLED, end.reason, end.message)
    if migration.spec.dry_run:
        status.set_condition(REHEARSED, end.outcome == Outcome.REHEARSED, end.reason, end.message)


def clock() -> datetime.datetime:
    """The time, as conditions are compared with it."""
    return datetime.datetime.now(datetime.UTC)
