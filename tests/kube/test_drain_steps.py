"""One step of a drain at a time: what the controller writes, what it leaves alone, and when it looks again."""

from __future__ import annotations

import datetime

import pytest

from podferry.controller import drains
from podferry.controller.drains import POLL_AGAIN, Drains
from podferry.core.drain import DrainPhase, PodState
from podferry.kube.client import EVENTS, NODE_DRAINS, NODES, PODS, Json
from podferry.kube.drain import NodeDrain

from .test_drain import ask, drained, get, migrations
from .world import World

pytestmark = pytest.mark.anyio
__all__ = ["drained"]
TIED = {"volumes": [{"name": "h", "hostPath": {"path": "/srv"}}]}


async def events(world: World, namespace: str) -> set[tuple[str, str, str]]:
    """Reason, type and object of what has been said about objects of this world."""
    found, _ = await world.api.list(EVENTS, namespace)
    said = [(one["reason"], one["type"], one["regarding"]["name"]) for one in found if "regarding" in one]
    return {one for one in said if namespace != "default" or one[2] in world.nodes}


async def step(world: World) -> float | None:
    return await Drains(world.api).step(world.nodes[0])


async def test_the_first_step_cordons_the_node_and_asks_for_the_first_moves(drained: World) -> None:
    world = drained
    pods = {name: await world.pod(name) for name in ("first", "second")}
    await ask(world, parallel=1, requestedBy="admin", mode="stop")
    assert await step(world) == POLL_AGAIN
    node, drain = await world.api.get(NODES, world.nodes[0]), await get(world)
    assert node["spec"]["unschedulable"] is True
    (condition,) = [one for one in drain.status.conditions if one.type == "Cordoned"]
    assert (condition.status, world.nodes[0] in condition.message) == ("True", True)
    (asked,) = await migrations(world)
    assert (asked.spec.pod_name in pods, asked.spec.requested_by, asked.spec.mode) == (True, "admin", "stop")
    (owner,) = asked.metadata["ownerReferences"]
    assert (owner["uid"], owner["controller"], owner["kind"]) == (drain.uid, True, "NodeDrain")
    assert {one.name: one.uid for one in drain.status.pods} == {
        name: pod["metadata"]["uid"] for name, pod in pods.items()
    }
    assert (drain.status.phase, drain.status.total, drain.status.left) == (DrainPhase.DRAINING, 2, 2)
    assert drain.status.start_time is not None
    assert drain.status.completion_time is None


async def test_a_second_step_that_finds_nothing_new_writes_nothing(drained: World) -> None:
    world = drained
    await world.pod()
    await ask(world)
    await step(world)
    await step(world)  # the Migration that the first one made is in the status now
    before = await world.api.get(NODE_DRAINS, world.nodes[0])
    node = await world.api.get(NODES, world.nodes[0])
    assert await step(world) == POLL_AGAIN
    assert await world.api.get(NODE_DRAINS, world.nodes[0]) == before
    assert await world.api.get(NODES, world.nodes[0]) == node
    assert len(await migrations(world)) == 1


async def test_a_drain_that_was_stopped_from_the_start_leaves_its_node_open_and_moves_nothing(drained: World) -> None:
    world = drained
    await world.pod()
    await world.pod("tied", **TIED)
    await ask(world, stop=True, evictOthers=True)
    await step(world)
    assert "unschedulable" not in (await world.api.get(NODES, world.nodes[0]))["spec"]
    assert await migrations(world) == []
    assert "deletionTimestamp" not in (await world.api.get(PODS, "tied", world.namespace))["metadata"]
    assert (await get(world)).status.phase is DrainPhase.STOPPED


async def test_an_evicted_pod_is_told_why(drained: World) -> None:
    world = drained
    await world.pod("tied", **TIED)
    await ask(world, evictOthers=True)
    assert await step(world) == POLL_AGAIN
    assert ("EvictedByDrain", "Normal", "tied") in await events(world, world.namespace)
    (pod,) = (await get(world)).status.pods
    assert (pod.state, "/srv" in pod.message) == (PodState.EVICTING, True)


async def test_an_eviction_that_the_api_server_refuses_is_in_the_status(drained: World) -> None:
    world = drained
    if world.fake is None:
        pytest.skip(
            "a real API server is not made to refuse an eviction here: that needs a PodDisruptionBudget's controller"
        )
    await world.pod("tied", **TIED)
    await ask(world, evictOthers=True)
    budget = {"kind": "Status", "reason": "TooManyRequests", "message": "the disruption budget has no room"}
    world.fake.refuse.append(("POST", "/eviction", 429, budget))
    assert await step(world) == POLL_AGAIN
    (pod,) = (await get(world)).status.pods
    assert "the eviction was refused: the disruption budget has no room" in pod.message
    assert "EvictedByDrain" not in {reason for reason, _, _ in await events(world, world.namespace)}
    await step(world)
    assert ("EvictedByDrain", "Normal", "tied") in await events(world, world.namespace), "it is asked again"


