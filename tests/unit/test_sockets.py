"""What processes have open of sockets, and to whom they are connected. Other processes hold the other ends."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from podferry.core.connections import end_of
from podferry.core.preflight import SOCKETS
from podferry.node import sockets
from podferry.node.sockets import Peers, has_connections, protocols, to_others, unsaved_sockets

pytestmark = pytest.mark.unit

ME = os.getpid()
OWNER = """
import socket, sys
one = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
print("connected", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """A process that is connected to us, and our end of the connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        argv = [sys.executable, "-c", OWNER, str(server.getsockname()[1])]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            ours, _ = server.accept()
            assert process.stdout is not None
            process.stdout.readline()
            ours.settimeout(10)
            yield process, ours
            ours.close()
            process.kill()


def test_protocols_are_told_as_the_kernel_names_them() -> None:
    with (
        socket.socket(socket.AF_INET),
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM),
        socket.socket(socket.AF_UNIX),
    ):
        assert {"TCP", "UDPv6"} <= protocols([ME])
    assert protocols([2**22 + 1]) == set()


def test_sockets_that_criu_saves_on_this_kernel_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"TCP", "UDPv6", "UNIX"}
    monkeypatch.setattr(sockets, "protocols", lambda _: found)
    monkeypatch.setattr(sockets, "credentials_may_be_asked", lambda: True)
    assert list(unsaved_sockets([ME])) == []
    monkeypatch.setattr(sockets, "credentials_may_be_asked", lambda: False)
    assert list(unsaved_sockets([ME])) == [SOCKETS]
    found = {"UNIX", "MPTCP", "MPTCPv6", "SCTP"}
    assert list(unsaved_sockets([ME])) == ["MPTCP socket", "SCTP socket"]


def test_a_corked_datagram_socket_is_told() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        assert sockets.CORKED not in set(unsaved_sockets([ME]))
        one.setsockopt(socket.IPPROTO_UDP, 1, 1)
        assert sockets.CORKED in set(unsaved_sockets([ME]))


def test_a_connection_to_another_is_told_with_both_ends(other: tuple[subprocess.Popen[str], socket.socket]) -> None:
    process, ours = other
    said = f"127.0.0.1:{ours.getsockname()[1]} -> 127.0.0.1:{ours.getpeername()[1]}"
    assert said in to_others(ME, [ME])
    assert has_connections(ME)
    assert said not in to_others(ME, [ME, process.pid]), "both ends are of the workload"
    assert to_others(ME, []) == ()


def test_both_ends_in_one_process_are_no_connection_to_others() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            assert any(f":{port}" in one for one in to_others(ME, [ME])), "nobody has accepted it"
            accepted, _ = server.accept()
            with accepted:
                assert not any(f":{port}" in one for one in to_others(ME, [ME])), client


def test_what_waits_to_be_accepted_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            assert any(one.endswith(f"-> 127.0.0.1:{port}") for one in sockets.unaccepted(ME, [ME]))
            assert sockets.unaccepted(ME, []) == ()
            accepted, _ = server.accept()
            with accepted:
                assert not any(f":{port}" in one for one in sockets.unaccepted(ME, [ME]))


def test_what_a_closed_end_has_not_sent_yet_is_told_until_it_is_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    with accepted:
        accepted.settimeout(10)
        client.setblocking(False)
        said = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                said += client.send(bytes(1 << 16))
        mine = f"{accepted.getsockname()[0]}:{accepted.getsockname()[1]} -> 127.0.0.1:{client.getsockname()[1]}"
        assert not any(mine in one for one in sockets.unsent(ME, [ME])), "it is open"
        client.close()
        assert any(mine in one for one in sockets.waits_for(0.01, sockets.unsent, ME, [ME]))
        assert not any(mine in one for one in to_others(ME, [ME])), "its other end was ours"
        assert sockets.unsent(ME, []) == ()
        while got := accepted.recv(1 << 20):
            said -= len(got)
        assert said == 0
        assert not any(mine in one for one in sockets.unsent(ME, [ME])), "all is here"


@pytest.mark.parametrize("address", ["\0unaccepted", "unaccepted.sock"])
def test_what_waits_at_a_unix_socket_is_told(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"unix socket {address.replace(chr(0), '@')}"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(address)
        server.listen()
        assert name not in sockets.unaccepted(ME, [ME])
        client.connect(address)
        client.sendall(b"hello")
        assert name in sockets.unaccepted(ME, [ME])
        assert name in sockets.waits_for(0.01, sockets.unaccepted, ME, [ME])
        assert sockets.unaccepted(ME, []) == ()
        with server.accept()[0]:
            assert name not in sockets.unaccepted(ME, [ME])
    assert sockets.waits_for(60.0, sockets.unaccepted, ME, []) == (), "nothing is waited for"


def test_whoever_has_said_all_before_it_is_accepted_waits_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"all of it")
            client.shutdown(socket.SHUT_WR)
            assert any(one.endswith(f"-> 127.0.0.1:{port}") for one in sockets.unaccepted(ME, [ME]))
            with server.accept()[0]:
                assert not any(f":{port}" in one for one in sockets.unaccepted(ME, [ME]))


def test_whoever_the_listener_defers_waits_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 60)
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            assert any(one.endswith(f"-> 127.0.0.1:{port}") for one in sockets.unaccepted(ME, [ME]))


def test_the_other_end_is_reset_when_its_owner_is_gone(other: tuple[subprocess.Popen[str], socket.socket]) -> None:
    process, ours = other
    peers = Peers()
    peers.take(process.pid, [process.pid])
    process.kill()
    process.wait()
    peers.reset()
    with pytest.raises(ConnectionResetError):
        ours.recv(1)


def test_one_that_goes_on_elsewhere_is_left_alone(other: tuple[subprocess.Popen[str], socket.socket]) -> None:
    process, ours = other
    peers = Peers()
    there, here = (end_of(f"{one[0]}:{one[1]}") for one in (ours.getpeername(), ours.getsockname()))
    peers.take(process.pid, [process.pid], {(there, here)})
    process.kill()
    process.wait()
    peers.reset()
    assert ours.recv(1) == b"", "the kernel closes it, as that of any process that ends: nobody resets it"


def test_those_whose_owner_lives_are_let_go(other: tuple[subprocess.Popen[str], socket.socket]) -> None:
    process, ours = other
    peers = Peers()
    peers.take(process.pid, [process.pid])
    peers.close()
    ours.sendall(b"x")
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        ours.recv(1)


def test_addresses() -> None:
    assert str(sockets._end(socket.AF_INET, "0100007F:1BCD")) == "127.0.0.1:7117"
    assert str(sockets._end(socket.AF_INET6, "00000000000000000000000001000000:0050")) == "[::1]:80"
    mapped = "0000000000000000FFFF00000100007F:0050"
    assert str(sockets._end(socket.AF_INET6, mapped)) == "127.0.0.1:80"
    assert sockets._plain(mapped) == "0100007F:0050"
