"""The hand-over in front of the real Job and ReplicaSet controllers: no replacement, no excess, one success counted.

Each body runs with the controller as it is, and with one that is killed between any two steps of the hand-over.
"""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from podferry.controller.handover import HandOver
from podferry.kube.client import DEPLOYMENTS, JOBS, MIGRATIONS, NAMESPACES, PODS, REPLICASETS, Json, ResourceKind
from podferry.kube.migration import (
    HANDED_OVER,
    HANDED_OVER_ANNOTATION,
    LEAVING_ANNOTATION,
    ROLE_LABEL,
    EnginePhases,
    Migration,
)
from podferry.kube.watch import follow

from .webhooks import TAKEN_UP, WEBHOOKS, slow_deletes
from .world import World

pytestmark = [pytest.mark.cluster, pytest.mark.anyio]

QUOTAS = ResourceKind("v1", "ResourceQuota", "resourcequotas")
BATCH = 1.5
"""Seconds after which the Job controller has looked at every change: it gathers them for one second."""


@pytest.fixture
def world(real_world: World) -> World:
    return real_world


def template(**spec: Any) -> Json:
    return {
        "metadata": {"labels": {"app": "train"}},
        "spec": {"runtimeClassName": "podferry", "containers": [{"name": "main", "image": "train"}], **spec},
    }


async def job(world: World, name: str = "train", **spec: Any) -> Json:
    body = {
        "metadata": {"name": name},
        "spec": {"backoffLimit": 0, "template": template(restartPolicy="Never"), **spec},
    }
    return await world.api.create(JOBS, body, world.namespace)


SELECTED = {"app": "train"}


async def running(world: World, count: int) -> list[Json]:
    """The owner's pods, once there are as many and all run."""
    found: list[Json] = []

    async def all_run() -> bool:
        nonlocal found
        found = (await world.api.list(PODS, world.namespace, labels=SELECTED))[0]
        return len(found) == count and all(one.get("status", {}).get("phase") == "Running" for one in found)

    await world.until(all_run)
    return found


