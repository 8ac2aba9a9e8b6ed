"""What is saved off a node that goes away: against an oracle that tries everything."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.core.saving import SLOTS, SavableJob, saved

pytestmark = pytest.mark.unit

JOBS = st.lists(st.tuples(st.integers(0, 50), st.integers(1, SLOTS)), max_size=6).map(
    lambda found: [SavableJob(f"j{number}", float(work), float(size)) for number, (work, size) in enumerate(found)]
)


def oracle(jobs: Sequence[SavableJob], left: float, busy: Sequence[float]) -> float:
    """The most work that any choice of lanes for any of the jobs saves."""
    best = 0.0
    for lanes in product(range(len(busy) + 1), repeat=len(jobs)):
        free = [*busy, 0.0]
        for job, lane in zip(jobs, lanes, strict=True):
            free[lane] += job.seconds
        if all(one <= left for one in free[: len(busy)]):
            best = max(best, sum(job.work for job, lane in zip(jobs, lanes, strict=True) if lane < len(busy)))
    return best


def ends(order: Sequence[SavableJob], busy: Sequence[float]) -> dict[str, float]:
    """When each move ends where the next one begins as soon as there is a place."""
    free, found = list(busy), dict[str, float]()
    for job in order:
        lane = free.index(min(free))
        free[lane] += job.seconds
        found[job.uid] = free[lane]
    return found


@given(JOBS, st.lists(st.integers(0, SLOTS // 2), min_size=1, max_size=2))
def test_no_choice_saves_more(jobs: list[SavableJob], begun: list[int]) -> None:
    busy = [float(one) for one in begun]
    chosen = saved(jobs, float(SLOTS), busy)
    assert sum(one.work for one in chosen) == oracle(jobs, float(SLOTS), busy)


@given(JOBS, st.lists(st.integers(0, SLOTS // 2), min_size=1, max_size=4))
def test_what_is_chosen_is_done_in_time(jobs: list[SavableJob], begun: list[int]) -> None:
    busy = [float(one) for one in begun]
    chosen = saved(jobs, float(SLOTS), busy)
    assert len({one.uid for one in chosen}) == len(chosen)
    assert all(end <= SLOTS for end in ends(chosen, busy).values())


@given(JOBS)
def test_with_more_lanes_at_least_half_of_the_best_is_saved_beside_the_largest(jobs: list[SavableJob]) -> None:
    busy = [0.0] * 3
    found = sum(one.work for one in saved(jobs, float(SLOTS), busy))
    largest = sorted((one.work for one in jobs), reverse=True)[:3]
    assert found + sum(largest) >= oracle(jobs, float(SLOTS), busy) / 2


def test_without_time_nothing_is_begun() -> None:
    assert saved([SavableJob("a", 1.0, 1.0)], 0.0, [0.0]) == []
    assert saved([SavableJob("a", 1.0, 1.0)], -5.0, [0.0]) == []
    assert saved([SavableJob("a", 1.0, 1.0)], 5.0, []) == []


def test_a_node_full_of_pods_is_decided_at_once() -> None:
    """110 pods, in one step of the controller: what it costs is bounded by jobs x SLOTS x SLOTS."""
    jobs = [SavableJob(f"j{number}", float(number % 17), 1.0 + number % 13) for number in range(110)]
    assert saved(jobs, 120.0, [0.0, 3.0])
