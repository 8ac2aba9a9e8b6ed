"""Answers Prometheus: a few scrapes at once, each for a few seconds, since whoever reaches the port may ask."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from podferry.wire.few_at_once import FewAtOnce
from podferry.wire.transport import parse_address

AT_ONCE = 8
"""Scrapes that are answered at once; what is beyond them is closed."""
ANSWER_WITHIN = 5.0
"""Seconds."""


class _Server(FewAtOnce, ThreadingWSGIServer):
    """Answers each for a few seconds: in a cluster whoever reaches the node reaches this port."""

    at_once = AT_ONCE

    def answer(self, request: Any, client_address: Any) -> None:
        """As long as it may take."""
        # A timeout of the socket would begin anew with each byte that somebody sends or takes.
        limit = threading.Timer(ANSWER_WITHIN, _sever, (request,))
        limit.daemon = True
        limit.start()
        try:
            super().answer(request, client_address)
        finally:
            limit.cancel()


class _Server6(_Server):
    """The same over IPv6."""

    address_family = socket.AF_INET6


class _Silent(WSGIRequestHandler):
    """Writes no log."""

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: each scrape would be a line."""


def _sever(request: socket.socket) -> None:
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


def serve_metrics(address: str, registry: CollectorRegistry) -> int:
    """Answer Prometheus at `address` (host:port) with what `registry` counts, from threads of its own; returns the port.
    Raises `UsageError`, `OSError`."""
    host, port = parse_address(address)
    kind = _Server6 if ":" in host else _Server
    server = make_server(host, port, make_wsgi_app(registry), kind, handler_class=_Silent)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server.server_port
