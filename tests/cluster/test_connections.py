"""Connections of a pod that moves: those within it live on, those to others are closed, and everybody notices at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from podferry.lab import Lab
from podferry.model import Connections

from .moving_pods import A, B, Json, Movers, also, pod, until

pytestmark = pytest.mark.cluster

COMMON = """
import itertools, os, socket, threading, time
own = os.environ['POD_IP']
def all_of(one, size):
    got = b''
    while len(got) < size:
        piece = one.recv(size - len(got))
        if not piece: raise EOFError('closed')
        got += piece
    return got
def say(*words):  # one write: what two threads print would stand in one line
    os.write(1, ' '.join(map(str, words)).encode() + b'\\n')
def bad(*why):
    say('BAD', *why)
    os._exit(7)
"""
ASKS = (
    COMMON
    + """
def pair(server):
    one, _ = server.accept()
    for n in itertools.count():
        said = n.to_bytes(8, 'big') * 512
        one.sendall(said)
        try: heard = all_of(one, len(said))
        except (OSError, EOFError) as error: bad(server.getsockname(), repr(error))
        if heard != said: bad(server.getsockname(), n, heard[:8])
        counts[server.fileno()] = n
        time.sleep(0.002)
def outside():
    with socket.create_connection((os.environ['PEER'], 8000)) as one:
        one.sendall(b'hello')
        say('outside', one.recv(16).decode())
        say('outside', one.recv(16) or 'closed')
counts = {}
servers = [socket.create_server(('127.0.0.1', 9001)), socket.create_server((own, 9002))]
at_own = socket.create_server((own, 9003))
def serve():
    while True:
        one, _ = at_own.accept()
        one.sendall(b'here'); one.close()
for one in servers: threading.Thread(target=pair, args=(one,), daemon=True).start()
threading.Thread(target=serve, daemon=True).start()
threading.Thread(target=outside, daemon=True).start()
while True:
    time.sleep(0.1)
    if len(counts) == 2: say('count', *counts.values())
"""
)
ANSWERS = (
    COMMON
    + """
def echo(address, port):
    while True:
        try: one = socket.create_connection((address, port), 5)
        except OSError: time.sleep(0.1)
        else: break
    one.settimeout(None)
    try:
        while True: one.sendall(all_of(one, 4096))
    except (OSError, EOFError) as error: bad(port, repr(error))
threading.Thread(target=echo, args=('127.0.0.1', 9001), daemon=True).start()
threading.Thread(target=echo, args=(own, 9002), daemon=True).start()
time.sleep(1e6)
"""
)
PEER = """
import socket
server = socket.create_server(('', 8000))
while True:
    one, _ = server.accept()
    print('told', one.recv(16).decode(), flush=True)
    one.sendall(b'welcome')
    try: print('told', one.recv(16) or 'end', flush=True)
    except OSError as error: print('told', type(error).__name__, flush=True)
"""
POD_IP = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}


@pytest.fixture(scope="module")
def movers(bare: Lab) -> Iterator[Movers]:
    movers = Movers(bare)
    yield movers
    movers.kubectl.run("delete", "pod", "--all", "--wait", "--grace-period=1")
    movers.stop()


def counted(movers: Movers, name: str) -> tuple[int, ...]:
    lines = movers.logs(name)
    assert not [line for line in lines if "BAD" in line], lines[-3:]
    counts = [line.split()[1:] for line in lines if line.startswith("count")]
    return tuple(map(int, counts[-1])) if counts else (0, 0)


def counts_on(movers: Movers, name: str) -> None:
    before = counted(movers, name)
    until(
        lambda: all(now > then + 20 for now, then in zip(counted(movers, name), before, strict=True)), f"{name} talks"
    )


def talking(peer: str) -> Json:
    env = [POD_IP, {"name": "PEER", "value": peer}]
    made = pod("talks", ASKS)
    made["spec"]["containers"][0]["env"] = env
    made["spec"]["containers"].append(also(ANSWERS, env=env))
    return made


@pytest.mark.parametrize("mode", ["live", "postcopy"])
def test_what_is_said_within_a_pod_is_heard_and_the_outside_notices_at_once(movers: Movers, mode: str) -> None:
    peer = movers.create(pod(f"peer-{mode}", PEER))
    here = movers.create(talking(peer["status"]["podIP"]))
    until(lambda: "outside welcome" in movers.logs("talks"), "it is connected to the outside")
    counts_on(movers, "talks")
    refused = movers.ended(A, movers.order(here, B, mode, connections=str(Connections.REQUIRE)))
    assert (refused["outcome"], refused["error"]["code"]) == ("refused", "PF116"), refused
    assert f"-> {peer['status']['podIP']}:8000" in refused["error"]["why"]
    closed: list[list[str]] = []
    foretold: list[set[tuple[str, str]]] = []
    for _ in range(2):
        here, record = movers.move(here, mode)
        name = here["metadata"]["name"]
        counts_on(movers, name)
        until(
            lambda name=name: any(one.startswith("outside closed") for one in movers.logs(name)), f"{name} sees the end"
        )
        until(lambda: len(movers.logs(f"peer-{mode}")) == 2, "the peer sees its connection closed")
        closed.append(record.get("closed_connections", []))
        foretold.append({(one["peer"], one["fate"]) for one in record["connections"] if one["remote"]})
        ask = f"import socket; print(socket.create_connection(('{here['status']['podIP']}', 9003), 5).recv(9))"
        assert "b'here'" in movers.kubectl.run("exec", f"peer-{mode}", "--", "python3", "-c", ask).stdout
        assert all(one["restartCount"] == 0 for one in movers.get(name)["status"]["containerStatuses"])
    assert [len(one) for one in closed] == [1, 0]
    assert foretold == [{("inside", "lives"), ("another", "closed")}, {("inside", "lives")}], "as the check says it"
    assert closed[0][0].endswith(f"-> {peer['status']['podIP']}:8000")
    movers.delete(here["metadata"]["name"], f"peer-{mode}")


ACCEPTS_SLOWLY = (
    COMMON
    + """
server = socket.create_server(('127.0.0.1', 9010))
while True:
    time.sleep(0.03)
    one, _ = server.accept()
    with one: one.sendall(all_of(one, 8))
"""
)
CONNECTS_ALL_THE_TIME = (
    COMMON
    + """
def connected():
    while True:
        try: return socket.create_connection(('127.0.0.1', 9010))
        except ConnectionRefusedError:
            if n: bad('refused')
            time.sleep(0.1)
for n in itertools.count():
    with connected() as one:
        try:
            one.sendall(n.to_bytes(8, 'big'))
            if (heard := all_of(one, 8)) != n.to_bytes(8, 'big'): bad(n, heard)
        except (OSError, EOFError) as error: bad(n, repr(error))
    say('count', n, n)
    time.sleep(0.01)
"""
)


@pytest.mark.parametrize("mode", ["live", "stop"])
def test_a_connection_from_one_container_to_another_that_waits_to_be_accepted(movers: Movers, mode: str) -> None:
    """Three times out of four one waits: both containers go on until it is accepted, then both stand still."""
    made = pod(f"short-{mode}", CONNECTS_ALL_THE_TIME)
    made["spec"]["containers"][0]["env"] = [POD_IP]
    made["spec"]["containers"].append(also(ACCEPTS_SLOWLY, env=[POD_IP]))
    here = movers.create(made)
    name = here["metadata"]["name"]
    counts_on(movers, name)
    for _ in range(2):
        here, _ = movers.move(here, mode)
        name = here["metadata"]["name"]
        counts_on(movers, name)
    movers.delete(name)
