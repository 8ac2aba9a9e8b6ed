"""A node that goes away is drained by itself, on a fake API server and on the real one: what says so, the deadline, who is late."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from podferry.kube.client import EVENTS, MIGRATIONS, NODE_DRAINS, NODES, PODS
from podferry.kube.drain import BY_ANNOTATION, NodeDrain
from podferry.kube.errors import ObjectNotFound
from podferry.kube.migration import Migration

from .test_drain import agents, get, reached, under_way
from .world import World

pytestmark = pytest.mark.anyio
SPOT = {"key": "aws-node-termination-handler/spot-itn", "value": "77", "effect": "NoSchedule"}


@pytest.fixture
async def going(world: World) -> World:
    """A world whose NodeDrain goes with it."""
    world.also.append((NODE_DRAINS, world.nodes[0]))
    return world


async def there(world: World) -> NodeDrain:
    """The drain that the controller begins."""

    async def begun() -> bool:
        return await world.api.find(NODE_DRAINS, world.nodes[0]) is not None

    await world.until(begun)
    return await get(world)


async def test_a_taint_begins_a_drain_with_a_deadline_once(going: World) -> None:
    world = going
    await world.pod()
    world.controller()
    await world.patch(NODES, world.nodes[0], {"spec": {"taints": [SPOT]}})
    drain = await there(world)
    assert drain.spec.deadline is not None
    assert 60 < (datetime.fromisoformat(drain.spec.deadline) - datetime.now(UTC)).total_seconds() <= 120
    assert "spot-itn" in str(drain.spec.cause)
    world.tasks.start_soon(agents, world, set[str]())
    ended = await reached(world, lambda one: one.ended)
    assert (ended.status.phase, ended.status.moved) == ("Completed", 1)
    node = await world.api.get(NODES, world.nodes[0])
    assert node["spec"]["unschedulable"]
    await world.patch(NODES, world.nodes[0], {"metadata": {"labels": {"new": "s"}}})
    assert (await get(world)).uid == drain.uid, "the same trouble drains a node once"
    kept = [one for one in node["spec"]["taints"] if one["key"] == SPOT["key"]]
    assert kept, "it is not the controller's to take off"

    await world.patch(NODES, world.nodes[0], {"spec": {"taints": None}})
    await reached(world, lambda one: one.about == "")
    await world.patch(NODES, world.nodes[0], {"spec": {"taints": [SPOT]}})

    async def another() -> bool:
        try:
            return (await get(world)).uid != drain.uid
        except ObjectNotFound:
            return False

    await world.until(another)


async def test_what_saves_most_until_the_deadline_goes_first_and_others_are_told(going: World) -> None:
    """A pod that asks for more has computed more than one that has run as long; one cannot make it, by what was measured."""
    world = going
    await world.has_moved(mebibytes=1, seconds=1)

    async def pod(name: str, cpu: str, memory: str) -> None:
        main = {"name": "main", "image": "train", "resources": {"requests": {"cpu": cpu, "memory": memory}}}
        await world.pod(name, containers=[main])

    await pod("idle", "10m", "8Mi")
    await pod("busy", "900m", "8Mi")
    await pod("large", "100m", "7Gi")
    world.controller()
    await world.patch(NODES, world.nodes[0], {"metadata": {"annotations": {BY_ANNOTATION: "4m"}}})
    await there(world)
    await world.patch(NODE_DRAINS, world.nodes[0], {"spec": {"parallel": 1}})
    drain = await reached(world, lambda one: any(pod.may_be_late for pod in one.status.pods))
    if world.fake is not None:  # on the real one other tests' moves count as well
        assert {pod.name for pod in drain.status.pods if pod.may_be_late} == {"large"}
    world.tasks.start_soon(agents, world, set[str]())
    ended = await reached(world, lambda one: one.ended)
    assert ended.status.moved == 3, "what may be too late is tried all the same"
    moved = [Migration.from_json(one) for one in (await world.api.list(MIGRATIONS, world.namespace))[0]]
    order = [
        one.spec.pod_name for one in sorted(moved, key=lambda one: str(one.status.start_time)) if one.name != "earlier"
    ]
    if world.fake is not None:
        assert order[-1] == "large"

    async def told() -> bool:
        found, _ = await world.api.list(EVENTS, world.namespace)
        return "MayBeTooLate" in {one["reason"] for one in found}

    await world.until(told)


async def test_a_persons_drain_is_hurried_and_stays_stopped(going: World) -> None:
    world = going
    await world.pod()
    await world.api.create(NODE_DRAINS, {"metadata": {"name": world.nodes[0]}, "spec": {"stop": True}})
    world.controller()
    await world.patch(NODES, world.nodes[0], {"metadata": {"annotations": {BY_ANNOTATION: "2030-01-01T00:00:00Z"}}})
    drain = await reached(world, lambda one: one.spec.deadline == "2030-01-01T00:00:00Z")
    assert drain.spec.stop
    assert not await under_way(world)
    assert await world.api.find(PODS, "train", world.namespace) is not None
