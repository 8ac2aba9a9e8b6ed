"""A pod that keeps its name: its object goes before the target's is made, only after GO, and its owner makes none in between.

On the real API server the StatefulSet controller is at work, and deploy/'s policies keep the name free.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import anyio
import pytest

from podferry.controller import failures
from podferry.kube.api_errors import Forbidden, ObjectAlreadyExists
from podferry.kube.client import MIGRATIONS, PODS, STATEFULSETS, Json
from podferry.kube.migration import (
    ORIGIN_ANNOTATION,
    ROLE_LABEL,
    SOURCE_REPLACED,
    TARGET_CREATED,
    TARGET_REQUESTED,
    UID_LABEL,
    EnginePhases,
    Migration,
)
from podferry.kube.watch import follow

from .rights import apply, the_controller
from .world import World

pytestmark = pytest.mark.anyio

NAME, POD = "web", "web-0"
SELECTED = {"app": NAME}


@dataclass
class Owned:
    """A StatefulSet with one pod, and the controller."""

    world: World
    start: Callable[[], anyio.CancelScope]
    pod: Json
    uids: list[str] = field(default_factory=list)
    """Of every pod of its name that there ever was."""

    async def watch(self) -> None:
        async for what, pod in follow(self.world.api, PODS, self.world.namespace):
            about = pod["metadata"]
            if what != "DELETED" and about["name"] == POD and about["uid"] not in self.uids:
                self.uids.append(about["uid"])

    async def go(self, target: str = "resume") -> Migration:
        """The right to run has passed, and the target's agent asks for its pod."""
        migration = await self.world.reached(lambda one: one.status.phase == "Running")
        assert migration.status.keeps_name
        await self.name_is_kept()

        def asked(now: Migration) -> bool:
            now.status.engine = EnginePhases(source="resume", target=target)
            now.status.set_condition(TARGET_REQUESTED, True, "RightToRunIsHere")
            return True

        return await self.world.set(asked)

    async def name_is_kept(self) -> None:
        """Once the Migration runs, a policy takes a moment to know."""
        if self.world.fake is None:
            body = {"metadata": {"name": POD}, "spec": self.pod["spec"]}

            async def refused() -> bool:
                try:
                    await self.world.api.create(PODS, body, self.world.namespace, dry=True)
                except Forbidden as why:
                    return "its place is kept" in why.why
                except ObjectAlreadyExists:
                    return False
                return False

            await self.world.until(refused)

    async def now(self) -> Json:
        return await self.world.api.get(PODS, POD, self.world.namespace)


@pytest.fixture
async def owned(world: World, request: pytest.FixtureRequest) -> AsyncIterator[Owned]:
    template = {
        "metadata": {"labels": SELECTED},
        "spec": {"runtimeClassName": "podferry", "containers": [{"name": "main", "image": "train"}]},
    }
    body = {
        "metadata": {"name": NAME},
        "spec": {"serviceName": NAME, "replicas": 1, "selector": {"matchLabels": SELECTED}, "template": template},
    }
    made = await world.api.create(STATEFULSETS, body, world.namespace)
    if world.fake is not None:
        labels = {**SELECTED, "apps.kubernetes.io/pod-index": "0", "statefulset.kubernetes.io/pod-name": POD}
        owner = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": NAME, "uid": made["metadata"]["uid"]}
        about = {"name": POD, "labels": labels, "ownerReferences": [{**owner, "controller": True}]}
        about["annotations"] = {ORIGIN_ANNOTATION: NAME}  # it has moved before
        spec = {**template["spec"], "nodeName": world.nodes[0], "hostname": POD, "subdomain": NAME}
        await world.api.create(PODS, {"metadata": about, "spec": spec}, world.namespace)
        start = world.controller
    else:
        kubeconfig = request.getfixturevalue("control_plane")
        await apply(world.api)

        def start() -> anyio.CancelScope:
            scope = anyio.CancelScope()

            async def run() -> None:
                with scope:
                    async with the_controller(world, kubeconfig):
                        await anyio.sleep_forever()

            world.tasks.start_soon(run)
            return scope

    found = Owned(world, start, await world.running(POD))
    world.tasks.start_soon(found.watch)
    try:
        yield found
    finally:
        await world.api.delete(STATEFULSETS, NAME, world.namespace)