async def test_pods_that_may_be_too_late_are_warned_once(drained: World) -> None:
    """Two pods of 800 MiB, where a move of 100 MiB took ten seconds, and a node that goes away in 100 s: one of them is late."""
    world = drained
    if world.fake is None:
        pytest.skip("on a real API server the moves of other tests count, too")
    main = {"name": "main", "image": "train", "resources": {"requests": {"cpu": "100m", "memory": "800Mi"}}}
    for name in ("first", "second"):
        await world.pod(name, containers=[main])
    await world.has_moved(mebibytes=100, seconds=10)
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=100)
    await ask(world, parallel=1, deadline=soon.strftime("%Y-%m-%dT%H:%M:%SZ"))
    await step(world)
    late = {one.name for one in (await get(world)).status.pods if one.may_be_late}
    assert len(late) == 1
    warned = {(kind, name) for reason, kind, name in await events(world, world.namespace) if reason == "MayBeTooLate"}
    assert warned == {("Warning", name) for name in late}
    await step(world)
    found = [one for one in (await world.api.list(EVENTS, world.namespace))[0] if one["reason"] == "MayBeTooLate"]
    assert len(found) == 1, "who has been warned is not warned again"


async def test_an_empty_node_ends_the_drain_with_an_event_and_no_later_step_touches_it(drained: World) -> None:
    world = drained
    await ask(world)
    assert await step(world) is None
    drain = await get(world)
    assert (drain.status.phase, drain.status.summary) == (DrainPhase.COMPLETED, "no pods")
    assert drain.status.completion_time is not None
    assert ("NodeDrained", "Normal", world.nodes[0]) in await events(world, "default")
    before = await world.api.get(NODE_DRAINS, world.nodes[0])
    await world.pod()
    assert await step(world) is None
    assert await world.api.get(NODE_DRAINS, world.nodes[0]) == before
    assert await migrations(world) == []


async def test_what_is_left_on_the_node_ends_the_drain_with_a_warning(drained: World) -> None:
    world = drained
    await world.pod("tied", **TIED)
    await ask(world)
    assert await step(world) is None
    drain = await get(world)
    (completed,) = [one for one in drain.status.conditions if one.type == "Completed"]
    assert (drain.status.phase, completed.status, completed.reason) == (DrainPhase.INCOMPLETE, "False", "PodsLeft")
    assert ("NodeDrainIncomplete", "Warning", world.nodes[0]) in await events(world, "default")


async def test_a_drain_without_a_node_is_incomplete_and_says_which_node_there_is_not(world: World) -> None:
    name = f"{world.namespace}-none"
    world.also.append((NODE_DRAINS, name))
    await world.api.create(NODE_DRAINS, {"metadata": {"name": name}, "spec": {}})
    assert await Drains(world.api).step(name) is None
    drain = NodeDrain.from_json(await world.api.get(NODE_DRAINS, name))
    assert drain.status.phase is DrainPhase.INCOMPLETE
    assert drain.status.completion_time is not None
    assert name in drain.status.summary
    assert [(one.type, one.status, one.reason) for one in drain.status.conditions] == [
        ("Completed", "False", "NodeNotFound")
    ]


async def test_a_drain_that_is_not_there_any_more_takes_no_step(world: World) -> None:
    assert await Drains(world.api).step(world.nodes[0]) is None


def pod(**about: object) -> Json:
    return {"metadata": {"name": "p", "namespace": "n", "uid": "u", **about}, "status": {"phase": "Running"}}


@pytest.mark.unit
@pytest.mark.parametrize(
    ("one", "leaves"),
    [
        (pod(), True),
        (pod(annotations={"kubernetes.io/config.mirror": "x"}), False),
        (pod(ownerReferences=[{"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "d", "uid": "1", "controller": True}]), False),
        (pod(ownerReferences=[{"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": "1", "controller": True}]), True),
        ({**pod(), "status": {"phase": "Succeeded"}}, False),
        ({**pod(), "status": {"phase": "Failed"}}, False),
        ({**pod(), "status": {}}, True),
    ],
)  # fmt: skip
def test_which_pods_have_to_leave_a_node(one: Json, leaves: bool) -> None:
    assert drains.has_to_leave(one) is leaves


@pytest.mark.unit
@pytest.mark.parametrize(
    ("annotation", "heeded", "found"), [("7", True, 7), ("-2", True, -2), ("soon", True, 0), ("7", False, 0), (None, True, 0)]
)  # fmt: skip
def test_a_pods_priority_counts_where_its_policy_heeds_it(annotation: str | None, heeded: bool, found: int) -> None:
    class Policy:
        def heeds(self, wish: object) -> bool:
            return heeded

    annotations = {} if annotation is None else {drains.PRIORITY_ANNOTATION: annotation}
    assert drains.priority(pod(annotations=annotations), Policy()) == found  # type: ignore[arg-type]
