"""Which jobs to move off a node that goes away at a known time, so that most computed work is saved. Pure.

Each job is worth what it has computed, and takes a known time to move; some moves are under way at once. That is the problem of
several knapsacks of one size: where one or two moves run at once it is solved by dynamic programming, over time in `SLOTS` parts;
where more do, the jobs that are worth most for each second are taken first (Dantzig's rule).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

SLOTS = 48
"""Parts that the time left is divided into. A move takes whole parts, so what is promised fits."""
SOLVED = 2
"""Moves at once up to which the best choice is computed."""
_ROUNDED = 1e-9


@dataclass(frozen=True)
class SavableJob:
    """A job on the node: what it has computed, in any unit, and the seconds that its move will take."""

    uid: str
    work: float
    seconds: float

    @property
    def density(self) -> float:
        """Work saved for each second of its move."""
        return self.work / max(self.seconds, _ROUNDED)


def saved(jobs: Sequence[SavableJob], left: float, busy: Sequence[float]) -> list[SavableJob]:
    """Those of `jobs` to move within `left` seconds, in the order in which to begin.

    `busy` has an entry for each move that may be under way at once: the seconds after which it is free for the next one.

    >>> several = SavableJob("long", 5.0, 10.0), SavableJob("a", 3.0, 5.0), SavableJob("b", 3.0, 5.0)
    >>> [one.uid for one in saved(several, 10.0, [0.0])]
    ['a', 'b']
    """
    if left <= 0 or not busy:
        return []
    lanes = _solved(jobs, left, busy) if len(busy) <= SOLVED else _greedy(jobs, left, busy)
    begun: list[tuple[float, float, SavableJob]] = []
    for lane, free in zip(lanes, busy, strict=True):
        for job in sorted(lane, key=lambda one: (-one.density, one.uid)):
            begun.append((free, -job.density, job))
            free += job.seconds  # noqa: PLW2901
    return [job for _, _, job in sorted(begun, key=lambda one: (one[0], one[1], one[2].uid))]


def _solved(jobs: Sequence[SavableJob], left: float, busy: Sequence[float]) -> list[list[SavableJob]]:
    """The best choice, for one lane or two: `best[i][j]` is the work that `i` and `j` parts of the lanes can save."""
    part = left / SLOTS
    rooms = [max(0, SLOTS - ceil(one / part - _ROUNDED)) for one in (*busy, left)[:SOLVED]]
    width = rooms[1] + 1
    best = [0.0] * ((rooms[0] + 1) * width)
    taken: list[bytearray] = []
    for job in jobs:
        size, choice = max(1, ceil(job.seconds / part - _ROUNDED)), bytearray(len(best))
        for first in range(rooms[0], -1, -1):
            for second in range(rooms[1], -1, -1):
                here = first * width + second
                if first >= size and (work := best[here - size * width] + job.work) > best[here]:
                    best[here], choice[here] = work, 1
                if second >= size and (work := best[here - size] + job.work) > best[here]:
                    best[here], choice[here] = work, 2
        taken.append(choice)
    lanes: list[list[SavableJob]] = [[], []]
    first, second = rooms
    for job, choice in zip(reversed(jobs), reversed(taken), strict=True):
        lane = choice[first * width + second]
        if not lane:
            continue
        lanes[lane - 1].append(job)
        size = max(1, ceil(job.seconds / part - _ROUNDED))
        first, second = (first - size, second) if lane == 1 else (first, second - size)
    return lanes[: len(busy)]


def _greedy(jobs: Sequence[SavableJob], left: float, busy: Sequence[float]) -> list[list[SavableJob]]:
    lanes: list[list[SavableJob]] = [[] for _ in busy]
    free = list(busy)
    for job in sorted(jobs, key=lambda one: (-one.density, one.uid)):
        lane = free.index(min(free))
        if free[lane] + job.seconds <= left:
            lanes[lane].append(job)
            free[lane] += job.seconds
    return lanes
