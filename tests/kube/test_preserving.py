"""Connections that a Migration preserves: what the status says to the agents of all nodes concerned, and whom they believe."""

from __future__ import annotations

import pytest

from podferry.core.connections import Fate, PeerKind
from podferry.errors import Refused
from podferry.kube.client import PODS
from podferry.kube.connection_status import ListedConnection
from podferry.kube.migration import RESUMED, Ending, Migration
from podferry.workload.pod.cluster_port import MigrationName, PeerPod

from .test_agents import Agents
from .test_peers import HOST, with_addresses
from .world import World

pytestmark = pytest.mark.anyio

OWN = "10.66.0.5"


async def preserving(world: World, **spec: object) -> tuple[Migration, Agents, str]:
    """A Migration that runs and preserves the connection of its pod to the pod `database`, whose uid is returned. That is on
    the target's node, where an agent runs."""
    pod = await world.pod()
    status = {"podIP": OWN, "podIPs": [{"ip": OWN}]}
    await world.patch(PODS, "train", {"status": status}, world.namespace, part="status")
    await with_addresses(world, "database", HOST)
    agent = {
        "metadata": {"name": "agent", "labels": {"app.kubernetes.io/name": "podferry-agent"}},
        "spec": {"nodeName": world.nodes[1], "containers": [{"name": "c", "image": "i"}]},
    }
    await world.api.create(PODS, agent, world.namespace)
    world.controller()
    agents = Agents.of(world)
    half = await agents.begun(await world.migrate(**({"connections": "Preserve"} | spec)))
    assert half.pod.uid == pod["metadata"]["uid"]
    listed = ListedConnection(
        protocol="tcp",
        local=f"{OWN}:40000",
        remote=f"{HOST}:5432",
        peer=PeerKind.ANOTHER,
        fate=Fate.PRESERVED,
    )

    def said(now: Migration) -> bool:
        now.status.connections = [listed]
        return True

    await world.set(said)
    seen = await world.reached(lambda one: bool(one.status.peers))
    database = await world.api.get(PODS, "database", world.namespace)
    return seen, agents, str(database["metadata"]["uid"])


async def test_both_agents_learn_who_is_at_the_other_end_and_where(world: World) -> None:
    migration, agents, database = await preserving(world)
    name = MigrationName(migration.namespace, migration.name, migration.uid)
    for cluster in agents.clusters:
        assert await cluster.peers(migration.uid, {HOST}) == (name, {HOST: PeerPod(database, world.nodes[1])})
        assert cluster.address(world.nodes[1]) is not None
    (peer,) = migration.status.peers
    assert peer.node_address == migration.status.target_address
    assert migration.status.source_pod_addresses == [OWN]


async def test_who_may_say_where_a_pod_is_going_to_be(world: World) -> None:
    migration, agents, database = await preserving(world)
    name = MigrationName(migration.namespace, migration.name, migration.uid)
    moving = await agents.clusters[1].moving(name, world.nodes[1])
    assert (moving.addresses, moving.peers) == ({OWN}, {database})
    assert (await agents.clusters[0].moving(name, world.nodes[1])).peers == set(), "none of that node's"
    for stranger in (world.nodes[0], "another"):
        with pytest.raises(Refused, match="may not"):
            await agents.clusters[1].moving(name, stranger)
    for wrong in (MigrationName(name.namespace, name.name, "other"), MigrationName(name.namespace, "none", name.uid)):
        with pytest.raises(Refused, match="may not"):
            await agents.clusters[1].moving(wrong, world.nodes[1])


async def test_no_connection_is_turned_for_a_migration_that_closes_them(world: World) -> None:
    migration, agents, _ = await preserving(world, connections="Close")
    name = MigrationName(migration.namespace, migration.name, migration.uid)
    with pytest.raises(Refused, match="preserves connections"):
        await agents.clusters[1].moving(name, world.nodes[1])


@pytest.mark.parametrize(
    ("outcome", "resumed", "moved"),
    [("completed", True, True), ("rolled-back", False, False), ("failed", False, False)],
)
async def test_how_the_move_has_ended(world: World, outcome: str, resumed: bool, moved: bool) -> None:
    migration, agents, _ = await preserving(world)
    name = MigrationName(migration.namespace, migration.name, migration.uid)
    assert await agents.clusters[1].moved(name) is None

    def ended(now: Migration) -> bool:
        if resumed:
            now.status.set_condition(RESUMED, True, "Running", "so")
        now.status.engine_ending = Ending(outcome=outcome, reason="So", message="so")
        return True

    await world.set(ended)
    assert await agents.clusters[1].moved(name) is moved
    assert await agents.clusters[1].moved(MigrationName(name.namespace, "gone", "x")) is True
