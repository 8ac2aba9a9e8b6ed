"""The record of one migration, with times, which `podferry status` and `explain` show, and its live events.

Times are milliseconds since the migration began, on this node's monotonic clock. The record's fields are a contract:
docs/cli.md lists them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict, cast

from podferry.core.precopy import Round
from podferry.errors import PodferryError
from podferry.model import Mode, Outcome

Event = dict[str, Any]
Listener = Callable[[Event], None]
EVENT_INTERVAL = 0.1
RATE_WINDOW = 2.0


class RehearsalFigures(TypedDict, total=False):
    """What a rehearsal has found. docs/cli.md, like that of `RecordDetails`, gives the units."""

    stood_still_ms: float
    written_bytes: int
    written_in_ms: float
    image_bytes: int
    forecast_ms: float


class RecordDetails(TypedDict, total=False):
    """Fields of a record that a migration may lack, each noted by the step that learns it."""

    tracker: str
    tracker_reason: str
    warnings: list[str]
    connections: list[dict[str, Any]]
    """`podferry.core.connections.told`, with the next one."""
    connections_total: dict[str, int]
    dump: str
    closed_connections: Sequence[str]
    postcopy_dependency: bool
    filled_ms: float
    fill: dict[str, Any]
    """On the target: the lazy-pages daemon's figures."""
    differences: list[str]
    leftovers: list[str]
    rehearsal: RehearsalFigures


