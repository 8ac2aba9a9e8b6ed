"""The connections of a pod in its Migration's status: the agent lists them, the controller says whose the addresses are."""

from __future__ import annotations

import pytest

from podferry.core.connections import Fate, PeerKind
from podferry.core.phases import SourcePhase
from podferry.kube.client import NODES, PODS
from podferry.kube.connection_status import ListedConnection
from podferry.kube.migration import Ending, EnginePhases, Migration

from .test_agents import Agents
from .world import World

pytestmark = pytest.mark.anyio

HOST, SECOND, NOBODYS = "10.66.1.1", "fd00:66::3", "192.0.2.9"


def connection(remote: str, *, backend: str = "", peer: PeerKind = PeerKind.ANOTHER) -> ListedConnection:
    fate = Fate.LIVES if peer is PeerKind.INSIDE else Fate.CLOSED
    return ListedConnection(
        protocol="tcp", local="10.66.0.5:40000", remote=remote, backend=backend, peer=peer, fate=fate, why="so"
    )


async def listed(world: World, *found: ListedConnection, ended: bool = False) -> Migration:
    """A Migration whose source's agent has said that its pod has these connections."""
    await world.pod()
    world.controller()
    await world.migrate()
    await world.reached(lambda one: one.status.phase == "Running")

    def said(now: Migration) -> bool:
        now.status.engine = EnginePhases(source=SourcePhase.CHECK)
        now.status.connections = list(found)
        if ended:
            now.status.engine_ending = Ending(outcome="refused", reason="Refused", message="no")
        return True

    await world.set(said)
    if ended:
        return await world.ended()
    return await world.reached(lambda one: bool(one.status.peers))


async def with_addresses(world: World, name: str, *addresses: str, **spec: object) -> None:
    body = {
        "metadata": {"name": name},
        "spec": {"nodeName": world.nodes[1], "containers": [{"name": "c", "image": "i"}], **spec},
    }
    await world.api.create(PODS, body, world.namespace)
    await world.running(name)
    status = {"podIP": addresses[0], "podIPs": [{"ip": one} for one in addresses]}
    await world.patch(PODS, name, {"status": status}, world.namespace, part="status")


def kinds(migration: Migration) -> dict[str, tuple[str, str]]:
    return {one.address: (str(one.kind), one.name) for one in migration.status.peers}


async def test_whose_the_addresses_are(world: World) -> None:
    await with_addresses(world, "database", HOST, SECOND)
    nodes = (await world.api.get(NODES, world.nodes[1]))["status"]["addresses"][0]["address"]
    seen = await listed(
        world,
        connection("10.96.0.1:443", backend=f"{HOST}:5432"),
        connection(f"[{SECOND}]:5432"),
        connection(f"{nodes}:10250"),
        connection(f"{NOBODYS}:443"),
        connection("127.0.0.1:9000", peer=PeerKind.INSIDE),
        connection("what an agent says:1"),
    )
    assert kinds(seen) == {
        HOST: ("Pod", "database"),
        SECOND: ("Pod", "database"),
        nodes: ("Node", world.nodes[1]),
        NOBODYS: ("Outside", ""),
    }
    assert not any(one.agent for one in seen.status.peers)


async def test_a_pod_that_has_its_nodes_network_is_told_as_the_node(world: World) -> None:
    await with_addresses(world, "daemon", HOST, hostNetwork=True)
    assert kinds(await listed(world, connection(f"{HOST}:9100"))) == {HOST: ("Node", world.nodes[1])}


async def test_whether_the_other_end_has_an_agent(world: World) -> None:
    await with_addresses(world, "database", HOST)
    agent = {
        "metadata": {"name": "agent", "labels": {"app.kubernetes.io/name": "podferry-agent"}},
        "spec": {"nodeName": world.nodes[1], "containers": [{"name": "c", "image": "i"}]},
    }
    await world.api.create(PODS, agent, world.namespace)
    seen = await listed(world, connection(f"{HOST}:5432"))
    assert [one.agent for one in seen.status.peers] == [True]


async def test_a_pod_that_has_ended_has_its_address_no_more(world: World) -> None:
    await with_addresses(world, "database", HOST)
    await world.finish("database")
    assert kinds(await listed(world, connection(f"{HOST}:5432"))) == {HOST: ("Outside", "")}


async def test_what_the_agent_says_with_its_end_is_answered_all_the_same(world: World) -> None:
    """A refusal for the connections' sake, and a rehearsal, end at once."""
    await with_addresses(world, "database", HOST)
    seen = await listed(world, connection(f"{HOST}:5432"), ended=True)
    assert (seen.status.phase, kinds(seen)) == ("Refused", {HOST: ("Pod", "database")})


async def test_the_agent_lists_what_its_engine_has_found(world: World) -> None:
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    half = await agents.begun(await world.migrate())
    entry = connection(f"{NOBODYS}:443").model_dump(mode="json")
    waiting = {**entry, "remote": "", "peer": "listening", "fate": "lives"}
    half.enter(SourcePhase.CHECK, connections=[*([entry] * 99), waiting])
    seen = await world.reached(lambda one: bool(one.status.peers))
    assert [one.remote for one in seen.status.connections] == [f"{NOBODYS}:443"] * 64
    assert kinds(seen) == {NOBODYS: ("Outside", "")}
