"""Runs behave as sets of addresses do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.memory import ranges
from podferry.memory.ranges import EMPTY, Growing, Runs, union

pytestmark = pytest.mark.unit

LIMIT = 60
bounds = st.tuples(st.integers(0, LIMIT), st.integers(0, LIMIT)).map(lambda pair: (min(pair), max(pair)))
lists = st.lists(bounds, max_size=12)
runs = lists.map(Runs)


def members(which: Runs) -> set[int]:
    return {address for start, end in which for address in range(start, end)}


def is_normal(which: Runs) -> bool:
    flat = [bound for run in which for bound in run]
    return flat == sorted(set(flat))


@given(lists)
def test_is_the_union_of_what_it_is_made_of(pairs: list[tuple[int, int]]) -> None:
    made = Runs(pairs)
    assert members(made) == {address for start, end in pairs for address in range(start, end)}
    assert is_normal(made)
    assert made == union([Runs.of(start, end) for start, end in pairs] or [EMPTY])


@given(runs, runs)
def test_operations_are_those_of_sets(a: Runs, b: Runs) -> None:
    for result, expected in (
        (a | b, members(a) | members(b)),
        (a & b, members(a) & members(b)),
        (a - b, members(a) - members(b)),
        (a ^ b, members(a) ^ members(b)),
    ):
        assert members(result) == expected
        assert is_normal(result)


@given(runs)
def test_measures(a: Runs) -> None:
    inside = members(a)
    assert a.size == len(inside)
    assert bool(a) == bool(inside)
    assert (a.start, a.end) == ((min(inside), max(inside) + 1) if inside else (0, 0))
    assert {address for address in range(LIMIT + 1) if address in a} == inside
    assert members(a.gaps()) == set(range(a.start, a.end)) - inside
    assert hash(a) == hash(Runs(list(a)))


@given(runs, bounds)
def test_clip(a: Runs, window: tuple[int, int]) -> None:
    assert members(a.clip(*window)) == members(a) & set(range(*window))
    assert is_normal(a.clip(*window))


@given(runs, st.integers(0, 8))
def test_coalesce_fills_small_holes_only(a: Runs, gap: int) -> None:
    grown = a.coalesce(gap)
    assert members(a) <= members(grown)
    assert all(end - start > gap for start, end in grown.gaps())
    assert all(end - start <= gap for start, end in (grown - a))
    assert is_normal(grown)


@given(runs, st.integers(1, 9))
def test_pieces_cover_and_stay_small(a: Runs, size: int) -> None:
    pieces = list(a.pieces(size))
    assert Runs(pieces) == a
    assert sum(end - start for start, end in pieces) == a.size
    assert all(0 < end - start <= size for start, end in pieces)


@given(runs)
def test_what_touches_is_joined(a: Runs) -> None:
    cut = list(a.pieces(3))
    assert Runs.disjoint([start for start, _ in cut], [end for _, end in cut]) == a


@given(runs, st.integers(1, 5))
def test_what_ascends_is_joined_in_blocks_of_any_size(a: Runs, at_once: int) -> None:
    cut = list(a.pieces(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "_AT_ONCE", at_once)
        assert Runs.ascending((start for start, _ in cut), (end for _, end in cut)) == a


@given(runs)
def test_what_grows_one_by_one_is_joined(a: Runs) -> None:
    growing = Growing()
    for run in a.pieces(3):
        growing.add(*run)
    assert growing.runs() == a


def test_a_run_that_ends_early_is_an_error() -> None:
    with pytest.raises(ValueError, match="0x10-0x8"):
        Runs([(0x10, 0x8)])
