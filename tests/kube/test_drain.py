"""Drains, on a fake API server and on the real one, with the agents played: order, limits, failures, a killed controller."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from io import StringIO

import anyio
import pytest
from rich.console import Console

from podferry.cli.kubectl_drain import table
from podferry.cli.kubectl_preview import look
from podferry.controller.measuring import measured
from podferry.core.drain import ATTEMPTS, PodState
from podferry.core.estimate import MeasuredMove
from podferry.kube.client import MIGRATIONS, NODE_DRAINS, NODES, PODS, Json
from podferry.kube.drain import PRIORITY_ANNOTATION, NodeDrain
from podferry.kube.migration import Migration, MigrationProgress
from podferry.kube.quantities import seconds

from .world import World

pytestmark = pytest.mark.anyio


async def ask(world: World, **spec: object) -> str:
    """Ask for a drain of the first node."""
    node = world.nodes[0]
    await world.api.create(NODE_DRAINS, {"metadata": {"name": node}, "spec": spec})
    return node


async def get(world: World) -> NodeDrain:
    return NodeDrain.from_json(await world.api.get(NODE_DRAINS, world.nodes[0]))


async def reached(world: World, what: Callable[[NodeDrain], bool]) -> NodeDrain:
    async def so() -> bool:
        return what(await get(world))

    await world.until(so)
    return await get(world)


async def migrations(world: World) -> list[Migration]:
    return [Migration.from_json(one) for one in (await world.api.list(MIGRATIONS, world.namespace))[0]]


async def under_way(world: World) -> list[Migration]:
    return [one for one in await migrations(world) if not one.ended]


async def agents(world: World, done: set[str]) -> None:
    """Each Migration moves, as soon as it is there."""
    while True:
        for one in await under_way(world):
            if one.name not in done:
                done.add(one.name)
                world.tasks.start_soon(world.agents_move, one.name)
        await anyio.sleep(0.05)


@pytest.fixture
async def drained(world: World) -> World:
    """A world whose NodeDrain goes with it."""
    world.also.append((NODE_DRAINS, world.nodes[0]))
    return world


async def test_a_node_is_emptied_and_no_more_pods_move_at_once_than_allowed(drained: World) -> None:
    world = drained
    for number in range(4):
        await world.pod(f"train-{number}")
    scope = world.controller()
    await ask(world, parallel=2)
    most = 0
    began: set[str] = set()
    world.tasks.start_soon(agents, world, began)

    async def completed() -> bool:
        nonlocal most
        most = max(most, len(await under_way(world)))
        return (await get(world)).ended

    await world.until(completed)
    drain = await get(world)
    assert (drain.status.phase, drain.status.moved, drain.status.left) == ("Completed", 4, 0)
    assert most == 2
    assert {(one.state, one.node, one.downtime) for one in drain.status.pods} == {
        (PodState.MOVED, world.nodes[1], "42ms")
    }
    assert (await world.api.get(NODES, world.nodes[0]))["spec"]["unschedulable"] is True
    scope.cancel()


async def test_a_priority_goes_first(drained: World) -> None:
    world = drained
    for name in ("first", "second"):
        await world.pod(name)
    urgent = {"metadata": {"annotations": {PRIORITY_ANNOTATION: "7"}}}
    await world.patch(PODS, "second", urgent, world.namespace)
    world.controller()
    await ask(world, parallel=1, requestedBy="admin")

    async def begun() -> bool:
        return bool(await under_way(world))

    await world.until(begun)
    asked = [(one.spec.pod_name, one.spec.requested_by) for one in await migrations(world)]
    assert asked == [("second", "admin")], "who asked for the drain asked for its moves"


async def test_what_cannot_move_stays_with_the_reason(drained: World) -> None:
    world = drained
    await world.pod("tied", volumes=[{"name": "h", "hostPath": {"path": "/srv"}}])
    world.controller()
    await ask(world)
    drain = await reached(world, lambda one: one.ended)
    (pod,) = drain.status.pods
    assert (drain.status.phase, pod.state) == ("Incomplete", "Left")
    assert "/srv" in pod.message
    assert await world.api.find(PODS, "tied", world.namespace) is not None


async def test_what_cannot_move_is_evicted_when_the_user_says_so(drained: World) -> None:
    world = drained
    await world.pod("tied", volumes=[{"name": "h", "hostPath": {"path": "/srv"}}])
    world.controller()
    await ask(world, evictOthers=True)
    drain = await reached(world, lambda one: one.ended)
    (pod,) = drain.status.pods
    assert (drain.status.phase, pod.state) == ("Completed", "Gone")
    assert await world.api.find(PODS, "tied", world.namespace) is None


async def test_moves_that_fail_are_tried_again_and_then_left(drained: World) -> None:
    world = drained
    await world.pod()
    world.controller()
    await ask(world)
    failed: set[str] = set()

    async def fail_each() -> bool:
        for one in await under_way(world):
            if one.name not in failed and one.status.phase == "Running":
                failed.add(one.name)
                await world.agents_end("rolled-back", one.name, "Engine", "the link broke")
        return (await get(world)).ended

    await world.until(fail_each)
    drain = await get(world)
    (pod,) = drain.status.pods
    assert (len(failed), pod.state, drain.status.phase) == (ATTEMPTS, "Left", "Incomplete")
    assert "the link broke" in pod.message


async def test_a_drain_is_stopped_and_resumed(drained: World) -> None:
    world = drained
    for number in range(2):
        await world.pod(f"train-{number}")
    world.controller()
    node = await ask(world, parallel=1)

    async def begun() -> bool:
        return bool(await under_way(world))

    await world.until(begun)
    await world.patch(NODE_DRAINS, node, {"spec": {"stop": True}})
    (first,) = await under_way(world)
    await world.agents_move(first.name)
    stopped = await reached(world, lambda one: one.status.phase == "Stopped")
    assert (stopped.status.moved, stopped.status.left) == (1, 1)
    await world.patch(NODE_DRAINS, node, {"spec": {"stop": False}})
    world.tasks.start_soon(agents, world, {first.name})
    assert (await reached(world, lambda one: one.ended)).status.moved == 2


async def test_a_killed_controller_goes_on(drained: World) -> None:
    world = drained
    await world.pod()
    scope = world.controller()
    await ask(world)

    async def begun() -> bool:
        return bool(await under_way(world))

    await world.until(begun)
    scope.cancel()
    (only,) = await under_way(world)
    world.controller()
    world.tasks.start_soon(partial(agents, world, set()))
    drain = await reached(world, lambda one: one.ended)
    assert [one.name for one in await migrations(world)] == [only.name]
    assert (drain.status.moved, drain.status.pods[0].migration) == (1, only.name)


async def test_a_node_that_is_not_there_ends_the_drain(world: World) -> None:
    name = f"{world.namespace}-none"
    world.also.append((NODE_DRAINS, name))
    world.controller()
    await world.api.create(NODE_DRAINS, {"metadata": {"name": name}, "spec": {}})

    async def over() -> bool:
        return NodeDrain.from_json(await world.api.get(NODE_DRAINS, name)).ended

    await world.until(over)
    found: Json = await world.api.get(NODE_DRAINS, name)
    assert found["status"]["conditions"][0]["reason"] == "NodeNotFound"


async def test_a_dry_run_says_where_to_and_how_long_by_what_was_seen_before(drained: World) -> None:
    """A pod of 800 MiB, where a move of 100 MiB took ten seconds."""
    world = drained
    here, there = world.nodes
    room = {"requests": {"cpu": "100m", "memory": "800Mi"}}
    main = {"name": "main", "image": "train", "resources": room}
    await world.pod("train", containers=[main])
    await world.pod("small")
    await world.pod("tied", volumes=[{"name": "h", "hostPath": {"path": "/srv"}}])
    before = {
        one["pod"]: one for one in await look(world.api, here, evict_others=True) if one["namespace"] == world.namespace
    }
    assert {name: one["action"] for name, one in before.items()} == {"train": "move", "small": "move", "tied": "evict"}
    assert [before[name]["estimate"] for name in ("small", "tied")] == [None, None]
    assert there in before["train"]["nodes"]
    assert here not in before["train"]["nodes"]
    await world.has_moved(mebibytes=100, seconds=10)
    earlier = measured((await world.api.list(MIGRATIONS, world.namespace))[0])
    assert earlier == [MeasuredMove(100 << 20, 10.0, 0.3)]
    after = {
        one["pod"]: one
        for one in await look(world.api, here, evict_others=False)
        if one["namespace"] == world.namespace
    }
    assert after["train"]["estimate"] is not None
    if world.fake is not None:  # on the real one other tests' moves count as well
        assert after["train"]["estimate"] == {"seconds": 80.0, "downtime_seconds": 0.3, "moves": 1}
    assert after["small"]["estimate"] is None, "it does not say how much memory it needs"
    await world.patch(NODES, there, {"spec": {"unschedulable": True}})
    now = {
        one["pod"]: one
        for one in await look(world.api, here, evict_others=False)
        if one["namespace"] == world.namespace
    }
    assert there not in now["train"]["nodes"]
    assert await world.api.find(NODE_DRAINS, here) is None
    world.also.remove((NODE_DRAINS, here))


async def test_a_drain_says_how_long_its_moves_will_take_and_how_far_they_are(drained: World) -> None:
    """Pods of 800 MiB, where a move of 100 MiB took ten seconds: 80 s each, one after another."""
    world = drained
    main = {"name": "main", "image": "train", "resources": {"requests": {"cpu": "100m", "memory": "800Mi"}}}
    for name in ("first", "second"):
        await world.pod(name, containers=[main])
    await world.has_moved(mebibytes=100, seconds=10)
    world.controller()
    await ask(world, parallel=1)

    async def begun() -> bool:
        return any(one.status.phase == "Running" for one in await under_way(world))

    await world.until(begun)
    (move,) = await under_way(world)

    def far(now: Migration) -> bool:
        now.status.progress = MigrationProgress(summary="round 2, 40%")
        return True

    await world.set(far, move.name)
    drain = await reached(world, lambda one: "round 2, 40%" in [pod.message for pod in one.status.pods])
    assert all(one.estimate for one in drain.status.pods)
    assert seconds(drain.status.remaining) > 0
    if world.fake is not None:  # on the real one other tests' moves count as well
        assert {one.estimate for one in drain.status.pods} == {"80s"}
        assert 80 < seconds(drain.status.remaining) <= 180
    shown = StringIO()
    Console(file=shown, width=200).print(table(drain))
    assert "round 2, 40%" in shown.getvalue()
    assert f"about {drain.status.remaining} left" in shown.getvalue()
    world.tasks.start_soon(agents, world, set[str]())
    assert (await reached(world, lambda one: one.ended)).status.remaining == ""
