"""One half of a migration, told to the cluster: progress a few times a second at most, what matters at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import structlog

from podferry.core.phases import SOURCE_ENDS, SourcePhase, TargetPhase
from podferry.errors import PodferryError
from podferry.kube import status as store
from podferry.kube.api_errors import ObjectNotFound
from podferry.kube.client import Api
from podferry.kube.connection_status import MOST_CONNECTIONS, ListedConnection
from podferry.kube.events import Events
from podferry.kube.migration import (
    INTACT,
    LONGEST_LINE,
    MOST_LINES,
    RESUMED,
    TARGET_READY,
    Ending,
    EnginePhases,
    Migration,
    MigrationProgress,
)
from podferry.kube.quantities import duration
from podferry.model import Outcome
from podferry.workload.pod.cluster_port import PodMigration

Json = dict[str, Any]

INTERVAL = 0.4
"""Seconds between two reports of progress."""
RETRY = 1.0

RUNS_THERE = frozenset({TargetPhase.FILL, TargetPhase.DONE})
WAITS_THERE = frozenset({TargetPhase.PREPARED, TargetPhase.READY})


class Reporter:
    """Tells about `half` until its end. `migration` is the newest that is known of its object, or None where it is gone."""

    def __init__(self, api: Api, events: Events, migration: Callable[[], Migration | None], half: PodMigration) -> None:
        self._api, self._events, self._migration, self._half = api, events, migration, half
        self._log = structlog.get_logger()
        self._event: Json = {}
        self._news = anyio.Event()

    async def run(self, done: Callable[[], object]) -> None:
        """Returns once the end has been told, or there is nobody left to tell."""
        stop = self._half.listen(self._on_event)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._report_progress)
                await self._half.wait()
                tasks.cancel_scope.cancel()
            await self._write(self._at_the_end)
            await self._tell_of_connections()
        finally:
            stop()
            done()

    def _on_event(self, event: Json) -> None:
        self._event = event
        self._news.set()

    async def _report_progress(self) -> None:
        seen = self._migration()
        warned = self._half.role != "source" or (seen is not None and bool(seen.status.warnings))
        while True:
            self._news = anyio.Event()
            await self._write(self._now)
            if not warned and (found := lines_of(self._half.record(), "warnings")):
                warned = True
                await self._say("MigrationWarning", "; ".join(found))
            with anyio.move_on_after(RETRY):
                await self._news.wait()
            await anyio.sleep(0 if self._is_urgent() else INTERVAL)

    def _is_urgent(self) -> bool:
        """A phase that somebody waits for has begun."""
        seen = self._migration()
        engine = seen.status.engine if seen is not None else None
        reported = getattr(engine, self._half.role, "") if engine is not None else ""
        return bool(self._half.record()["phase"] != reported)

    async def _write(self, change: store.Change) -> None:
        """Write it down, however long the API server is away."""
        while (migration := self._migration()) is not None and not migration.ended:
            try:
                await store.change(self._api, migration.model_copy(deep=True), change)
                return
            except ObjectNotFound:
                return
            except PodferryError as error:
                self._log.warning("the cluster cannot be told", migration=migration.name, error=str(error))
                await anyio.sleep(RETRY)

    async def _tell_of_connections(self) -> None:
        if self._half.role == "source" and (closed := closed_by(self._half.record())):
            await self._say("ConnectionsClosed", f"closed by the move: {', '.join(closed)}")

    async def _say(self, reason: str, message: str) -> None:
        if (migration := self._migration()) is not None:
            await self._events.publish(migration.to_json(), reason, message, warning=True)

    def _now(self, migration: Migration) -> bool:
        record, status = self._half.record(), migration.status
        if migration.ended:
            return False
        status.engine = status.engine or EnginePhases()
        setattr(status.engine, self._half.role, record["phase"])
        if self._half.role == "target":
            waits = record["phase"] in WAITS_THERE and not status.keeps_name  # such a pod is made later
            if waits or record["phase"] in RUNS_THERE:
                status.set_condition(TARGET_READY, True, "Waiting", "the target pod has all but the job's state")
            if record["phase"] in RUNS_THERE:
                set_resumed(migration)
            return True
        status.progress = progress_of(self._event, record)
        status.warnings = lines_of(record, "warnings")
        status.connections = connections_of(record)
        status.closed_connections = closed_by(record)
        if record["downtime_ms"]:
            status.downtime = duration(record["downtime_ms"] / 1e3)
        if forecast := (record.get("rehearsal") or {}).get("forecast_ms"):
            status.forecast = duration(forecast / 1e3)
        return True

    def _at_the_end(self, migration: Migration) -> bool:
        changed = self._now(migration)
        if self._half.role == "source" and changed:
            record = self._half.record()
            migration.status.engine_ending = ending_of(record)
            set_intact(migration, record.get("differences"))
        return changed


def connections_of(record: Json) -> list[ListedConnection]:
    """The connections that the pod had at the check, within what a status may hold."""
    found = [one for one in record.get("connections") or () if one["remote"]]
    return [ListedConnection.model_validate(one) for one in found[:MOST_CONNECTIONS]]


def closed_by(record: Json) -> list[str]:
    """The connections that a move has closed: none as long as the job does not run on the target."""
    return lines_of(record, "closed_connections") if record["downtime_ms"] else []


def set_intact(migration: Migration, differences: list[str] | None) -> None:
    """Whether the job has all that it had. None: nobody knows."""
    if differences is not None:
        what = "; ".join(differences) or "the job has what it had"
        migration.status.set_condition(INTACT, not differences, "Differs" if differences else "Compared", what[:32768])


def set_resumed(migration: Migration, *, committing: bool = False) -> bool:
    """The job runs on the target. `committing`: the source is not needed any more either."""
    if not migration.status.holds(RESUMED):
        migration.status.set_condition(RESUMED, True, "Running", "the job runs on the target")
    if committing:
        migration.status.engine = migration.status.engine or EnginePhases()
        migration.status.engine.source = str(SourcePhase.COMMIT)
    return True


def lines_of(record: Json, name: str) -> list[str]:
    """A list of text of a record, within what a status may hold."""
    return [one[:LONGEST_LINE] for one in (record.get(name) or ())][:MOST_LINES]


def progress_of(event: Json, record: Json) -> MigrationProgress:
    """The source's progress, from its last event and its record."""
    sent, total = int(record["wire_bytes"]), int(event.get("total_bytes") or 0)
    left = event.get("eta_s")
    phase = record["phase"]
    summary = phase if phase not in SOURCE_ENDS else ""
    if phase == SourcePhase.PRECOPY and total:
        summary = f"{phase} {min(99, 100 * sent // total)}%"
    return MigrationProgress(
        summary=summary,
        rounds=int(record["rounds"]),
        bytes=sent,
        total_bytes=max(total, sent),
        bytes_per_second=event.get("rate"),
        remaining=duration(left) if left is not None else None,
    )


def ending_of(record: Json) -> Ending:
    """The engine's outcome, from its record."""
    error = PodferryError.from_dict(record["error"]) if record["error"] else None
    evidence = f" ({'; '.join(error.evidence[-3:])})" if error is not None and error.evidence else ""
    return Ending(
        outcome=record["outcome"],
        reason=type(error).__name__
        if error is not None
        else "Rehearsed"
        if record["outcome"] == Outcome.REHEARSED
        else "Moved",
        message=f"{record['reason']}{evidence}"[:8000],
        code=error.code if error is not None else "",
        remedy=error.remedy if error is not None else "",
    )
