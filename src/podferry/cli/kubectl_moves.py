"""The cluster side of `kubectl podferry`: create, read and change Migrations."""

from __future__ import annotations

import math
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio

from podferry.cli.migrate import UserLeft
from podferry.cli.record import ProgressRecord
from podferry.cli.views import EventView
from podferry.controller.eligibility import PodUnfit, keeps_name
from podferry.controller.eligibility import obstacles as find_obstacles
from podferry.controller.policies import AppliedPolicy, Policies, forbids
from podferry.controller.surroundings import Surveyor
from podferry.errors import PodferryError, Refused, UsageError
from podferry.kube.api_errors import ApiFailed, Conflict, Forbidden, NotServed, ObjectNotFound
from podferry.kube.client import EVENTS, MIGRATIONS, PODS, Api, ResourceKind
from podferry.kube.migration import Migration
from podferry.kube.quantities import seconds
from podferry.kube.watch import follow

Json = dict[str, Any]

KEEPS_NAME = (
    "the pod keeps its name, so the target's is made while the job stands still, a second or two; once the source's object is "
    "gone, a failure ends the job, and its owner starts it anew"
)

LONGEST_NAME = 200


@dataclass(frozen=True)
class ClusterOptions:
    """Which cluster and namespace; what is not given is the kubeconfig's."""

    namespace: str | None = None
    context: str | None = None
    kubeconfig: Path | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[tuple[Api, str]]:
        """The cluster and the namespace."""
        async with Api.open(self.kubeconfig, self.context) as api:
            yield api, self.namespace or api.namespace


def labels(pairs: list[str]) -> dict[str, str]:
    """KEY=VALUE pairs. Raises `UsageError`."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"{pair!r} is no label", why="a label is KEY=VALUE")
        found[key] = value
    return found


def whole_seconds(duration: str) -> int:
    """A duration such as 1h, rounded up to seconds. Raises `UsageError`."""
    try:
        return math.ceil(seconds(duration))
    except ValueError as wrong:
        raise UsageError(str(wrong)) from wrong


def body(pod: str, name: str | None, spec: Json) -> Json:
    """A Migration to be created."""
    for field in ("timeout", "maxDowntime", "maxFreeze"):
        if field in spec:
            try:
                seconds(spec[field])
            except ValueError as wrong:
                raise UsageError(str(wrong)) from wrong
    return {"metadata": {"name": name or f"move-{pod[:LONGEST_NAME]}-{secrets.token_hex(2)}"}, "spec": spec}


async def names(where: ClusterOptions, kind: ResourceKind) -> list[str]:
    """The names of what there is."""
    async with where.open() as (api, namespace):
        found, _ = await api.list(kind, namespace if kind.namespaced else "")
        return [one["metadata"]["name"] for one in found]


async def create(where: ClusterOptions, body: Json) -> Migration:
    """Ask for a migration."""
    async with where.open() as (api, namespace):
        return await _create(api, namespace, body)


async def _create(api: Api, namespace: str, body: Json) -> Migration:
    try:
        if (name := await api.whoami()) is not None:
            body = {**body, "spec": {**body["spec"], "requestedBy": name}}
        return Migration.from_json(await api.create(MIGRATIONS, body, namespace))
    except NotServed as absent:
        raise Refused(
            "the cluster has no resource Migration",
            why=absent.why,
            remedy="install podferry: kubectl apply -k deploy/ (docs/kubernetes.md)",
        ) from absent


async def get(where: ClusterOptions, name: str) -> Migration:
    """One migration."""
    async with where.open() as (api, namespace):
        return await _get(api, namespace, name)


async def _get(api: Api, namespace: str, name: str) -> Migration:
    try:
        return Migration.from_json(await api.get(MIGRATIONS, name, namespace))
    except ObjectNotFound as absent:
        raise UsageError(
            f"there is no Migration {name} in namespace {namespace}", remedy="kubectl podferry list -A"
        ) from absent


async def migrations(where: ClusterOptions, *, everywhere: bool) -> list[Migration]:
    """The migrations of the namespace or of all, the oldest first."""
    async with where.open() as (api, namespace):
        found, _ = await api.list(MIGRATIONS, "" if everywhere else namespace)
    return sorted(map(Migration.from_json, found), key=lambda one: str(one.metadata.get("creationTimestamp")))


async def obstacles(where: ClusterOptions, name: str) -> tuple[list[PodUnfit], AppliedPolicy, list[str]]:
    """The reasons why the pod cannot move, the policy that applies to it, and what is worth knowing: the warnings of its node's
    agent are from the pod's last move or rehearsal, since nobody else has them."""
    async with where.open() as (api, namespace):
        pod = await api.find(PODS, name, namespace)
        if pod is None:
            raise UsageError(
                f"there is no pod {name} in namespace {namespace}", remedy=f"kubectl get pods -n {namespace}"
            )
        policy = await Policies(api).of(pod)
        no = forbids(policy)
        found = find_obstacles(pod, await Surveyor(api).around(pod)) + ([no] if no is not None else [])
        return found, policy, [*([KEEPS_NAME] if keeps_name(pod) else []), *await _warnings(api, pod)]