class Census:
    """Every pod that ever carried the owner's labels, so that a replacement that came and went is noticed too."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.seen: dict[str, str] = {}
        world.tasks.start_soon(self._count)

    async def _count(self) -> None:

        async for _, pod in follow(self._world.api, PODS, self._world.namespace, labels=SELECTED):
            self.seen[pod["metadata"]["uid"]] = pod["metadata"]["name"]


async def move(world: World, pod: Json, name: str) -> Migration:
    await world.migrate(pod["metadata"]["name"], name)
    await world.agents_move(name)
    migration = await world.ended(name)
    assert migration.status.phase == "Completed", migration.status.message
    assert migration.status.target_pod is not None
    return migration


async def move_all(world: World, pods: list[Json]) -> list[Migration]:
    """All of them at once."""
    migrations: dict[int, Migration] = {}

    async def one(number: int, pod: Json) -> None:
        migrations[number] = await move(world, pod, f"move-{number}")

    async with anyio.create_task_group() as tasks:
        for number, pod in enumerate(pods):
            tasks.start_soon(one, number, pod)
    return [migrations[number] for number in range(len(pods))]


async def owned_pod(world: World, migration: Migration) -> Json:
    assert migration.status.target_pod is not None
    return await world.api.get(PODS, migration.status.target_pod.name, world.namespace)


async def test_a_jobs_pod_moves_four_times_and_counts_once(world: World) -> None:
    await job(world)
    world.controller()
    (pod,) = await running(world, 1)
    first = pod["metadata"]
    census, uids = Census(world), {first["uid"]}
    for turn in range(4):
        migration = await move(world, pod, f"move-{turn}")
        assert migration.status.owner is not None
        assert (migration.status.owner.kind, migration.status.owner.name) == ("Job", "train")
        pod = await owned_pod(world, migration)
        uids.add(pod["metadata"]["uid"])
        assert pod["metadata"]["ownerReferences"] == first["ownerReferences"]
        assert pod["metadata"]["finalizers"] == ["batch.kubernetes.io/job-tracking"]
        assert first["labels"].items() <= pod["metadata"]["labels"].items()
    await anyio.sleep(BATCH)
    during = await world.api.get(JOBS, "train", world.namespace)
    assert (during["status"]["active"], during["status"].get("failed"), during["status"].get("succeeded")) == (
        1,
        None,
        None,
    )
    await world.finish(pod["metadata"]["name"])

    async def complete() -> bool:
        status = (await world.api.get(JOBS, "train", world.namespace))["status"]
        return any(one["type"] == "Complete" and one["status"] == "True" for one in status.get("conditions") or [])

    await world.until(complete)
    status = (await world.api.get(JOBS, "train", world.namespace))["status"]
    assert (status["succeeded"], status.get("failed", 0), status.get("active", 0)) == (1, 0, 0)
    assert set(census.seen) == uids, "nobody else was ever the job's"


async def test_an_indexed_job_of_four(world: World) -> None:
    await job(world, completions=4, parallelism=4, completionMode="Indexed")
    world.controller()
    pods = await running(world, 4)
    census = Census(world)
    index = "batch.kubernetes.io/job-completion-index"
    pods = sorted(pods, key=lambda one: one["metadata"]["annotations"][index])
    for number, migration in enumerate(await move_all(world, pods)):
        moved = await owned_pod(world, migration)
        assert moved["metadata"]["annotations"][index] == str(number)
        assert moved["metadata"]["labels"][index] == str(number)
        assert moved["spec"]["hostname"] == f"train-{number}"
    await anyio.sleep(BATCH)
    assert (await world.api.get(JOBS, "train", world.namespace))["status"]["active"] == 4
    for pod in await running(world, 4):
        await world.finish(pod["metadata"]["name"])

    async def complete() -> bool:
        return (await world.api.get(JOBS, "train", world.namespace))["status"].get("succeeded") == 4

    await world.until(complete)
    status = (await world.api.get(JOBS, "train", world.namespace))["status"]
    assert (status["completedIndexes"], status.get("failed", 0)) == ("0-3", 0)
    assert len(census.seen) == 8, "four that left and four that came, and none besides"


async def test_a_parallel_job_without_indexes(world: World) -> None:
    await job(world, completions=2, parallelism=2)
    world.controller()
    pods = await running(world, 2)
    census = Census(world)
    await move_all(world, pods)
    await anyio.sleep(BATCH)
    for pod in await running(world, 2):
        await world.finish(pod["metadata"]["name"])

    async def complete() -> bool:
        return (await world.api.get(JOBS, "train", world.namespace))["status"].get("succeeded") == 2

    await world.until(complete)
    assert len(census.seen) == 4


async def test_a_jobs_moved_pod_that_fails_counts_as_one_failure(world: World) -> None:
    await job(world, backoffLimit=1)
    world.controller()
    (pod,) = await running(world, 1)
    moved = await owned_pod(world, await move(world, pod, "move"))
    await world.finish(moved["metadata"]["name"], 3)

    async def failed() -> bool:
        return (await world.api.get(JOBS, "train", world.namespace))["status"].get("failed") == 1

    await world.until(failed)

    async def second_try() -> bool:
        pods = (await world.api.list(PODS, world.namespace))[0]
        return {one["metadata"]["uid"] for one in pods if one["status"]["phase"] == "Running"} - {
            moved["metadata"]["uid"]
        } != set()

    await world.until(second_try)


async def test_a_job_that_is_suspended_during_the_move_gets_its_way(world: World) -> None:
    await job(world)
    world.controller()
    (pod,) = await running(world, 1)
    await world.migrate(pod["metadata"]["name"])
    await world.agents_prepare_target()
    await world.patch(JOBS, "train", {"spec": {"suspend": True}}, world.namespace)
    asked = await world.reached(lambda one: one.status.abort is not None)
    assert asked.status.abort is not None
    assert asked.status.abort.reason in ("JobSuspended", "PodDeleted")
    await world.agents_end("failed", message="the container ended during the move")
    assert (await world.ended()).status.phase == "Failed"

    async def none() -> bool:
        return not (await world.api.list(PODS, world.namespace))[0]

    await world.until(none)
    status = (await world.api.get(JOBS, "train", world.namespace))["status"]
    assert not status.get("failed")


async def deployment(world: World, replicas: int) -> None:
    body = {
        "metadata": {"name": "serve"},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "train"}}, "template": template()},
    }
    await world.api.create(DEPLOYMENTS, body, world.namespace)


async def test_a_deployments_pod_moves_without_an_extra_replica(world: World) -> None:
    await deployment(world, 3)
    world.controller()
    pods = await running(world, 3)
    census = Census(world)
    moved = await owned_pod(world, await move(world, pods[0], "move"))
    await anyio.sleep(BATCH)
    after = await running(world, 3)
    assert {one["metadata"]["uid"] for one in after} == {
        moved["metadata"]["uid"],
        *(one["metadata"]["uid"] for one in pods[1:]),
    }
    assert len(census.seen) == 4
    (owner,) = (await world.api.list(REPLICASETS, world.namespace))[0]
    assert owner["status"]["replicas"] == owner["status"]["readyReplicas"] == 3


async def test_a_rollout_in_the_middle_wins(world: World) -> None:
    await deployment(world, 1)
    world.controller()
    (pod,) = await running(world, 1)
    await world.migrate(pod["metadata"]["name"])
    await world.agents_prepare_target()
    newer = {"spec": {"template": {"metadata": {"labels": {"rollout": "two"}}}}}
    await world.patch(DEPLOYMENTS, "serve", newer, world.namespace)
    asked = await world.reached(lambda one: one.status.abort is not None)
    assert asked.status.abort is not None
    assert asked.status.abort.reason == "PodDeleted"
    await world.agents_end("failed", message="the container ended during the move")
    assert (await world.ended()).status.phase == "Failed"
    (left,) = await running(world, 1)
    assert left["metadata"]["labels"]["rollout"] == "two"


async def test_a_rollout_after_the_move_replaces_the_moved_pod(world: World) -> None:
    await deployment(world, 1)
    world.controller()
    (pod,) = await running(world, 1)
    await move(world, pod, "move")
    newer = {"spec": {"template": {"metadata": {"labels": {"rollout": "two"}}}}}
    await world.patch(DEPLOYMENTS, "serve", newer, world.namespace)

    async def replaced() -> bool:
        pods = (await world.api.list(PODS, world.namespace))[0]
        return [one["metadata"]["labels"].get("rollout") for one in pods] == ["two"]

    await world.until(replaced)


@pytest.mark.parametrize("kind", ["job", "deployment"])
async def test_an_owner_does_not_count_the_target_by_its_labels(world: World, kind: str) -> None:
    """From its making on the target has the labels that the owner selects by; until the hand-over it is not the owner's, though,
    also while the job runs there already."""
    await (deployment(world, 2) if kind == "deployment" else job(world, completions=2, parallelism=2))
    world.controller()
    pods = await running(world, 2)
    await world.migrate(pods[0]["metadata"]["name"])
    migration = await world.agents_prepare_target()
    assert migration.status.target_pod is not None
    census = Census(world)
    target = await owned_pod(world, migration)
    assert pods[0]["metadata"]["labels"].items() <= target["metadata"]["labels"].items()
    world.resumed.add(target["metadata"]["uid"])
    await world._play(target)
    assert len(await running(world, 3)) == 3, "both run and are ready, the target beside the owner's two"
    await anyio.sleep(BATCH)
    owner = JOBS if kind == "job" else REPLICASETS
    ((one,), _) = await world.api.list(owner, world.namespace)
    assert one["status"].get("active", one["status"].get("replicas")) == 2
    assert len(await running(world, 3)) == 3, "none was removed"
    await world.agents_resume()
    await world.agents_part()
    assert (await world.ended()).status.phase == "Completed"
    await anyio.sleep(BATCH)
    left = {one["metadata"]["uid"] for one in await running(world, 2)}
    assert left == {target["metadata"]["uid"], pods[1]["metadata"]["uid"]}
    assert len(census.seen) == 3, "nobody else ever came"


STEPS = ("take_place", "step_aside", "dismiss")
MARKS = {"take_place": HANDED_OVER_ANNOTATION, "step_aside": LEAVING_ANNOTATION}


@pytest.mark.parametrize("kind", ["job", "indexed", "deployment"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_controller_that_dies_inside_the_hand_over(
    world: World, kind: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies right before the step, long enough for the owners' controllers to look at what they see then; another takes over."""
    if kind == "deployment":
        await deployment(world, 1)
    else:
        await job(
            world, **({"completions": 2, "parallelism": 2, "completionMode": "Indexed"} if kind == "indexed" else {})
        )
    scope = world.controller()
    pods = await running(world, 2 if kind == "indexed" else 1)
    census = Census(world)
    await world.migrate(pods[0]["metadata"]["name"])
    await world.agents_prepare_target()
    died = anyio.Event()

    async def die() -> None:
        if not died.is_set():
            died.set()
            scope.cancel()
            await anyio.sleep_forever()

    dies_at(monkeypatch, step, die)
    await world.agents_resume()
    world.tasks.start_soon(world.agents_part)

    async def died_or_needless() -> bool:
        """A ReplicaSet may remove the source itself between two of our steps: then it need not be dismissed."""
        return died.is_set() or (step == "dismiss" and kind == "deployment" and (await world.get()).ended)

    await world.until(died_or_needless)
    await anyio.sleep(BATCH)
    world.controller()
    migration = await world.ended()
    assert migration.status.phase == "Completed", migration.status.message
    await anyio.sleep(BATCH)
    left = await running(world, len(pods))
    moved = await owned_pod(world, migration)
    assert {one["metadata"]["uid"] for one in left} == {
        moved["metadata"]["uid"],
        *(one["metadata"]["uid"] for one in pods[1:]),
    }
    assert len(census.seen) == len(pods) + 1, f"a replacement was started: {census.seen}"
    if kind != "deployment":
        status = (await world.api.get(JOBS, "train", world.namespace))["status"]
        assert (status["active"], status.get("failed", 0), status.get("succeeded", 0)) == (len(pods), 0, 0)


