"""A migration's record and its progress events, as the agent sends them and as `podferry` shows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from podferry.errors import PeerMisbehaved, PodferryError
from podferry.model import Outcome

SOURCE, TARGET = "source", "target"


@dataclass(frozen=True)
class Span:
    """Something that took time on one node: `where` is `source` or `target`, times are ms since the start."""

    name: str
    where: str
    start_ms: float
    end_ms: float
    detail: str = ""

    @property
    def ms(self) -> float:
        """How long it took."""
        return self.end_ms - self.start_ms


@dataclass(frozen=True)
class RoundRecord:
    """One pre-copy pass: pages and bytes sent in `ms`, while the job wrote `dirty_rate` bytes a second."""

    number: int
    pages: int
    bytes: int
    ms: float
    dirty_rate: float | None = None


@dataclass(frozen=True)
class Record:
    """One migration, under way (`outcome` is None) or ended. `raw` is what the agent sent, unknown fields included."""

    id: str
    name: str
    source: str
    target: str
    mode: str
    outcome: Outcome | None
    phase: str
    reason: str
    downtime_ms: float | None
    total_ms: float | None
    wire_bytes: int
    memory_bytes: int
    upper_bytes: int
    phases: dict[str, float]
    rounds: int
    rounds_detail: list[RoundRecord] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    tracker: str = ""
    started_at: float | None = None
    ended_at: float | None = None
    postcopy_dependency: bool = False
    error: PodferryError | None = None
    raw: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: object) -> Record:
        """Decode what the agent sent. Raises `PeerMisbehaved` where the contract does not hold."""
        if not isinstance(data, dict):
            raise PeerMisbehaved("the agent sent a record that is not a JSON object")
        try:
            return cls._decode(data)
        except (KeyError, TypeError, ValueError, AttributeError) as wrong:
            raise PeerMisbehaved.because("the agent sent a record that does not keep the contract", wrong) from wrong

    @classmethod
    def _decode(cls, data: dict[str, Any]) -> Record:
        outcome, error = data["outcome"], data.get("error")
        return cls(
            id=str(data["id"]),
            name=str(data["name"]),
            source=str(data["source"] or "?"),
            target=str(data["target"] or "?"),
            mode=str(data["mode"]),
            outcome=None if outcome is None else Outcome(outcome),
            phase=str(data.get("phase") or ""),
            reason=str(data.get("reason") or ""),
            downtime_ms=_number(data.get("downtime_ms")),
            total_ms=_number(data.get("total_ms")),
            wire_bytes=int(data.get("wire_bytes") or 0),
            memory_bytes=int(data.get("memory_bytes") or 0),
            upper_bytes=int(data.get("upper_bytes") or 0),
            phases={str(name): float(ms) for name, ms in (data.get("phases") or {}).items()},
            rounds=int(data.get("rounds") or 0),
            rounds_detail=[_round(one) for one in data.get("rounds_detail") or []],
            spans=sorted((_span(one) for one in data.get("spans") or []), key=lambda span: span.start_ms),
            tracker=str(data.get("tracker") or ""),
            started_at=_number(data.get("started_at")),
            ended_at=_number(data.get("ended_at")),
            postcopy_dependency=bool(data.get("postcopy_dependency")),
            error=None if error is None else PodferryError.from_dict(error),
            raw=data,
        )


@dataclass(frozen=True)
class ProgressRecord:
    """Where a migration is: `t_ms` since its start, bytes of `total_bytes` sent at `rate` bytes a second, `eta_s` left."""

    id: str
    phase: str
    t_ms: float
    bytes: int = 0
    total_bytes: int = 0
    rate: float | None = None
    eta_s: float | None = None
    round: int = 0
    note: str = ""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ProgressRecord:
        """Decode one event. Raises `PeerMisbehaved` where it does not keep the contract."""
        try:
            return cls(
                id=str(data["id"]),
                phase=str(data["phase"]),
                t_ms=float(data["t_ms"]),
                bytes=int(data.get("bytes") or 0),
                total_bytes=int(data.get("total_bytes") or 0),
                rate=_number(data.get("rate")),
                eta_s=_number(data.get("eta_s")),
                round=int(data.get("round") or 0),
                note=str(data.get("note") or ""),
            )
        except (KeyError, TypeError, ValueError) as wrong:
            raise PeerMisbehaved.because("the agent sent an event that does not keep the contract", wrong) from wrong


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _span(data: dict[str, Any]) -> Span:
    start, end = float(data["start_ms"]), data.get("end_ms")
    return Span(
        name=str(data["name"]),
        where=TARGET if data["where"] == TARGET else SOURCE,
        start_ms=start,
        end_ms=max(start, float(end)) if end is not None else start,
        detail=str(data.get("detail") or ""),
    )


def _round(data: dict[str, Any]) -> RoundRecord:
    return RoundRecord(
        number=int(data["round"]),
        pages=int(data.get("pages") or 0),
        bytes=int(data.get("bytes") or 0),
        ms=float(data.get("ms") or 0),
        dirty_rate=_number(data.get("dirty_rate")),
    )
