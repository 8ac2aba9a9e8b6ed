"""A node that goes away is drained by itself, on a fake API server and on the real one: what says so, the deadline, who is late."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from podferry.agent.notices import Notices
from podferry.kube.api_errors import Forbidden, ObjectNotFound
from podferry.kube.client import EVENTS, MIGRATIONS, NODE_DRAINS, NODES, PODS
from podferry.kube.drain import BY_ANNOTATION, CLOUD_ANNOTATION, NodeDrain
from podferry.kube.migration import Migration

from .rights import apply, as_account
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


async def test_the_clouds_word_begins_a_drain_and_a_time_by_hand_that_is_sooner_goes_before(going: World) -> None:
    world = going
    await world.pod()
    world.controller()
    await world.patch(NODES, world.nodes[0], {"metadata": {"annotations": {CLOUD_ANNOTATION: "2099-01-01T00:00:00Z"}}})
    drain = await there(world)
    assert drain.spec.deadline == "2099-01-01T00:00:00Z"
    assert CLOUD_ANNOTATION in str(drain.spec.cause)
    await world.patch(NODES, world.nodes[0], {"metadata": {"annotations": {BY_ANNOTATION: "2098-01-01T00:00:00Z"}}})
    await reached(world, lambda one: one.spec.deadline == "2098-01-01T00:00:00Z")


@pytest.mark.cluster
async def test_an_agent_announces_its_own_nodes_end_and_writes_nothing_else(
    real_world: World, control_plane: Path
) -> None:
    world = real_world
    mine, other = world.nodes
    await apply(world.api)
    async with as_account(world, control_plane, "podferry-agent", mine) as agent:

        async def annotate(node: str, **about: object) -> None:
            await agent.patch(NODES, node, {"metadata": about}, uid=None)

        notice = {CLOUD_ANNOTATION: "2099-01-01T00:00:00Z"}
        with pytest.raises(Forbidden):
            await annotate(mine, annotations=notice)
        await apply(world.api, ("cloud-notices/cloud-notices.yaml",))

        async def refused() -> bool:  # a policy takes effect a moment after it was made
            try:
                await annotate(other, annotations={CLOUD_ANNOTATION: None})
            except Forbidden as why:
                return "no node but its own" in why.why
            return False

        await world.until(refused)
        await world.patch(NODES, mine, {"metadata": {"annotations": {"kept": "1"}, "labels": {"kept": "1"}}})
        for about in (
            {"annotations": {"kept": "2"}},
            {"annotations": {"kept": None}},
            {"annotations": {**notice, BY_ANNOTATION: "1m"}},
            {"labels": {"kept": None}},
            {"labels": {"new": "1"}},
        ):
            with pytest.raises(Forbidden, match="nothing of a node but"):
                await annotate(mine, **about)
        with pytest.raises(Forbidden, match="nothing of a node but"):
            await agent.patch(NODES, mine, {"spec": {"unschedulable": True}}, uid=None)

        async def asked(now: datetime) -> datetime | None:
            return told

        told: datetime | None = datetime(2099, 1, 1, tzinfo=UTC)
        notices = Notices(agent, mine, asked)
        assert await notices._allowed()
        await notices.step()
        annotations = (await world.api.get(NODES, mine))["metadata"]["annotations"]
        assert annotations.items() >= {"kept": "1", **notice}.items()
        told = None
        await notices.step()
        assert CLOUD_ANNOTATION not in (await world.api.get(NODES, mine))["metadata"]["annotations"]
