"""What a user who may write pods and Migrations in one namespace tries, on the fake and on the real API server.

The API server's own checks and the admission policies are not relied on here: objects are written as a cluster without them would
have taken them. tests/kube/test_rights.py shows the policies.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import AsyncIterator

import anyio
import pytest

from podferry.controller import pods
from podferry.kube.client import EVENTS, MIGRATIONS, NAMESPACES, PODS, Json
from podferry.kube.errors import ApiFailed
from podferry.kube.migration import (
    HANDED_OVER_ANNOTATION,
    ORIGIN_ANNOTATION,
    ROLE_LABEL,
    TARGET_REQUESTED,
    UID_LABEL,
    EnginePhases,
    Migration,
)

from .world import QUICK, World

pytestmark = pytest.mark.anyio
VICTIM = "db-0"


@pytest.fixture
async def victim(world: World) -> AsyncIterator[tuple[str, Json]]:
    """Another namespace with a pod in it, which must stay as it is."""
    namespace = f"v-{secrets.token_hex(3)}"
    await world.api.create(NAMESPACES, {"metadata": {"name": namespace}})
    if world.fake is None:
        await world.until(lambda: _has_account(world, namespace))
    body = {"metadata": {"name": VICTIM}, "spec": {"containers": [{"name": "main", "image": "db"}]}}
    body["spec"]["nodeSelector"] = {"no": "node"}  # type: ignore[index]
    made = await world.api.create(PODS, body, namespace)
    yield namespace, made
    await world.api.delete(PODS, VICTIM, namespace, grace=0)
    await world.api.delete(NAMESPACES, namespace)


async def _has_account(world: World, namespace: str) -> bool:
    from .world import ACCOUNTS

    return await world.api.find(ACCOUNTS, "default", namespace) is not None


async def unharmed(world: World, victim: tuple[str, Json]) -> None:
    namespace, before = victim
    now = await world.api.get(PODS, VICTIM, namespace)
    assert "deletionTimestamp" not in now["metadata"]
    for part in ("uid", "labels", "annotations", "ownerReferences"):
        assert now["metadata"].get(part) == before["metadata"].get(part), part
    said = [one for one in (await world.api.list(EVENTS, namespace))[0] if "podferry" in str(one)]
    assert said == []


@pytest.mark.parametrize("tail", ["?x=", "#", ";", "/", ""])
async def test_an_origin_that_names_another_namespaces_pod_deletes_nothing(
    world: World, victim: tuple[str, Json], tail: str
) -> None:
    await world.pod()
    origin = f"../../{victim[0]}/pods/{VICTIM}{tail}"
    await world.api.patch(PODS, "train", {"metadata": {"annotations": {ORIGIN_ANNOTATION: origin}}}, world.namespace)
    world.controller()
    await world.migrate()
    await world.agents_move()
    assert (await world.ended()).status.phase == "Completed"
    (left,) = (await world.api.list(PODS, world.namespace))[0]
    assert left["metadata"]["name"].startswith("train-")
    await unharmed(world, victim)


@pytest.mark.parametrize("field", ["podName", "targetNode"])
async def test_a_name_that_is_a_path_is_refused(world: World, victim: tuple[str, Json], field: str) -> None:
    await world.pod()
    name = f"../../{victim[0]}/pods/{VICTIM}"
    if world.fake is None:
        with pytest.raises(ApiFailed, match=f"spec.{field}"):
            await world.migrate(**{"pod": name} if field == "podName" else {field: name})
        return
    world.controller()
    await world.migrate(**{"pod": name} if field == "podName" else {field: name})
    ended = await world.ended()
    assert (ended.status.phase, ended.status.ending and ended.status.ending.reason) == ("Refused", "NameInvalid")
    await unharmed(world, victim)


async def scheduled(world: World) -> tuple[Json, Migration]:
    """A Migration of a pod, before the target pod is made."""
    source = await world.pod()
    world.controller()
    await world.migrate()
    return source, await world.reached(lambda one: one.status.phase == "Running")


@pytest.mark.parametrize("forged", ["labels", "owner", "spec", "running"])
async def test_a_pod_under_the_foreseen_name_is_not_taken_for_the_target(world: World, forged: str) -> None:
    """Its maker cannot have made it as the controller would, without its containers running by then."""
    source, migration = await scheduled(world)
    body = pods.target_pod(source, migration, world.nodes[1], _now())
    if forged == "labels":
        body["metadata"] = {"name": body["metadata"]["name"], "labels": body["metadata"]["labels"]}
    elif forged == "owner":
        about = source["metadata"]
        owner = {"apiVersion": "v1", "kind": "Pod", "name": about["name"], "uid": about["uid"], "controller": True}
        body["metadata"]["ownerReferences"] = [owner]
    elif forged == "spec":
        body["spec"]["containers"] = [{"name": "main", "image": "mine", "command": ["sh"]}]
    elif world.fake is None:
        pytest.skip("the real kubelet is played here: a pod that runs is shown on the fake")
    made = await world.api.create(PODS, copy.deepcopy(body), world.namespace)
    if forged == "running":
        made = await world.api.patch(
            PODS, made["metadata"]["name"], {"spec": {"nodeName": world.nodes[1]}}, world.namespace
        )
        await world.report(made, "Running", {"running": {}}, ready=True)

    def asked(now: Migration) -> bool:
        now.status.engine = EnginePhases(source="poise", target="receive")
        now.status.say(TARGET_REQUESTED, True, "Converged")
        return True

    await world.set(asked)
    stopped = await world.reached(lambda one: one.status.abort is not None)
    assert stopped.status.abort is not None
    assert stopped.status.abort.reason == "NameTaken"
    assert stopped.status.target_pod is None
    if forged in ("labels", "owner") and world.fake is not None:
        await world.agents_end("rolled-back")
        await world.ended()
        assert await world.api.find(PODS, body["metadata"]["name"], world.namespace) is not None, (
            "it is not ours to delete"
        )


async def test_a_pod_under_the_placeholders_name_chooses_no_node(world: World) -> None:
    await world.pod()
    migration = await world.migrate()
    source = await world.api.get(PODS, "train", world.namespace)
    body = pods.placeholder_pod(source, migration, "pause")
    forged: Json = {
        "metadata": {"name": body["metadata"]["name"], "labels": {UID_LABEL: migration.uid, ROLE_LABEL: "placeholder"}},
        "spec": {"nodeName": world.nodes[1], "containers": [{"name": "x", "image": "x"}]},
    }
    await world.api.create(PODS, forged, world.namespace)
    world.controller(QUICK)
    ended = await world.ended()
    assert (ended.status.phase, ended.status.ending and ended.status.ending.reason) == ("RolledBack", "NameTaken")
    assert ended.status.target_node is None
    assert await world.api.find(PODS, body["metadata"]["name"], world.namespace) is not None


async def test_a_target_that_only_says_that_it_was_handed_over_is_not(world: World) -> None:
    await world.pod(labels={"app": "train"})
    world.controller()
    await world.migrate()
    poised = await world.agents_poise()
    assert poised.status.target_pod is not None
    forged = {"metadata": {"annotations": {HANDED_OVER_ANNOTATION: "somebody"}}}
    await world.api.patch(PODS, poised.status.target_pod.name, forged, world.namespace)
    await world.agents_resume()
    await world.agents_part()
    assert (await world.ended()).status.phase == "Completed"
    (left,) = (await world.api.list(PODS, world.namespace))[0]
    assert left["metadata"]["labels"] == {"app": "train"}, "the hand-over took place after all"


async def test_a_label_alone_has_no_pod_deleted_when_a_migration_is_undone(world: World) -> None:
    _, migration = await scheduled(world)
    bystander = await world.pod("bystander")
    forged = {"metadata": {"labels": {UID_LABEL: migration.uid, ROLE_LABEL: "target"}}}
    await world.api.patch(PODS, "bystander", forged, world.namespace)
    await world.api.patch(MIGRATIONS, "move", {"spec": {"cancel": True}}, world.namespace)
    assert (await world.ended()).status.phase == "Cancelled"
    await anyio.sleep(0.3)
    now = await world.api.get(PODS, "bystander", world.namespace)
    assert now["metadata"]["uid"] == bystander["metadata"]["uid"]
    assert "deletionTimestamp" not in now["metadata"]


def _now() -> object:
    import datetime

    return datetime.datetime.now(datetime.UTC)