async def _warnings(api: Api, pod: Json) -> list[str]:
    try:
        listed, _ = await api.list(MIGRATIONS, pod["metadata"]["namespace"])
    except Forbidden:
        return []
    for body in sorted(listed, key=lambda one: str(one["metadata"].get("creationTimestamp")), reverse=True):
        status = body.get("status") or {}
        of = [(status.get(part) or {}).get("uid") for part in ("sourcePod", "targetPod")]
        if pod["metadata"]["uid"] in of and (found := status.get("warnings")):
            return [str(one) for one in found]
    return []


async def explanation(where: ClusterOptions, name: str) -> tuple[Migration, list[Json]]:
    """A migration and the events about it and its pods, the oldest first."""
    async with where.open() as (api, namespace):
        found = await _get(api, namespace, name)
        about = {found.uid, *(one.uid for one in (found.status.source_pod, found.status.target_pod) if one)}
        events, _ = await api.list(EVENTS, namespace)
    mine = [one for one in events if (one.get("regarding") or {}).get("uid") in about]
    return found, sorted(mine, key=event_time)


def event_time(event: Json) -> str:
    """When an event was, as text that sorts."""
    return str(
        event.get("eventTime") or event.get("deprecatedFirstTimestamp") or event["metadata"]["creationTimestamp"]
    )


async def cancel_and_wait(where: ClusterOptions, name: str) -> Migration:
    """Ask for it to be taken back, and see how it ends."""
    async with where.open() as (api, namespace):
        found = await _get(api, namespace, name)
        if found.ended:
            raise Refused(f"{name} has ended", why=f"it is {found.status.phase}")
        await _cancel(api, found)
        async for now in _changes(api, found):
            if now.ended:
                return now
    raise UsageError(f"{name} was deleted")


async def _cancel(api: Api, migration: Migration) -> None:
    try:
        await api.patch(MIGRATIONS, migration.name, {"spec": {"cancel": True}}, migration.namespace, uid=migration.uid)
    except (Conflict, ObjectNotFound) as gone:
        raise UsageError(f"{migration.name} was deleted", why="another Migration may have its name now") from gone


async def _changes(api: Api, migration: Migration) -> AsyncIterator[Migration]:
    """How it changes from now on, to its deletion."""
    fields = {"metadata.name": migration.name}
    async for what, thing in follow(api, MIGRATIONS, migration.namespace, fields=fields, since=migration.to_json()):
        if thing["metadata"]["uid"] != migration.uid:
            continue
        yield Migration.from_json(thing)
        if what == "DELETED":
            return


async def follow_to_the_end(where: ClusterOptions, body: Json, view: EventView) -> Migration:
    """Ask for a migration, show how far it is, and return it as it ended. Raises `UserLeft` after a second Ctrl-C."""
    async with where.open() as (api, namespace), anyio.create_task_group() as tasks:
        with view:
            made = await _create(api, namespace, body)
            tasks.start_soon(_cancel_on_interrupt, api, made, view, tasks.cancel_scope)
            began, said, deleted = anyio.current_time(), "", False
            async for now in _changes(api, made):
                event = progress(now, (anyio.current_time() - began) * 1e3)
                view.event(now.to_json(), replace(event, note="" if event.note == said else event.note))
                made, said = now, event.note
                if now.ended:
                    tasks.cancel_scope.cancel()
                    return now
            deleted = True
            tasks.cancel_scope.cancel()
    if made.ended:
        return made
    raise UsageError(f"{made.name} was deleted", why="it had not ended") if deleted else UserLeft(made.name)


async def _cancel_on_interrupt(api: Api, migration: Migration, view: EventView, scope: anyio.CancelScope) -> None:
    asked = False
    with anyio.open_signal_receiver(signal.SIGINT) as signals:
        async for _ in signals:
            if asked:
                scope.cancel()
                return
            asked = True
            view.note("taking it back; Ctrl-C again leaves that to the cluster")
            try:
                await _cancel(api, migration)
            except (ApiFailed, PodferryError) as error:
                view.note(f"cannot be cancelled: {error}")


def progress(migration: Migration, t_ms: float) -> ProgressRecord:
    """How far it is, as the views show it: the cluster's phase, and inside Running the engine's."""
    status = migration.status
    engine = status.engine.source if status.engine is not None and status.phase == "Running" else ""
    made = status.progress
    return ProgressRecord(
        id=migration.name,
        phase=engine or str(status.phase),
        t_ms=t_ms,
        bytes=made.bytes if made else 0,
        total_bytes=made.total_bytes if made else 0,
        rate=made.bytes_per_second if made else None,
        eta_s=seconds(made.remaining) if made and made.remaining else None,
        round=made.rounds if made else 0,
        note="" if engine else status.message or "",
    )
