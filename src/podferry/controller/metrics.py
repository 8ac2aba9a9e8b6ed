"""The controller's Prometheus metrics."""

from __future__ import annotations

import datetime
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from podferry.controller import failures
from podferry.controller.movability import Movability, OptedIn
from podferry.controller.turns import Turns
from podferry.kube.migration import Migration
from podferry.kube.quantities import seconds

DOWNTIMES = (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 120)
DURATIONS = (1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)


class ControllerMetrics:
    """The controller's metrics, in a registry of their own. One that does not lead counts nothing but evictions."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.leading = Gauge("podferry_controller_leading", "Whether this controller leads", registry=self.registry)
        self._ended = Counter(
            "podferry_migrations_ended_total",
            "Migrations that have ended, by phase and reason",
            ["phase", "reason"],
            registry=self.registry,
        )
        self._downtime = Histogram(
            "podferry_migration_downtime_seconds",
            "From the freeze to the resume, of Migrations that completed",
            buckets=DOWNTIMES,
            registry=self.registry,
        )
        self._duration = Histogram(
            "podferry_migration_duration_seconds",
            "From its turn to its end, of Migrations that completed",
            buckets=DURATIONS,
            registry=self.registry,
        )
        self._evictions = Counter(
            "podferry_evictions_total", "Evictions asked about, by the answer", ["answer"], registry=self.registry
        )
        self._waiting = Gauge(
            "podferry_migrations_waiting", "Migrations that wait for their turn", registry=self.registry
        )
        self._under_way = Gauge("podferry_migrations_under_way", "Migrations that have begun", registry=self.registry)

        self._opted_in = Gauge(
            "podferry_pods_opted_in",
            "Pods that opted in, as they were last looked at: movable, held, or missed (without the RuntimeClass)",
            ["state"],
            registry=self.registry,
        )

    def look(self, movability: Movability) -> None:
        """Count the pods that it has looked at."""
        for state in OptedIn:
            self._opted_in.labels(state).set_function(partial(movability.counted_as, state))

    def watch(self, turns: Turns) -> None:
        """Count what waits and what is under way there."""
        self._waiting.set_function(lambda: turns.waiting)
        self._under_way.set_function(lambda: turns.under_way)

    def ended(self, migration: Migration) -> None:
        """A Migration has just ended, by this controller's write."""
        status = migration.status
        reason = status.ending.reason if status.ending is not None else ""
        self._ended.labels(str(status.phase), reason).inc()
        if status.phase != "Completed":
            return
        if status.downtime:
            self._downtime.observe(seconds(status.downtime))
        if status.start_time and status.completion_time:
            over = datetime.datetime.fromisoformat(status.completion_time)
            self._duration.observe(failures.age(status.start_time, over))

    def evicted(self, *, allowed: bool) -> None:
        """An eviction was answered."""
        self._evictions.labels("evicted" if allowed else "moves").inc()
