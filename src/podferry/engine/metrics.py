"""What an agent counts, for Prometheus."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, Counter, Histogram, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from podferry.engine.migration_record import MigrationRecord
from podferry.errors import UNEXPLAINED
from podferry.wire.few_at_once import FewAtOnce
from podferry.wire.transport import parse_address

REGISTRY = CollectorRegistry()
AT_ONCE = 8
"""Scrapes that are answered at once; what is beyond them is closed."""
ANSWER_WITHIN = 5.0
"""Seconds."""

_violations = Counter(
    "podferry_invariant_violations_total", "Steps that broke, or would have broken, a rule", ["rule"], registry=REGISTRY
)
_migrations = Counter("podferry_migrations_total", "Ended migrations", ["role", "mode", "outcome"], registry=REGISTRY)
_downtime = Histogram(
    "podferry_downtime_seconds",
    "From the freeze on this node to the first instruction on the target",
    ["mode"],
    buckets=(0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60, 300),
    registry=REGISTRY,
)

_differences = Counter(
    "podferry_differences_total",
    "What jobs that moved here did not have as they had it on the source, and could not be given",
    ["mode"],
    registry=REGISTRY,
)

_unexplained = Counter(
    "podferry_unexplained_criu_errors_total",
    "Migrations that ended by a message of CRIU's that podferry has no remedy for",
    ["role"],
    registry=REGISTRY,
)

for _rule in ("I1", "I2", "I5"):
    _violations.labels(_rule)


def violated(rule: str) -> None:
    """A numbered rule does not hold."""
    _violations.labels(rule).inc()


def ended(role: str, record: MigrationRecord) -> None:
    """One half of a migration has ended; `role` is `source` or `target`."""
    _migrations.labels(role, str(record.mode), str(record.outcome)).inc()
    if record.error is not None and record.error.why.startswith(UNEXPLAINED):
        _unexplained.labels(role).inc()
    if role == "target":
        _differences.labels(str(record.mode)).inc(len(record.extra.get("differences", ())))
    if record.downtime_ms is not None:
        _downtime.labels(str(record.mode)).observe(record.downtime_ms / 1e3)


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


def serve(address: str) -> int:
    """Answer Prometheus at `address` (host:port) from threads of its own; returns the port. Raises `UsageError`, `OSError`."""
    host, port = parse_address(address)
    kind = _Server6 if ":" in host else _Server
    server = make_server(host, port, make_wsgi_app(REGISTRY), kind, handler_class=_Silent)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server.server_port
