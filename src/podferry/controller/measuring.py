"""Statistics of this cluster's completed moves, from which a drain estimates the next ones. Pure."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterable
from typing import Any

from podferry.controller import eligibility, failures
from podferry.core.estimate import Estimate, MeasuredMove, estimate
from podferry.core.migration import MigrationPhase
from podferry.kube.migration import Migration, MigrationUnreadable
from podferry.kube.objects import QUANTITY
from podferry.kube.quantities import quantity, seconds

Json = dict[str, Any]

NEWEST = 200
"""Moves that an estimate rests on: the newest, since links and jobs change."""


def measured(migrations: Iterable[Json]) -> list[MeasuredMove]:
    """The moves that completed, as far as their status tells."""
    found = []
    for body in migrations:
        with contextlib.suppress(MigrationUnreadable):
            found.append(Migration.from_json(body))
    return measured_moves(found)


def measured_moves(migrations: Iterable[Migration]) -> list[MeasuredMove]:
    """As `measured`."""
    found = []
    done = [one for one in migrations if one.status.phase is MigrationPhase.COMPLETED and one.status.completion_time]
    for one in sorted(done, key=lambda one: str(one.status.completion_time))[-NEWEST:]:
        status = one.status
        with contextlib.suppress(ValueError):
            if status.progress and status.start_time and status.completion_time:
                end = datetime.datetime.fromisoformat(status.completion_time)
                took = failures.age(status.start_time, end)
                found.append(MeasuredMove(status.progress.bytes, took, seconds(status.downtime or "0s")))
    return found


def memory_of(pod: Json) -> int | None:
    """The sum of its containers' requests, or limits; None where a container has neither."""
    total = 0
    for one in eligibility.containers(pod):
        resources = one.get("resources") or {}
        asked = (resources.get("requests") or {}).get("memory") or (resources.get("limits") or {}).get("memory")
        if asked is None or not re.fullmatch(QUANTITY, str(asked)):
            return None
        total += int(quantity(str(asked)))
    return total


def work_of(pod: Json, now: datetime.datetime) -> float:
    """What it has computed, in seconds of a processor: how long it has run, times what it asks for (0.1 where it does not say, as
    the scheduler reckons).
    """
    started = (pod.get("status") or {}).get("startTime")
    if not started:
        return 0.0
    asked = [((one.get("resources") or {}).get("requests") or {}).get("cpu") for one in eligibility.containers(pod)]
    return max(0.0, failures.age(str(started), now)) * sum(_processors(one) for one in asked)


def _processors(asked: object) -> float:
    found = re.fullmatch(r"([0-9.]+)(m?)", str(asked))
    return float(found[1]) * (1e-3 if found[2] else 1.0) if found else 0.1


def expected(pod: Json, earlier: list[MeasuredMove]) -> Estimate | None:
    """How long the pod's move will take; None where nothing tells."""
    return estimate(memory_of(pod), earlier)
