"""Connections between pods that go on although one end moves, then the other, then the first again: nothing said is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from podferry.core.phases import TargetPhase
from podferry.lab import Lab
from podferry.model import Connections

from . import talking
from .moving_pods import A, B, Json, Move, Movers, pod, until

pytestmark = pytest.mark.cluster

NOTHING = "0 []"


@pytest.fixture(scope="module")
def movers(bare: Lab) -> Iterator[Movers]:
    movers = Movers(bare)
    yield movers
    movers.kubectl.run("delete", "pod", "--all", "--wait", "--grace-period=1")
    movers.stop()


@pytest.fixture
def talk(movers: Movers) -> Iterator[tuple[Json, Json]]:
    """A client on A, and the server on B that it talks to."""
    first, second = talking.pods(pod)
    server = movers.create(first, B)
    client = movers.create(second(server["status"]["podIP"]))
    goes_on(movers, client)
    yield client, server
    movers.kubectl.run("delete", "pod", "--all", "--wait", "--grace-period=1")


def goes_on(movers: Movers, client: Json) -> None:
    name = client["metadata"]["name"]
    before = talking.counted(movers.logs(name))
    until(lambda: talking.counted(movers.logs(name)) > before + 50, f"{name} talks")


def preserving(movers: Movers, moves: Json, stays: Json) -> Move:
    """A move in which the controller knows who is at the other end."""
    target = B if moves["spec"]["nodeName"] == A else A
    peer = {"uid": stays["metadata"]["uid"], "node": stays["spec"]["nodeName"]}
    known = {"target": target, "addresses": [moves["status"]["podIP"]], "pods": {stays["status"]["podIP"]: peer}}
    move = movers.order(moves, target, connections=str(Connections.PRESERVE))
    for node in (A, B):
        movers.say(node, move.id, "peers", known)
    return move


def settled(movers: Movers, move: Move, *, moved: bool) -> None:
    for node in (A, B):
        movers.say(node, move.id, "moved", moved)


def moved(movers: Movers, moves: Json, stays: Json) -> Json:
    move = preserving(movers, moves, stays)
    there, record = movers.follow(move)
    assert not record.get("closed_connections"), record
    settled(movers, move, moved=True)
    return there


def test_connections_go_on_wherever_their_ends_move_and_leave_nothing(movers: Movers, talk: tuple[Json, Json]) -> None:
    client, server = talk
    server = moved(movers, server, client)
    goes_on(movers, client)
    client = moved(movers, client, server)
    goes_on(movers, client)
    server = moved(movers, server, client)
    goes_on(movers, client)
    assert [movers.get(one["metadata"]["name"])["status"]["phase"] for one in (client, server)] == ["Running"] * 2
    assert talking.rules(movers.lab, B) == f"2 {sorted(one['metadata']['uid'] for one in (client, server))}"
    movers.kubectl.run("exec", client["metadata"]["name"], "--", "touch", "/tmp/end")
    for node in (A, B):
        until(lambda node=node: talking.rules(movers.lab, node) == NOTHING, f"no rule is left on {node}")


@pytest.mark.parametrize("killed", [A, B])
def test_a_move_that_is_taken_back_when_all_were_told_harms_no_connection(
    movers: Movers, talk: tuple[Json, Json], killed: str
) -> None:
    """The client's move: A is its source and the source's agent's node, B its target and the server's node."""
    client, server = talk
    gate = movers.close_breakpoint(f"target-{TargetPhase.READY}-default_client")
    twin = movers.root(B) / gate.relative_to(movers.root(A))
    reached = twin.with_name(f"{twin.name}.reached")
    reached.unlink(missing_ok=True)
    twin.touch()
    move = preserving(movers, client, server)
    made = movers.answered(movers.make_target, move)
    until(reached.exists, "the target has all, and has told the others")
    assert talking.rules(movers.lab, B) != NOTHING, "all were told"
    movers.kill(killed)
    for one in (gate, twin):
        one.unlink(missing_ok=True)
    movers.start(killed)
    made.result()
    record = movers.ended(A, move)
    assert record["outcome"] != "completed", record
    settled(movers, move, moved=False)
    movers.delete(move.target_pod["metadata"]["name"] if move.target_pod else "none")
    goes_on(movers, client)
    for node in (A, B):
        until(lambda node=node: talking.rules(movers.lab, node) == NOTHING, f"no rule is left on {node}")
    client = moved(movers, client, server)
    goes_on(movers, client)
