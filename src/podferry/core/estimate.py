"""Estimates of a move's duration from the completed moves of this cluster. Pure.

A move copies a pod's memory about once, at a rate that link and processors set; so the rate of earlier moves says more than any
formula. What a job writes while it is copied is not known before: the estimate is that of a middling job.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class MeasuredMove:
    """A move that completed: bytes on the wire, seconds from its turn to its end, seconds that the job stood still."""

    bytes: int
    seconds: float
    downtime: float


@dataclass(frozen=True)
class Estimate:
    """Seconds for a move and for its stop; `moves` is how many earlier ones it rests on."""

    seconds: float
    downtime: float
    moves: int


def estimate(memory: int | None, earlier: Iterable[MeasuredMove]) -> Estimate | None:
    """For a pod with so many bytes of memory; None where that or an earlier move is not known. No move is said to be quicker than
    the quickest that was seen.

    >>> estimate(200, [Measured(100, 1.0, 0.5), Measured(100, 3.0, 0.7), Measured(100, 2.0, 0.6)])
    Estimate(seconds=4.0, downtime=0.6, moves=3)
    """
    known = [one for one in earlier if one.bytes > 0 and one.seconds > 0]
    if memory is None or not known:
        return None
    rate = median(one.bytes / one.seconds for one in known)
    quickest = min(one.seconds for one in known)
    return Estimate(max(quickest, memory / rate), median(one.downtime for one in known), len(known))


def together(moves: Sequence[float], parallel: int) -> float:
    """Seconds until all are done where `parallel` are under way at once, in this order.

    >>> together([4.0, 1.0, 1.0, 1.0], 2)
    4.0
    """
    busy = [0.0] * max(1, parallel)
    for seconds in moves:
        first = busy.index(min(busy))
        busy[first] += seconds
    return max(busy)
