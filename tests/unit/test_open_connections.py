"""What a move makes of a workload's connections, told from what the kernel lists; test_criu_connections has the images' side."""

from __future__ import annotations

import ipaddress
import os
import socket

import pytest

from podferry.core.connections import (
    CLOSE_WAIT,
    LISTEN,
    SYN_SENT,
    TCP,
    UDP,
    End,
    Fate,
    KernelSocket,
    OpenConnection,
    PeerKind,
    judge,
    refused,
    told,
)
from podferry.model import Connections
from podferry.node.open_connections import open_connections

pytestmark = pytest.mark.unit

ESTABLISHED, SYN_RECV, BOUND = 1, 3, 7
POD, OTHER, SERVICE = "10.0.0.5", "10.0.1.9", "10.96.0.7"


def end(text: str) -> End:
    host, _, port = text.rpartition(":")
    return End(ipaddress.ip_address(host.strip("[]")), int(port))


def sock(
    local: str, remote: str = "", state: int = ESTABLISHED, protocol: str = TCP, *, held: bool = True
) -> KernelSocket:
    return KernelSocket(protocol, end(local), end(remote) if remote else None, state, held)


def one(*sockets: KernelSocket) -> OpenConnection:
    (found,) = judge(sockets)
    return found


@pytest.mark.parametrize(
    ("address", "other"), [(POD, POD), ("127.0.0.1", "127.0.0.1"), ("[::1]", "[::1]"), ("[fd00::5]", "[fd00::5]")]
)
def test_both_ends_within_live(address: str, other: str) -> None:
    found = judge([sock(f"{address}:9000", f"{other}:40000"), sock(f"{other}:40000", f"{address}:9000")])
    assert {(it.peer, it.fate, it.lost) for it in found} == {(PeerKind.INSIDE, Fate.LIVES, False)}
    assert len(found) == 2


@pytest.mark.parametrize("other", [OTHER, "[fd00::9]", "127.0.0.1"])
def test_one_to_another_is_closed(other: str) -> None:
    found = one(sock(f"{POD}:40000", f"{other}:5432"))
    assert (found.peer, found.fate, found.lost) == (PeerKind.ANOTHER, Fate.CLOSED, True)
    assert str(found) == f"tcp {POD}:40000 -> {other}:5432"


def test_one_whose_own_other_end_has_closed_it_lives_and_anothers_does_not() -> None:
    assert one(sock(f"{POD}:40000", f"{POD}:9000", CLOSE_WAIT)).fate is Fate.LIVES
    assert one(sock(f"{POD}:40000", f"{OTHER}:9000", CLOSE_WAIT)).fate is Fate.CLOSED


def test_one_that_is_being_opened_is_closed_wherever_it_goes() -> None:
    found = judge([sock(f"{POD}:40000", f"{POD}:9000", SYN_SENT), sock(f"{POD}:40001", f"{OTHER}:9000", SYN_SENT)])
    assert {it.fate for it in found} == {Fate.CLOSED}
    assert all("not connected yet" in it.why for it in found)
    half = [sock("0.0.0.0:80", state=LISTEN), sock(f"{POD}:80", f"{POD}:40000", SYN_RECV, held=False)]
    opening = judge([*half, sock(f"{POD}:40000", f"{POD}:80", SYN_SENT)])
    assert {it.fate for it in opening if it.local == f"{POD}:40000"} == {Fate.CLOSED}, (
        "though its listener has heard of it"
    )


def test_a_connected_datagram_socket_to_another_sends_from_the_new_address() -> None:
    found = one(sock(f"{POD}:40000", f"{OTHER}:53", protocol=UDP))
    assert (found.peer, found.fate, found.lost) == (PeerKind.ANOTHER, Fate.READDRESSED, True)
    within = judge([sock(f"{POD}:40000", f"{POD}:53", protocol=UDP), sock(f"{POD}:53", state=BOUND, protocol=UDP)])
    assert {it.fate for it in within} == {Fate.LIVES}


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_who_waits_is_told_where_it_waits_then(protocol: str) -> None:
    state = LISTEN if protocol == TCP else BOUND

    def where(*locals: str) -> str:
        found = judge([sock(local, state=state, protocol=protocol) for local in locals])
        assert {(it.peer, it.fate, it.remote) for it in found} == {(PeerKind.LISTENING, Fate.LIVES, "")}
        return next(it.why for it in found if it.local == locals[0])

    assert "the target's address" in where("0.0.0.0:80")
    assert "the target's address" in where(f"{POD}:80")
    assert "loopback" in where("127.0.0.1:80")
    assert "old address" in where(f"{POD}:80", "127.0.0.1:80")


def test_what_nobody_has_accepted_yet_is_told_of_others_only() -> None:
    listener = sock("0.0.0.0:80", state=LISTEN)
    from_outside = judge([listener, sock(f"{POD}:80", f"{OTHER}:40000", held=False)])
    assert [(it.remote, it.fate) for it in from_outside if it.remote] == [(f"{OTHER}:40000", Fate.CLOSED)]
    inside = judge([listener, sock(f"{POD}:80", f"{POD}:40000", held=False), sock(f"{POD}:40000", f"{POD}:80")])
    assert [(it.local, it.fate) for it in inside if it.remote] == [(f"{POD}:40000", Fate.LIVES)]
    assert judge([sock(f"{POD}:80", f"{OTHER}:40000", held=False)]) == (), "it came to another's listener"


