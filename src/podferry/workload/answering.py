"""Answers the kubelet's liveness probes for a pod that stands still to be moved. A program of its own: it outlives an agent.

A frozen pod still has its listening sockets, and the kernel goes on accepting connections for them. This takes a second descriptor
of each socket that a probe asks at (pidfd_getfd(2) needs nothing of the process that has it) and answers what has come: an HTTP
request for a probe's path gets 200, any other 503; a gRPC health check SERVING; a TCP connection is taken and closed. So the
kubelet has no reason to restart what cannot answer by itself, wherever the pod goes on in the end.

It does so only while every container of the pod is frozen, and begins when they have been for a while: a short stop needs nobody,
and a client's connection that waits through it is still there when the job goes on. It ends when the pod's processes have.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import unquote

from podferry.fs.libc import second_descriptor
from podferry.node.cgroup import Cgroup, CgroupFailed, Frozen
from podferry.workload.pod.probes import Probe

AFTER = 0.4
"""Seconds of standing still after which it answers: the shortest timeout of a probe is one second."""
POLL_INTERVAL = 0.1
PATIENCE = 5.0
"""Seconds for a client to say what it wants."""
MOST_AT_ONCE = 64
LONGEST_REQUEST = 1 << 14
TLS_HANDSHAKE, HTTP2 = b"\x16", b"PRI * HTTP/2.0"
LISTENING = "0A"
HEALTH = "/grpc.health.v1.Health/Check"
SERVING = b"\x08\x01"
"""grpc.health.v1.HealthCheckResponse with status SERVING, encoded."""


class Listeners:
    """Second descriptors of the sockets that processes listen with, by port."""

    def __init__(self, pids: Iterable[int], ports: frozenset[int]) -> None:
        self.sockets: dict[int, tuple[socket.socket, int]] = {}
        wanted: dict[int, int] = {}
        for pid in pids:
            if not wanted:  # they share a network namespace
                wanted = {inode: port for inode, port in _listening(pid) if port in ports}
            self._take(pid, wanted)

    def _take(self, pid: int, wanted: dict[int, int]) -> None:
        with suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                for link in Path(f"/proc/{pid}/fd").iterdir():
                    with suppress(OSError):
                        inode = _inode(link)
                        if inode is not None and inode in wanted:
                            self._add(second_descriptor(pidfd, int(link.name)), wanted.pop(inode))
            finally:
                os.close(pidfd)

    def _add(self, descriptor: int, port: int) -> None:
        # The open file is shared with its owner: nothing of it may be changed, not even that it blocks.
        self.sockets[descriptor] = socket.socket(fileno=descriptor), port

    def close(self) -> None:
        """Let go of them; their owner still has them."""
        for one, _ in self.sockets.values():
            one.close()
        self.sockets.clear()


def _listening(pid: int) -> Iterable[tuple[int, int]]:
    """(inode, port) of every listening TCP socket in the network namespace of a process."""
    for family in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{family}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING:
                    yield int(fields[9]), int(fields[1].rpartition(":")[2], 16)


def _inode(link: Path) -> int | None:
    kind, _, rest = str(link.readlink()).partition(":[")
    return int(rest.rstrip("]")) if kind == "socket" else None


class Answers:
    """What a client hears that connects to a pod that stands still."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._paths = {(one.port, unquote(one.path.partition("?")[0])) for one in probes if one.path}
        self._tls: ssl.SSLContext | None = None
        self._grpc: str | None = None
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MOST_AT_ONCE)

    def to(self, client: socket.socket, port: int) -> None:
        """Answer a client in a thread of its own; too many at once are hung up on."""
        if not self._slots.acquire(blocking=False):
            client.close()
            return
        threading.Thread(target=self._answer, args=(client, port), daemon=True).start()

    def _answer(self, client: socket.socket, port: int) -> None:
        try:
            with client, suppress(OSError, ValueError):
                client.settimeout(PATIENCE)
                first = client.recv(len(HTTP2), socket.MSG_PEEK)
                if first[:1] == TLS_HANDSHAKE:
                    with self._with_tls().wrap_socket(client, server_side=True) as secured:
                        self._answer_http(secured, port)
                elif first.startswith(HTTP2[:4]):
                    self._hand_to_grpc(client)
                elif first:
                    self._answer_http(client, port)
        finally:
            self._slots.release()

    def _answer_http(self, client: socket.socket, port: int) -> None:
        request = b""
        while b"\r\n\r\n" not in request and len(request) < LONGEST_REQUEST:
            if not (more := client.recv(4096)):
                return
            request += more
        target = request.split(b"\r\n", 1)[0].decode("latin-1").split(" ")[1:2]
        asked = bool(target) and (port, unquote(target[0].partition("?")[0])) in self._paths
        status, said = ("200 OK", b"ok\n") if asked else ("503 Service Unavailable", b"being moved\n")
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(said)}\r\nConnection: close\r\n\r\n"
        )
        client.sendall(head.encode() + said)

    def _with_tls(self) -> ssl.SSLContext:
        """A certificate of nobody: the kubelet does not look at it."""
        with self._lock:
            if self._tls is None:
                self._tls = _self_signed()
            return self._tls

    def _hand_to_grpc(self, client: socket.socket) -> None:
        """grpcio takes no connection that is open already: one to its own socket is joined to this one."""
        with self._lock:
            if self._grpc is None:
                self._grpc = _health_server()
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(self._grpc)
            _join(client, server)


