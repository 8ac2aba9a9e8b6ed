"""What arrives over loopback while it is held still, and what does not, in a network namespace of the test's own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from podferry.node.netlock import CRIU_MARK, Namespace
from podferry.node.netns import in_new_network

pytestmark = pytest.mark.node


class Pair:
    """Two sockets in a new network namespace, of which one sends to the other."""

    def __init__(self) -> None:
        self._network = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self.namespace = Namespace.of({"linux": {"namespaces": [{"type": "network", "path": self.path}]}}, 0)
        self._to = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._to.bind(("127.0.0.1", 0))
        self._to.settimeout(10)
        self._sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sender.connect(self._to.getsockname())

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._network}"

    def send(self, said: bytes, mark: int = 0) -> None:
        self._sender.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        self._sender.send(said)

    def heard(self) -> bytes:
        return self._to.recv(100)

    def close(self) -> None:
        self._to.close()
        self._sender.close()
        os.close(self._network)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = in_new_network(Pair)
    yield pair
    pair.close()


def test_nothing_passes_but_what_criu_sends_itself(pair: Pair) -> None:
    """As it does to a restored connection whose other end is gone, and had said that it has said all."""
    pair.send(b"before")
    pair.namespace.lock()
    pair.send(b"of the job")
    pair.send(b"of a job that marks", mark=1)
    pair.send(b"of CRIU", mark=CRIU_MARK)
    pair.namespace.unlock()
    pair.send(b"after")
    assert [pair.heard() for _ in range(3)] == [b"before", b"of CRIU", b"after"]


def test_it_is_unlocked_twice_without_harm(pair: Pair) -> None:
    pair.namespace.lock()
    for _ in range(2):
        pair.namespace.unlock()
    pair.send(b"after")
    assert pair.heard() == b"after"