async def test_the_target_has_name_labels_and_owner_and_nobody_makes_another(owned: Owned) -> None:
    world, before = owned.world, owned.pod["metadata"]
    owned.start()
    await world.migrate(POD)
    await world.reached(lambda one: one.status.phase == "Running")
    assert (await owned.now())["metadata"]["uid"] == before["uid"]
    await owned.go()
    migration = await world.reached(lambda one: one.status.holds(TARGET_CREATED))
    assert migration.status.holds(SOURCE_REPLACED)
    target = (await owned.now())["metadata"]
    assert migration.status.target_pod is not None
    assert migration.status.target_pod.uid == target["uid"] != before["uid"]
    assert target["labels"].items() >= before["labels"].items(), "it has them before the job runs in it"
    await world.agents_resume()
    await world.agents_part()
    migration = await world.ended()
    assert (migration.status.phase, migration.status.kept_place) == ("Completed", None), migration.status.message

    async def ordinary() -> bool:
        return not {UID_LABEL, ROLE_LABEL} & set((await owned.now())["metadata"]["labels"])

    await world.until(ordinary)
    pod = await owned.now()
    assert pod["metadata"]["labels"] == before["labels"]
    assert pod["metadata"]["ownerReferences"] == before["ownerReferences"]
    assert {name: pod["spec"][name] for name in ("hostname", "subdomain")} == {"hostname": POD, "subdomain": NAME}
    assert owned.uids == [before["uid"], target["uid"]]
    left, _ = await world.api.list(PODS, world.namespace)
    assert [one["metadata"]["name"] for one in left] == [POD], "the placeholder is left"


async def test_a_controller_that_dies_between_deleting_and_creating(owned: Owned) -> None:
    world = owned.world
    scope = owned.start()
    await world.migrate(POD)
    await owned.go()
    await world.reached(lambda one: one.status.holds(SOURCE_REPLACED))
    scope.cancel()
    owned.start()
    await world.reached(lambda one: one.status.holds(TARGET_CREATED))
    await world.agents_resume()
    await world.agents_part()
    assert (await world.ended()).status.phase == "Completed"
    assert len(owned.uids) == 2


@pytest.mark.parametrize("world", [pytest.param("fake", marks=pytest.mark.unit)], indirect=True)
async def test_where_nothing_keeps_the_name_the_source_is_not_given_up(owned: Owned) -> None:
    world = owned.world
    assert world.fake is not None
    world.fake.keeps_names = False
    owned.start()
    await world.migrate(POD)
    await owned.go()
    migration = await world.reached(lambda one: one.status.abort is not None)
    assert migration.status.abort is not None
    assert migration.status.abort.reason == failures.NAME_NOT_KEPT
    assert owned.uids == [owned.pod["metadata"]["uid"]]
    await world.agents_end("rolled-back")
    assert (await world.ended()).status.phase == "RolledBack"


async def test_an_agent_that_asks_before_go_gets_no_pod_and_the_source_stays(owned: Owned) -> None:
    world = owned.world
    owned.start()
    await world.migrate(POD)
    await owned.go(target="receive")
    migration = await world.reached(lambda one: one.status.abort is not None)
    assert migration.status.abort is not None
    assert migration.status.abort.reason == failures.AGENT_TOO_OLD
    await world.agents_end("rolled-back")
    migration = await world.ended()
    assert migration.status.phase == "RolledBack"
    assert migration.status.condition(SOURCE_REPLACED) is None
    assert owned.uids == [owned.pod["metadata"]["uid"]]


async def test_who_asks_for_the_pod_after_a_cancel_gets_none_and_the_source_stays(owned: Owned) -> None:
    world = owned.world
    owned.start()
    await world.migrate(POD)
    await world.reached(lambda one: one.status.phase == "Running")

    def began(now: Migration) -> bool:
        now.status.engine = EnginePhases(source="pre-copy", target="receive")
        return True

    await world.set(began)
    await world.patch(MIGRATIONS, "move", {"spec": {"cancel": True}}, world.namespace)
    await world.reached(lambda one: one.status.abort is not None)
    await owned.go()
    await world.agents_end("cancelled")
    migration = await world.ended()
    assert (migration.status.phase, migration.status.condition(SOURCE_REPLACED)) == ("Cancelled", None)
    assert owned.uids == [owned.pod["metadata"]["uid"]]


async def test_a_job_that_cannot_be_restored_leaves_the_name_to_its_owner(owned: Owned) -> None:
    world = owned.world
    owned.start()
    await world.migrate(POD)
    await owned.go()
    migration = await world.reached(lambda one: one.status.holds(TARGET_CREATED))
    assert migration.status.target_pod is not None
    target = migration.status.target_pod.uid

    def gave_up(now: Migration) -> bool:
        now.status.engine = EnginePhases(source="undo", target="gave-up")
        now.status.set_condition(TARGET_REQUESTED, False, "GaveUp")
        return True

    await world.set(gave_up)
    await world.agents_end("failed", message="the job is lost")
    migration = await world.ended()
    assert (migration.status.phase, migration.status.message) == ("Failed", "the job is lost")

    async def left() -> bool:
        pod = await world.api.find(PODS, POD, world.namespace)
        if world.fake is not None:
            return pod is None
        return pod is not None and pod["metadata"]["uid"] not in (target, owned.pod["metadata"]["uid"])

    await world.until(left)