def _join(one: socket.socket, other: socket.socket) -> None:
    """Pass on what either says until one ends or nothing comes for a while."""
    there = {one.fileno(): (one, other), other.fileno(): (other, one)}
    waiting = select.poll()
    for descriptor in there:
        waiting.register(descriptor, select.POLLIN)
    while ready := waiting.poll(PATIENCE * 1000):
        for descriptor, _ in ready:
            speaker, listener = there[descriptor]
            if not (data := speaker.recv(1 << 14)):
                return
            listener.sendall(data)


def _self_signed() -> ssl.SSLContext:
    from podferry.wire.pki import Authority

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(Authority.new("probe").to_pem()))
        file.flush()
        context.load_cert_chain(file.name)
    return context


def _health_server() -> str:
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    class Health(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
            return (
                grpc.unary_unary_rpc_method_handler(lambda request, context: SERVING)
                if details.method == HEALTH
                else None
            )

    name = f"podferry-answering-{secrets.token_hex(16)}"  # in the abstract namespace: no file of it stays in /tmp
    server = grpc.server(ThreadPoolExecutor(4), handlers=[Health()])
    server.add_insecure_port(f"unix-abstract:{name}")
    server.start()
    _kept.append(server)
    return f"\0{name}"


_kept: list[object] = []


def frozen(cgroups: Sequence[Cgroup]) -> bool:
    """Whether everything in all of them stands still."""
    return all(one.state() is Frozen.FROZEN for one in cgroups)


def stand_in(cgroups: Sequence[Cgroup], probes: Sequence[Probe], clock: Callable[[], float] = time.monotonic) -> None:
    """Answer whenever the pod stands still, until its processes have ended."""
    answers, ports = Answers(probes), frozenset(one.port for one in probes)
    with ExitStack() as stack:
        listeners: Listeners | None = None
        since = 0.0
        while True:
            try:
                stands, pids = frozen(cgroups), [pid for one in cgroups for pid in one.pids()]
            except (CgroupFailed, OSError):
                return
            if not pids:
                return
            if not stands:
                since = 0.0
                if listeners is not None:
                    listeners.close()
                    listeners = None
                time.sleep(POLL_INTERVAL)
                continue
            since = since or clock()
            if clock() - since < AFTER:
                time.sleep(POLL_INTERVAL)
                continue
            if listeners is None:
                listeners = Listeners(pids, ports)
                stack.callback(listeners.close)
            _take_what_waits(listeners, answers, cgroups)


def _take_what_waits(listeners: Listeners, answers: Answers, cgroups: Sequence[Cgroup]) -> None:
    waits = select.poll()
    for descriptor in listeners.sockets:
        waits.register(descriptor, select.POLLIN)
    for descriptor, _ in waits.poll(POLL_INTERVAL * 1e3):
        if not frozen(cgroups):  # the job takes it itself
            return
        listener, port = listeners.sockets[descriptor]
        with suppress(OSError):
            answers.to(listener.accept()[0], port)


def main() -> None:
    """`python -m podferry.workload.answering JSON`: the cgroups of a pod's containers, and its probes."""
    what = json.loads(sys.argv[1])
    probes = [Probe(int(one["port"]), str(one["path"])) for one in what["probes"]]
    stand_in([Cgroup.from_dict(one) for one in what["cgroups"]], probes)


if __name__ == "__main__":
    main()
