"""An agent's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from podferry.engine.migration_record import MigrationRecord
from podferry.errors import UNEXPLAINED
from podferry.model import Outcome

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

_refusals = Counter(
    "podferry_refusals_total",
    "Migrations refused before anything was touched, by the error's code",
    ["code"],
    registry=REGISTRY,
)
_bytes = Counter(
    "podferry_bytes_total",
    "Of migrations away from this node that have ended: what the wire carried, and the job's memory and changed files",
    ["kind"],
    registry=REGISTRY,
)
_phases = Histogram(
    "podferry_phase_seconds",
    "How long a migration was in each phase, of those that have ended",
    ["role", "phase"],
    buckets=(0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800),
    registry=REGISTRY,
)
_certificate = Gauge(
    "podferry_certificate_not_after_seconds",
    "When this node's certificate ends, in seconds since 1970",
    registry=REGISTRY,
)

for _kind in ("wire", "memory", "files"):
    _bytes.labels(_kind)
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
    for phase, milliseconds in record.phases.items():
        if phase:
            _phases.labels(role, phase).observe(milliseconds / 1e3)
    if role == "source":
        if record.outcome is Outcome.REFUSED and record.error is not None:
            _refusals.labels(record.error.code).inc()
        for kind, count in (
            ("wire", record.wire_bytes),
            ("memory", record.memory_bytes),
            ("files", record.upper_bytes),
        ):
            _bytes.labels(kind).inc(count)
    if role == "target":
        _differences.labels(str(record.mode)).inc(len(record.extra.get("differences", ())))
    if record.downtime_ms is not None:
        _downtime.labels(str(record.mode)).observe(record.downtime_ms / 1e3)


def watch_certificate(not_after: Callable[[], float]) -> None:
    """Show what this returns, in seconds since 1970, whenever somebody asks; NaN where it is not known."""
    _certificate.set_function(not_after)
