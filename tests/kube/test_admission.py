"""Which offers a Migration admits: the agents' real Kubernetes side, on both API servers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import anyio
import pytest

from podferry.agent import kubernetes
from podferry.agent.kubernetes import Kubernetes
from podferry.core.phases import TargetPhase
from podferry.errors import Refused
from podferry.kube.client import MIGRATIONS, NODES
from podferry.kube.migration import Migration
from podferry.model import Mode
from podferry.workload.pod.cluster_port import PodName

from .test_agents import Agents
from .world import World

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "ADMIT_WITHIN", 1.0)


async def begun(world: World) -> tuple[Migration, PodName, Kubernetes]:
    """A Migration that runs, its pod, and the target's side of it."""
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    half = await agents.begun(await world.migrate())
    return await world.get("move"), half.pod, agents.clusters[1]


async def test_the_source_of_a_running_migration_is_admitted_once(world: World) -> None:
    migration, pod, target = await begun(world)
    await target.admit(migration.uid, pod, world.nodes[0], Mode.LIVE)
    claimed = await world.get("move")
    assert claimed.status.engine is not None
    assert claimed.status.engine.target == TargetPhase.RECEIVE
    with pytest.raises(Refused, match="made already"):
        await target.admit(migration.uid, pod, world.nodes[0], Mode.LIVE)


async def test_of_two_agents_of_one_name_that_ask_at_once_one_is_admitted(world: World) -> None:
    """An agent that was replaced, or a replay that meets the first offer: the API server's compare-and-swap decides."""
    migration, pod, target = await begun(world)
    answers: list[str] = []

    async def ask() -> None:
        try:
            await target.admit(migration.uid, pod, world.nodes[0], Mode.LIVE)
            answers.append("admitted")
        except Refused:
            answers.append("refused")

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(ask)
    assert sorted(answers) == ["admitted", *["refused"] * 4]


Attack = Callable[[Kubernetes, Migration, PodName, World], Awaitable[None]]


async def _another_node(target: Kubernetes, migration: Migration, pod: PodName, world: World) -> None:
    other = f"{world.namespace}-c"
    await world.api.create(NODES, {"metadata": {"name": other}})
    try:
        await target.admit(migration.uid, pod, other, Mode.LIVE)
    finally:
        await world.api.delete(NODES, other)


async def _a_node_that_is_gone(target: Kubernetes, migration: Migration, pod: PodName, world: World) -> None:
    await target.admit(migration.uid, pod, f"{world.namespace}-gone", Mode.LIVE)


async def _another_pod(target: Kubernetes, migration: Migration, pod: PodName, world: World) -> None:
    await target.admit(migration.uid, replace(pod, name="other"), world.nodes[0], Mode.LIVE)


async def _the_same_name_later(target: Kubernetes, migration: Migration, pod: PodName, world: World) -> None:
    later = replace(pod, uid="00000000-0000-0000-0000-000000000000")
    await target.admit(migration.uid, later, world.nodes[0], Mode.LIVE)


async def _another_namespace(target: Kubernetes, migration: Migration, pod: PodName, world: World) -> None:
    await target.admit(migration.uid, replace(pod, namespace="victim"), world.nodes[0], Mode.LIVE)


async def _another_mode(target: Kubernetes, migration: Migration, pod: PodName, world: World) -> None:
    await target.admit(migration.uid, pod, world.nodes[0], Mode.POSTCOPY)


async def _no_such_migration(target: Kubernetes, migration: Migration, pod: PodName, world: World) -> None:
    await target.admit("00000000-0000-0000-0000-000000000000", pod, world.nodes[0], Mode.LIVE)


async def _a_migration_to_another_node(target: Kubernetes, migration: Migration, pod: PodName, world: World) -> None:
    third = Kubernetes(world.api, f"{world.namespace}-c")
    third._known.learn(migration)  # as a node would that reads all Migrations
    await third.admit(migration.uid, pod, world.nodes[0], Mode.LIVE)


@pytest.mark.parametrize(
    "attack",
    [
        _another_node,
        _a_node_that_is_gone,
        _another_pod,
        _the_same_name_later,
        _another_namespace,
        _another_mode,
        _no_such_migration,
        _a_migration_to_another_node,
    ],
)
async def test_no_other_offer_is_admitted(attack: Attack, world: World) -> None:
    migration, pod, target = await begun(world)
    with pytest.raises(Refused):
        await attack(target, migration, pod, world)
    now = await world.get("move")
    assert now.status.engine is None or not now.status.engine.target
    await target.admit(migration.uid, pod, world.nodes[0], Mode.LIVE)


async def test_a_migration_that_goes_back_admits_nothing_though_the_watch_is_behind(world: World) -> None:
    migration, pod, target = await begun(world)
    await world.patch(MIGRATIONS, "move", {"spec": {"cancel": True}}, world.namespace)
    await world.ended()
    target._known.learn(migration)
    with pytest.raises(Refused, match="not Running"):
        await target.admit(migration.uid, pod, world.nodes[0], Mode.LIVE)


async def test_before_it_runs_a_migration_admits_nothing(world: World) -> None:
    """Nobody has checked or placed it yet: the offer waits a moment, and is refused."""
    await world.pod()
    agents = Agents.of(world)
    migration = await world.migrate()
    status = {"phase": "Scheduling", "sourceNode": world.nodes[0], "targetNode": world.nodes[1]}
    await world.patch(MIGRATIONS, "move", {"status": status}, world.namespace, part="status")
    with pytest.raises(Refused, match="not Running"):
        await agents.clusters[1].admit(migration.uid, PodName(world.namespace, "job", "u"), world.nodes[0], Mode.LIVE)


async def test_a_source_whose_node_has_left_the_cluster_is_not_admitted(world: World) -> None:
    """Its certificate is good for some days more. The Migration says that the node is gone, by the controller."""
    migration, pod, target = await begun(world)
    node = await world.api.get(NODES, world.nodes[0])
    await world.api.delete(NODES, world.nodes[0])
    await world.reached(lambda one: one.status.source_address is None)
    with pytest.raises(Refused, match="has no node"):
        await target.admit(migration.uid, pod, world.nodes[0], Mode.LIVE)
    about = {name: value for name, value in node["metadata"].items() if name in ("name", "labels")}
    await world.api.create(NODES, {**node, "metadata": about})