def test_who_is_behind_a_service_is_told() -> None:
    asked = []

    def backend(protocol: str, local: End, remote: End) -> End | None:
        asked.append((protocol, str(local), str(remote)))
        return end(f"{OTHER}:8080")

    sockets = [
        sock(f"{POD}:40000", f"{SERVICE}:80"),
        sock("127.0.0.1:1", "127.0.0.1:2"),
        sock("127.0.0.1:2", "127.0.0.1:1"),
    ]
    found = judge(sockets, backend)
    assert asked == [(TCP, f"{POD}:40000", f"{SERVICE}:80")], "nobody stands between the ends of one workload"
    assert str(found[0]) == f"tcp {POD}:40000 -> {SERVICE}:80 (really {OTHER}:8080)"


def test_a_workloads_own_other_end_behind_a_translation_is_none_that_lives() -> None:
    sockets = [sock(f"{POD}:40000", f"{SERVICE}:80"), sock("127.0.0.1:15001", state=LISTEN)]
    found = judge(sockets, lambda *_: end("127.0.0.1:15001"))
    assert (found[0].fate, "translation" in found[0].why) == (Fate.CLOSED, True)


def test_what_a_move_costs_comes_first_and_who_only_waits_last() -> None:
    sockets = [
        sock("0.0.0.0:80", state=LISTEN),
        sock("127.0.0.1:1", "127.0.0.1:2"),
        sock("127.0.0.1:2", "127.0.0.1:1"),
        sock(f"{POD}:9", f"{OTHER}:53", protocol=UDP),
        sock(f"{POD}:8", f"{OTHER}:1"),
    ]
    assert [it.local for it in judge(sockets)] == [f"{POD}:8", f"{POD}:9", "127.0.0.1:1", "127.0.0.1:2", "0.0.0.0:80"]


def test_a_record_has_some_of_them_and_counts_all() -> None:
    found = judge([sock("0.0.0.0:80", state=LISTEN), *(sock(f"{POD}:{port}", f"{OTHER}:1") for port in range(1, 6))])
    said = told(found, 2)
    assert said["connections_total"] == {"lives": 0, "preserved": 0, "readdressed": 0, "closed": 5}
    assert [it["local"] for it in said["connections"]] == [f"{POD}:1", f"{POD}:2"]
    assert said["connections"][0] == {
        "protocol": "tcp",
        "local": f"{POD}:1",
        "remote": f"{OTHER}:1",
        "backend": "",
        "peer": "another",
        "fate": "closed",
        "why": "its other end stays, and knows only the old address",
    }


def test_a_move_that_would_cost_a_connection_is_refused_where_none_may_be_lost() -> None:
    lost = judge([sock(f"{POD}:{port}", f"{OTHER}:5432") for port in range(1, 12)])
    found = refused("train", lost, Connections.REQUIRE)
    assert found is not None
    assert (found.code, "cost train 11 connections" in found.what) == ("PF116", True)
    assert f"tcp {POD}:10 -> {OTHER}:5432: its other end stays" in found.why
    assert found.why.endswith(" and 3 more")
    assert "connections Close" in found.remedy
    assert refused("train", lost, Connections.CLOSE) is None
    datagrams = judge([sock(f"{POD}:1", f"{OTHER}:53", protocol=UDP)])
    assert refused("train", datagrams, Connections.REQUIRE) is not None, "who answers is not heard any more"
    kept = judge([sock(f"{POD}:1", f"{POD}:2"), sock(f"{POD}:2", f"{POD}:1"), sock("0.0.0.0:80", state=LISTEN)])
    assert refused("train", kept, Connections.REQUIRE) is None


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_what_the_kernel_lists_of_a_process(family: socket.AddressFamily, address: str) -> None:
    me = os.getpid()
    with (
        socket.socket(family, socket.SOCK_STREAM) as server,
        socket.socket(family, socket.SOCK_DGRAM) as waits,
        socket.socket(family, socket.SOCK_DGRAM) as says,
    ):
        server.bind((address, 0))
        server.listen()
        waits.bind((address, 0))
        says.connect(waits.getsockname()[:2])
        with socket.create_connection(server.getsockname()[:2]) as client, server.accept()[0]:
            local, remote = (str(End(ipaddress.ip_address(address), it.getsockname()[1])) for it in (client, server))
            mine = {(it.protocol, it.local, it.remote): it for it in open_connections(me, [me])}
            assert mine["tcp", local, remote].peer is PeerKind.INSIDE
            assert mine["tcp", remote, local].peer is PeerKind.INSIDE
            assert mine["tcp", remote, ""].peer is PeerKind.LISTENING
            assert any(it[0] == "udp" and it[2].endswith(f":{waits.getsockname()[1]}") for it in mine)
    assert open_connections(me, []) == ()
