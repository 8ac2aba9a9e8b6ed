"""A server that answers a few connections at once: one beyond them is closed, and a place that was given back is given again."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from socketserver import BaseRequestHandler, TCPServer

import pytest

from podferry.wire.few_at_once import FewAtOnce

pytestmark = pytest.mark.unit
PATIENCE = 120.0
begun, over = threading.Semaphore(0), threading.Event()


class Handler(BaseRequestHandler):
    """Says that it has begun, and ends when the test says so."""

    def handle(self) -> None:
        begun.release()
        over.wait(PATIENCE)
        self.request.sendall(b"done")


class Server(FewAtOnce, TCPServer):
    daemon_threads, at_once = True, 1


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    over.clear()
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield ("127.0.0.1", server.server_address[1])
        over.set()
        server.shutdown()
        thread.join()


def test_a_connection_beyond_the_places_is_closed_and_a_later_one_is_answered(address: tuple[str, int]) -> None:
    with socket.create_connection(address, PATIENCE) as first:
        assert begun.acquire(timeout=PATIENCE)
        with socket.create_connection(address, PATIENCE) as second:
            assert second.recv(4) == b"", "nobody answers it, and it is closed"
        over.set()
        assert first.recv(4) == b"done"
        assert first.recv(4) == b"", "this one has been answered, and its place is free or will be"
    until, answered = time.monotonic() + PATIENCE, False
    while not answered and time.monotonic() < until:  # the place is given back a moment after the answer
        with socket.create_connection(address, PATIENCE) as third:
            answered = third.recv(4) == b"done"
        time.sleep(0.01)
    assert answered
    assert begun.acquire(timeout=PATIENCE)