class MigrationRecord:
    """A migration as it unfolds. Listeners get an event at each phase and at most ten a second between."""

    def __init__(self, id: str, name: str, source: str, target: str, mode: Mode) -> None:
        self.id, self.name, self.source, self.target, self.mode = id, name, source, target, mode
        self.started_at = time.time()
        self._began = time.monotonic()
        self.ended_at: float | None = None
        self.phase = ""
        self.phases: dict[str, float] = {}
        self._phase_since = 0.0
        self.outcome: Outcome | None = None
        self.reason = ""
        self.error: PodferryError | None = None
        self.downtime_ms: float | None = None
        self.total_ms: float | None = None
        self.wire_bytes = self.memory_bytes = self.upper_bytes = 0
        self.rounds: list[Round] = []
        self._rounds_before: list[dict[str, Any]] = []
        self.spans: list[dict[str, Any]] = []
        self._steps_begun: dict[str, float] = {}
        self.extra: RecordDetails = {}
        self._to_send = 0
        self._sent: deque[tuple[float, int]] = deque()
        self._listeners: list[Listener] = []
        self._last_event = 0.0

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> MigrationRecord:
        """Go on with a record that `to_dict` made, in another process."""
        migration_record = cls(record["id"], record["name"], record["source"], record["target"], Mode(record["mode"]))
        migration_record.started_at = record["started_at"]
        migration_record._began = time.monotonic() - max(0.0, time.time() - migration_record.started_at)
        migration_record.phases, migration_record.spans = dict(record["phases"]), list(record["spans"])
        for name in ("wire_bytes", "memory_bytes", "upper_bytes", "downtime_ms", "phase", "reason"):
            setattr(migration_record, name, record[name])
        migration_record._phase_since = migration_record.now()
        migration_record._rounds_before = list(record["rounds_detail"])
        migration_record.error = PodferryError.from_dict(record["error"]) if record["error"] else None
        known = migration_record.to_dict()
        migration_record.extra = cast("RecordDetails", {name: record[name] for name in record if name not in known})
        return migration_record

    def now(self) -> float:
        """Milliseconds since the migration began."""
        return (time.monotonic() - self._began) * 1e3

    def at(self, monotonic: float) -> float:
        """A reading of this node's monotonic clock (seconds) as milliseconds since the migration began."""
        return (monotonic - self._began) * 1e3

    def enter(self, phase: str, note: str = "") -> None:
        """A phase begins, and with it the one before has ended."""
        now = self.now()
        if self.phase:
            self.phases[self.phase] = round(self.phases.get(self.phase, 0.0) + now - self._phase_since, 3)
        self.phase, self._phase_since = phase, now
        self._notify(note, force=True)

    @contextmanager
    def span(self, name: str, where: str = "source", detail: str = "") -> Iterator[None]:
        """Time one step for the timeline."""
        start, self._steps_begun[name] = self.now(), self.now()
        try:
            yield
        except BaseException:
            detail = "; ".join(filter(None, [detail, "broken off"]))
            raise
        finally:
            self._steps_begun.pop(name, None)
            self.add_span(name, where, start, self.now(), detail)

    def steps(self, since_ms: float) -> list[str]:
        """The steps since then and their durations, in words, with the steps still under way."""
        done = [one for one in self.spans if one["start_ms"] >= since_ms]
        said = [
            f"{one['name']} {(one['end_ms'] - one['start_ms']) / 1e3:.2f} s"
            + (f" ({one['detail']})" if one["detail"] else "")
            for one in done
        ]
        return said + [f"{name} {(self.now() - at) / 1e3:.2f} s until now" for name, at in self._steps_begun.items()]

    def add_span(self, name: str, where: str, start_ms: float, end_ms: float, detail: str = "") -> None:
        """Put a step that was timed elsewhere on the timeline."""
        self.spans.append(
            {"name": name, "where": where, "start_ms": round(start_ms, 3), "end_ms": round(end_ms, 3), "detail": detail}
        )

    def expect(self, total: int) -> None:
        """How many bytes are to be sent, all told, as far as is known now."""
        self._to_send = max(total, self.wire_bytes)

    def sent(self, wire_bytes: int) -> None:
        """The wire has carried `wire_bytes` since the migration began."""
        self.wire_bytes = wire_bytes
        now = time.monotonic()
        self._sent.append((now, wire_bytes))
        while len(self._sent) > 2 and now - self._sent[0][0] > RATE_WINDOW:
            self._sent.popleft()
        self._notify()

    def rate(self) -> float | None:
        """Bytes a second over the last two seconds, or None where too little was sent to tell."""
        if len(self._sent) < 2 or self._sent[-1][0] - self._sent[0][0] < EVENT_INTERVAL:
            return None
        (start, before), (end, after) = self._sent[0], self._sent[-1]
        return (after - before) / (end - start)

    def add_round(self, done: Round) -> None:
        """A pre-copy round is over."""
        self.rounds.append(done)
        self._notify(
            f"round {done.number}: {done.pages} pages, {done.pending_bytes >> 10} KiB written meanwhile", force=True
        )

    def end(self, outcome: Outcome, reason: str = "", error: PodferryError | None = None) -> None:
        """The migration has ended. May be called once."""
        self.enter("")
        self.phase = str(outcome)
        self.outcome, self.reason = outcome, reason
        # What it says, as a record keeps it: the error itself holds the frames that it came through, and all that they hold.
        self.error = PodferryError.from_dict(error.to_dict()) if error else None
        self.total_ms, self.ended_at = round(self.now(), 3), time.time()

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with every event from now on. Returns the function that ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def to_dict(self) -> dict[str, Any]:
        """The record, as JSON carries it."""
        return {
            "id": self.id,
            "name": self.name,
            "source": self.source,
            "target": self.target,
            "mode": str(self.mode),
            "outcome": self.outcome and str(self.outcome),
            "reason": self.reason,
            "downtime_ms": self.downtime_ms and round(self.downtime_ms, 3),
            "total_ms": self.total_ms,
            "wire_bytes": self.wire_bytes,
            "memory_bytes": self.memory_bytes,
            "upper_bytes": self.upper_bytes,
            "rounds": len(self._rounds_before) + len(self.rounds),
            "phases": {name: ms for name, ms in self.phases.items() if name},
            "phase": self.phase,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "spans": self.spans,
            "rounds_detail": self._rounds_before
            + [
                {
                    "round": one.number,
                    "pages": one.pages,
                    "bytes": one.bytes,
                    "ms": round(one.seconds * 1e3, 3),
                    "dirty_rate": round(one.dirty_rate),
                }
                for one in self.rounds
            ],
            "error": self.error and self.error.to_dict(),
            **self.extra,
        }

    def _notify(self, note: str = "", *, force: bool = False) -> None:
        now = time.monotonic()
        if not self._listeners or (not force and now - self._last_event < EVENT_INTERVAL):
            return
        self._last_event = now
        rate = self.rate()
        left = max(0, self._to_send - self.wire_bytes)
        event = {
            "id": self.id,
            "phase": self.phase,
            "t_ms": round(self.now(), 3),
            "bytes": self.wire_bytes,
            "total_bytes": self._to_send,
            "rate": rate and round(rate),
            "eta_s": round(left / rate, 1) if rate and self._to_send else None,
            "round": len(self.rounds) + 1,
            "note": note,
        }
        for listener in list(self._listeners):
            listener(event)
