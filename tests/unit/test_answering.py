"""What answers liveness probes while a pod stands still: with a real process that has been stopped, and real clients."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from podferry.kube.moved import moved_containers
from podferry.node.cgroup import Frozen
from podferry.node.process import spawn
from podferry.workload import answering
from podferry.workload.pod.probes import Probe, network_probes

pytestmark = pytest.mark.unit

PATIENCE = 20.0
# It answers "by the job", from sockets that do not block, as asyncio's do not; two of them share a port.
JOB = """
import select, socket, sys
def listener(port=0):
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind(("127.0.0.1", port))
    one.listen(3)
    one.setblocking(False)
    return one
first = listener()
second, other = listener(first.getsockname()[1]), listener()
print(first.getsockname()[1], other.getsockname()[1], flush=True)
while True:
    for ready in select.select([first, second, other], [], [])[0]:
        try:
            client = ready.accept()[0]
        except BlockingIOError:
            continue
        client.setblocking(True)
        if client.recv(1000):
            client.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 10\\r\\nConnection: close\\r\\n\\r\\nby the job")
        client.close()
"""


class Pod:
    """A process that listens, and its cgroup, as far as it is looked at."""

    def __init__(self) -> None:
        self.process = spawn([sys.executable, "-uc", JOB], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.port, self.other = map(int, self.process.stdout.readline().split())
        self._state = Frozen.THAWED
        self.here = True

    def state(self) -> Frozen:
        return self._state

    def pids(self) -> tuple[int, ...]:
        return (self.process.pid,) if self.here else ()

    def freeze(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)
        self._state = Frozen.FROZEN

    def thaw(self) -> None:
        self._state = Frozen.THAWED
        os.kill(self.process.pid, signal.SIGCONT)


@pytest.fixture
def pod() -> Iterator[Pod]:
    pod = Pod()
    probes = [Probe(pod.port, "/healthz?full=1"), Probe(pod.port, "/a%20b")]
    thread = threading.Thread(target=answering.stand_in, args=([pod], probes))
    thread.start()
    try:
        yield pod
    finally:
        pod.here = False
        pod.process.kill()
        pod.process.communicate()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "it outlives the pod"


def get(port: int, path: str, *, tls: bool = False) -> tuple[int, bytes]:
    client: http.client.HTTPConnection
    if tls:
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        client = http.client.HTTPSConnection("127.0.0.1", port, timeout=PATIENCE, context=trusting)
    else:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    client.request("GET", path, headers={"User-Agent": "kube-probe/1.36"})
    answer = client.getresponse()
    return answer.status, answer.read()


def test_a_probe_is_answered_while_the_pod_stands_still_and_by_the_job_before_and_after(pod: Pod) -> None:
    assert get(pod.port, "/healthz") == (200, b"by the job")
    pod.freeze()
    for _ in range(12):  # both of the sockets that share the port get some
        assert get(pod.port, "/healthz?full=1") == (200, b"ok\n")
    assert get(pod.port, "/a%20b") == (200, b"ok\n")
    pod.thaw()
    assert get(pod.port, "/healthz") == (200, b"by the job")


def test_second_descriptors_are_closed_once_and_the_job_keeps_its_own(pod: Pod) -> None:
    listeners = answering.Listeners([pod.process.pid], frozenset({pod.port}))
    sockets = [one for one, _ in listeners.sockets.values()]
    assert {port for _, port in listeners.sockets.values()} == {pod.port}
    listeners.close()
    listeners.close()
    assert not listeners.sockets, "a later select would wait on closed descriptors"
    assert {one.fileno() for one in sockets} == {-1}
    assert get(pod.port, "/healthz") == (200, b"by the job")


def test_what_is_no_probe_is_sent_away(pod: Pod) -> None:
    pod.freeze()
    assert get(pod.port, "/orders")[0] == 503


def test_a_probe_over_tls(pod: Pod) -> None:
    pod.freeze()
    assert get(pod.port, "/healthz", tls=True) == (200, b"ok\n")


def test_a_health_check_over_grpc(pod: Pod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pod.freeze()
    with grpc.insecure_channel(f"127.0.0.1:{pod.port}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"", timeout=PATIENCE) == b"\x08\x01"
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/shop.Orders/Buy")(b"", timeout=PATIENCE)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert not list(tmp_path.iterdir()), "a process that is killed while it answers removes no files"


def test_connections_are_taken_however_many_come(pod: Pod) -> None:
    """A tcp probe is content with the connection; the kernel takes only as many as the job has asked to have waiting."""
    pod.freeze()
    for _ in range(50):
        socket.create_connection(("127.0.0.1", pod.port), timeout=PATIENCE).close()


def test_a_port_that_no_probe_asks_at_is_left_alone(pod: Pod) -> None:
    pod.freeze()
    with socket.create_connection(("127.0.0.1", pod.other), timeout=PATIENCE) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert get(pod.port, "/healthz") == (200, b"ok\n"), "the stand-in is at work"
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        client.settimeout(PATIENCE)
        pod.thaw()
        assert client.recv(100).endswith(b"by the job")


def container(**probe: object) -> dict[str, object]:
    ports = [{"name": "web", "containerPort": 8080}, {"name": "1234", "containerPort": 99}]
    return {"name": "main", "ports": ports, "livenessProbe": probe}


@pytest.mark.parametrize(
    ("probe", "found"),
    [
        ({"httpGet": {"port": "web", "path": "live"}}, (Probe(8080, "/live"),)),
        ({"httpGet": {"port": 80}}, (Probe(80, "/"),)),
        ({"tcpSocket": {"port": "81"}}, (Probe(81),)),
        ({"tcpSocket": {"port": "1234"}}, (Probe(99),)),
        ({"grpc": {"port": 82, "service": "x"}}, (Probe(82),)),
        ({"exec": {"command": ["true"]}}, ()),
        ({"httpGet": {"port": "nameless"}}, ()),
        ({}, ()),
    ],
)
def test_the_probes_of_a_pod(probe: dict[str, object], found: tuple[Probe, ...]) -> None:
    assert network_probes(moved_containers({"spec": {"containers": [container(**probe)]}})) == found
    sidecar = {**container(**probe), "restartPolicy": "Always"}
    spec = {"initContainers": [sidecar, container(tcpSocket={"port": 1})], "containers": [{"name": "main"}]}
    assert network_probes(moved_containers({"spec": spec})) == found
