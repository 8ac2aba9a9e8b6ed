"""Estimates of moves: they rest on what was seen, and say nothing where nothing was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.core.estimate import MeasuredMove, estimate, together

pytestmark = pytest.mark.unit

measures = st.lists(
    st.builds(MeasuredMove, st.integers(1, 1 << 40), st.floats(0.1, 1e5), st.floats(0, 60)), min_size=1, max_size=20
)


@pytest.mark.parametrize("memory", [None, 5])
def test_what_is_not_known_is_not_said(memory: int | None) -> None:
    assert estimate(memory, []) is None
    assert estimate(memory, [MeasuredMove(0, 1.0, 0.1), MeasuredMove(1, 0.0, 0.1)]) is None
    assert (estimate(memory, [MeasuredMove(1, 1.0, 0.1)]) is None) == (memory is None)


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40), measures)
def test_more_memory_takes_no_less_and_nothing_is_quicker_than_what_was_seen(
    memory: int, more: int, earlier: list[MeasuredMove]
) -> None:
    small, large = estimate(memory, earlier), estimate(memory + more, earlier)
    assert small is not None
    assert large is not None
    assert large.seconds >= small.seconds >= min(one.seconds for one in earlier)
    assert min(one.downtime for one in earlier) <= small.downtime <= max(one.downtime for one in earlier)
    assert small.moves == len(earlier)


@given(st.lists(st.floats(0, 1e4), max_size=30), st.integers(1, 9))
def test_together_they_take_no_less_than_the_longest_and_no_more_than_one_after_the_other(
    moves: list[float], parallel: int
) -> None:
    total = together(moves, parallel)
    assert max(moves, default=0) <= total * (1 + 1e-9)
    assert total <= sum(moves) * (1 + 1e-9)
    assert total >= sum(moves) / parallel * (1 - 1e-9)