def dies_at(monkeypatch: pytest.MonkeyPatch, step: str, die: Any) -> None:
    patch, dismiss = HandOver._patch, HandOver.dismiss

    async def patched(self: HandOver, pod: Json, change: Json) -> Json:
        if (marks := MARKS.get(step)) and marks in change["metadata"].get("annotations", {}):
            await die()
        return await patch(self, pod, change)

    async def dismissed(self: HandOver, source: Json) -> None:
        if step == "dismiss":
            await die()
        await dismiss(self, source)

    monkeypatch.setattr(HandOver, "_patch", patched)
    monkeypatch.setattr(HandOver, "dismiss", dismissed)


@pytest.mark.parametrize("kind", ["job", "deployment"])
async def test_an_owner_that_removes_the_source_just_when_it_leaves(
    world: World, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has seen two pods and has decided; its request arrives after the source has left. It must see that its wish was
    done: until then it neither removes a pod nor makes one.
    """
    await (deployment(world, 1) if kind == "deployment" else job(world, completions=2, parallelism=1))
    world.controller()
    (pod,) = await running(world, 1)
    async with slow_deletes(world, pod["metadata"]["name"]) as asked:
        patch = HandOver._patch

        async def patched(self: HandOver, pod: Json, change: Json) -> Json:
            if LEAVING_ANNOTATION in change["metadata"].get("annotations", {}):
                await asked.wait()
            return await patch(self, pod, change)

        monkeypatch.setattr(HandOver, "_patch", patched)
        await world.migrate(pod["metadata"]["name"])
        await world.agents_prepare_target()
        await world.agents_resume(source="serve")  # nobody else removes the source while its memory is being fetched
        await world.reached(lambda one: one.status.holds(HANDED_OVER))

        async def removed() -> bool:
            return await world.api.find(PODS, pod["metadata"]["name"], world.namespace) is None

        await world.until(removed)
    await world.agents_part()
    moved = await owned_pod(world, await world.ended())
    if kind == "job":
        await world.patch(JOBS, "train", {"spec": {"parallelism": 2}}, world.namespace)
    else:
        await world.api.delete(PODS, moved["metadata"]["name"], world.namespace)

    async def another() -> bool:
        pods = (await world.api.list(PODS, world.namespace, labels=SELECTED))[0]
        known = {pod["metadata"]["uid"], moved["metadata"]["uid"]}
        return any(one["metadata"]["uid"] not in known and one["status"]["phase"] == "Running" for one in pods)

    await world.until(another)


async def test_a_quota_that_has_no_room_for_two(world: World) -> None:
    pod = await world.pod()
    await world.api.create(QUOTAS, {"metadata": {"name": "one"}, "spec": {"hard": {"pods": "1"}}}, world.namespace)

    async def counted() -> bool:
        quota = await world.api.get(QUOTAS, "one", world.namespace)
        return (quota.get("status") or {}).get("used", {}).get("pods") == "1"

    await world.until(counted)
    world.controller()
    await world.migrate()
    migration = await world.ended()
    failed = migration.status.condition("Failed")
    assert failed is not None
    assert (migration.status.phase, failed.reason) == ("RolledBack", "QuotaExceeded")
    (left,) = (await world.api.list(PODS, world.namespace))[0]
    assert left["metadata"]["uid"] == pod["metadata"]["uid"]


async def test_a_namespace_that_goes_takes_the_migration_with_it(world: World) -> None:
    await world.pod(terminationGracePeriodSeconds=1)  # the namespace controller looks again after half of it
    world.controller()
    await world.migrate()
    await world.agents_prepare_target()

    await world.api.delete(NAMESPACES, world.namespace)
    await world.reached(lambda one: one.status.abort is not None)
    await world.agents_end("failed", message="the container ended during the move")

    async def gone() -> bool:
        return (
            not (await world.api.list(MIGRATIONS, world.namespace))[0]
            and not (await world.api.list(PODS, world.namespace))[0]
        )

    await world.until(gone)


async def test_a_webhook_that_refuses_the_target_pod(world: World) -> None:
    """It fails closed: nothing answers at its address."""
    source = await world.pod()
    body = {
        "metadata": {"name": world.namespace},
        "webhooks": [
            {
                "name": "nobody.example.com",
                "clientConfig": {"url": "https://127.0.0.1:9/"},
                "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
                "objectSelector": {"matchLabels": {ROLE_LABEL: "target"}},
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": world.namespace}},
                "failurePolicy": "Fail",
                "sideEffects": "None",
                "admissionReviewVersions": ["v1"],
                "timeoutSeconds": 1,
            }
        ],
    }
    await world.api.create(WEBHOOKS, body)
    try:
        world.controller()
        await world.migrate()
        await world.reached(lambda one: one.status.phase == "Running")

        def asked(now: Migration) -> bool:
            now.status.engine = EnginePhases(source="prepare-target", target="receive")
            now.status.set_condition("TargetRequested", True, "Converged")
            return True

        await anyio.sleep(TAKEN_UP)
        await world.set(asked)
        await world.reached(lambda one: one.status.abort is not None)
        await world.agents_end("cancelled")
        migration = await world.ended()
    finally:
        await world.api.delete(WEBHOOKS, world.namespace)
    failed, created = (migration.status.condition(type) for type in ("Failed", "TargetCreated"))
    assert failed is not None
    assert created is not None
    assert (migration.status.phase, failed.reason, created.reason) == ("RolledBack", "WebhookDenied", "WebhookDenied")
    assert "nobody.example.com" in failed.message
    (left,) = (await world.api.list(PODS, world.namespace))[0]
    assert left["metadata"]["uid"] == source["metadata"]["uid"]
