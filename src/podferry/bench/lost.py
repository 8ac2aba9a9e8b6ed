"""Lost work: how much later a job ends than it would have without the move, from what the job itself noted.

The job counts units of work in bins of 20 ms. What it loses in a span of time is the span less the time that the units done in it
would have taken at the speed before the move. The same figure of a twin that nobody moves is the machine's own part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from podferry.bench.workload import Bin, Report

SERIES_NS = 100_000_000
"""The grain of a record's speed over time."""

SETTLED_NS = 500_000_000
"""A job that has just filled its memory is not watched at once."""


@dataclass(frozen=True)
class LostWork:
    """Lost time in ms: to slower work until the stop, to the stop, and to slower work after it until `window_ms` are over."""

    precopy_ms: float
    stop_ms: float
    after_ms: float
    window_ms: float

    @property
    def total_ms(self) -> float:
        """All of it."""
        return self.precopy_ms + self.stop_ms + self.after_ms

    def to_dict(self) -> dict[str, float]:
        """As a record carries it."""
        parts = {"precopy_ms": self.precopy_ms, "stop_ms": self.stop_ms, "after_ms": self.after_ms}
        return {**parts, "total_ms": self.total_ms, "window_ms": self.window_ms}


def lost_work(report: Report, ready: int, began: int, stop: tuple[int, int] | None) -> LostWork | None:
    """What the job lost from `began` to its report, it having run from `ready` on and stood still in `stop` (ns).

    `None` where its speed before, or what came afterwards, is not known.
    """
    before = report.speed(ready + SETTLED_NS, began) or report.speed(ready, began)
    if before is None or not before.wall or report.bins[-1].end <= began:
        return None
    end = report.bins[-1].end
    stopped, resumed = stop or (end, end)

    def lost(start: int, until: int) -> float:
        """In ms."""
        return (until - start) / 1e6 - units_between(report.bins, start, until, stop) * 1e3 / before.wall

    return LostWork(lost(began, stopped), (resumed - stopped) / 1e6, lost(resumed, end), (end - began) / 1e6)


def units_between(bins: Sequence[Bin], start: int, end: int, stop: tuple[int, int] | None = None) -> float:
    """Units of work done from `start` to `end` (ns). A bin's work is spread evenly over it, without what of it lies in `stop`."""
    return sum(
        one.units * _active(max(one.start, start), min(one.end, end), stop) / whole
        for one in bins
        if one.start < end and start < one.end and (whole := _active(one.start, one.end, stop))
    )


def series(report: Report, ready: int, began: int) -> list[list[float]]:
    """The job's speed over time, in pieces of some 100 ms: its end (ms after `began`), units a second, MB written a second."""
    found: list[list[float]] = []
    piece: list[Bin] = []
    for one in report.bins:
        if one.start < ready:
            continue
        piece.append(one)
        if one.end - piece[0].start >= SERIES_NS:
            found.append(_point(piece, began))
            piece = []
    return found


def _active(start: int, end: int, stop: tuple[int, int] | None) -> int:
    """How much of a span (ns) lies outside of `stop`."""
    inside = max(0, min(end, stop[1]) - max(start, stop[0])) if stop else 0
    return max(0, end - start - inside)


def _point(piece: Sequence[Bin], began: int) -> list[float]:
    seconds = (piece[-1].end - piece[0].start) / 1e9
    units, written = sum(one.units for one in piece), sum(one.written for one in piece)
    return [
        round((piece[-1].end - began) / 1e6, 1),
        round(units / seconds, 1),
        round(written * 4096 / 1e6 / seconds, 1),
    ]


def lost_ms(record: dict[str, Any], part: str = "total_ms") -> float | None:
    """A part of a record's lost work."""
    found = (record.get("lost") or {}).get(part)
    return None if found is None else float(found)
