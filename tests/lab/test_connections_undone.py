"""Connections of stand-alone containers where a move does not go through, or not for both ends. test_situations has the others."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from moving import A, B, Cluster, Witness, until
from test_situations import saves_sockets

from podferry.core.phases import SourcePhase, TargetPhase
from podferry.lab import Lab
from podferry.model import Connections, Mode

pytestmark = pytest.mark.lab
PAIRS = ("tcp_loopback_pair", "tcp_loopback_stream_that_waits_for_its_reader")
CLIENT = """
import socket
one = socket.create_connection(("127.0.0.1", 7017))
try: print(one.recv(1))
except OSError as error: print(type(error).__name__)
"""


@pytest.fixture(scope="module")
def cluster(lab: Lab) -> Cluster:
    cluster = Cluster(lab)
    if not saves_sockets(cluster):
        pytest.skip("the nodes' CRIU cannot save TCP sockets on this kernel: needs CRIU 4.2 (PODFERRY_DEBIAN=forky)")
    cluster.install_gates()
    return cluster


@pytest.fixture
def name(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"connected-{request.node.callspec.id}" if hasattr(request.node, "callspec") else "connected"
    name = name.replace("_", "-").lower()
    yield name
    cluster.open_breakpoints()
    cluster.stop(name)


def test_a_check_tells_of_each_connection_what_becomes_of_it(cluster: Cluster, name: str) -> None:
    cluster.start(name, "counting situations", "tcp_loopback_pair")
    until(lambda: len(cluster.lines(A, name)) > 3, "the two processes talk")
    checked = cluster.agent(A).call("check", name=name, to=B)
    told = [(one["peer"], one["fate"]) for one in checked["connections"]]
    assert told.count(("inside", "lives")) == 2
    assert set(told) <= {("inside", "lives"), ("listening", "lives")}
    assert checked["connections_total"] == {"lives": 2, "preserved": 0, "readdressed": 0, "closed": 0}


@pytest.mark.parametrize("killed", [A, B])
@pytest.mark.parametrize("situation", PAIRS)
def test_a_pair_goes_on_where_it_was_after_the_dump_was_for_nothing(
    cluster: Cluster, name: str, situation: str, killed: str
) -> None:
    """Everything is on the target when an agent dies; the dumped and locked connections are let go again."""
    cluster.start(name, "counting situations", situation)
    with Witness(cluster, name) as witness:
        gate = f"target-{TargetPhase.READY}-{name}"
        cluster.close_breakpoint(gate)
        move = cluster.begin(name, source=A, mode=Mode.LIVE)
        cluster.reached(gate, move)
        cluster.kill(killed, "agent")
        cluster.open_breakpoints()
        record = cluster.ended(A, name)
        assert record["outcome"] != "completed", record
        cluster.goes_on(A, name)
        again = cluster.migrate(name, source=A, mode=Mode.LIVE)
        assert again["outcome"] == "completed", again
        cluster.goes_on(B, name)
        witness.testify(name)


def test_no_connection_is_lost_where_that_was_asked_for(cluster: Cluster, name: str) -> None:
    """Somebody connects after the check: the move is taken back at the freeze. Then the check refuses it. Nobody is disturbed."""
    cluster.start(name, "counting situations", "tcp_client_that_is_none_of_ours")
    until(lambda: len(cluster.lines(A, name)) >= 5, "it waits for a client")
    pid = cluster.containerd(A).task(name).pid
    gate = f"source-{SourcePhase.CUTOVER}-{name}"
    cluster.close_breakpoint(gate)
    move = cluster.begin(name, source=A, mode=Mode.STOP, connections=str(Connections.REQUIRE))
    cluster.reached(gate, move)
    with ThreadPoolExecutor(1) as pool:
        argv = ["nsenter", f"--net=/proc/{pid}/ns/net", "python3", "-c", CLIENT]
        client = pool.submit(lambda: cluster.lab.exec(A, argv, check=False, timeout=180))
        until(lambda: "connected" in cluster.lines(A, name), "somebody is connected")
        cluster.open_breakpoints()
        record = move.result()
        assert (record["outcome"], record["error"]["code"]) == ("rolled-back", "PF116"), record
        assert "tcp 127.0.0.1:7017 -> " in record["error"]["why"]
        checked = cluster.agent(A).call("check", name=name, to=B, connections=str(Connections.REQUIRE))
        assert (checked["movable"], [one["code"] for one in checked["refusals"]]) == (False, ["PF116"])
        record = cluster.migrate(name, source=A, mode=Mode.STOP, connections=str(Connections.REQUIRE))
        assert (record["outcome"], record["error"]["code"]) == ("refused", "PF116"), record
        assert not client.done(), "it is still connected"
        assert cluster.agent(A).call("check", name=name, to=B)["movable"]
        cluster.stop(name)
        client.result()


def test_who_waits_for_another_finds_the_connection_closed(cluster: Cluster, name: str) -> None:
    cluster.start(name, "counting situations", "tcp_client_that_is_none_of_ours")
    pid = cluster.containerd(A).task(name).pid
    with ThreadPoolExecutor(1) as pool:
        argv = ["nsenter", f"--net=/proc/{pid}/ns/net", "python3", "-c", CLIENT]
        client = pool.submit(lambda: cluster.lab.exec(A, argv, check=False, timeout=180))
        until(lambda: "connected" in cluster.lines(A, name), "somebody is connected")
        checked = cluster.agent(A).call("check", name=name, to=B)
        told = [(one["local"], one["peer"], one["fate"]) for one in checked["connections"]]
        assert told == [("127.0.0.1:7017", "another", "closed"), ("127.0.0.1:7017", "listening", "lives")]
        warned = " ".join(checked["warnings"])
        assert "the move closes TCP connections to others: 127.0.0.1:7017" in warned
        record = cluster.migrate(name, source=A, mode=Mode.STOP)
        assert record["outcome"] == "completed", record
        assert [one.partition(" ")[0] for one in record["closed_connections"]] == ["127.0.0.1:7017"]
        cluster.goes_on(B, name)
        assert client.result().returncode == 0
