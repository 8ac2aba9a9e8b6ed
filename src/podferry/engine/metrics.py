"""What an agent counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from podferry.engine.story import Story
from podferry.errors import UNEXPLAINED
from podferry.wire.transport import parse_address

REGISTRY = CollectorRegistry()

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


def ended(role: str, story: Story) -> None:
    """One half of a migration has ended; `role` is `source` or `target`."""
    _migrations.labels(role, str(story.mode), str(story.outcome)).inc()
    if story.error is not None and story.error.why.startswith(UNEXPLAINED):
        _unexplained.labels(role).inc()
    if role == "target":
        _differences.labels(str(story.mode)).inc(len(story.extra.get("differences", ())))
    if story.downtime_ms is not None:
        _downtime.labels(str(story.mode)).observe(story.downtime_ms / 1e3)


def serve(address: str) -> None:
    """Answer Prometheus at `address` (host:port) from a thread of its own. Raises `UsageError`, `OSError`."""
    from prometheus_client import start_http_server

    host, port = parse_address(address)
    start_http_server(port, host, REGISTRY)
