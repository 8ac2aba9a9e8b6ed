"""The run map against a plain dictionary with one entry per address."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.memory.store.runs import Run, RunMap

pytestmark = pytest.mark.unit

ADDRESS_SPACE = 40
ranges = (
    st.tuples(st.integers(0, ADDRESS_SPACE), st.integers(0, ADDRESS_SPACE)).filter(lambda r: r[0] != r[1]).map(sorted)
)
changes = st.lists(st.tuples(st.booleans(), ranges, st.integers(0, 3)), max_size=30)


def build(steps: list[tuple[bool, list[int], int]], slope: int) -> tuple[RunMap, dict[int, int]]:
    runs, model = RunMap(slope=slope), {}
    for put, (start, end), value in steps:
        if put:
            runs.set(start, end, value)
            model.update({at: value + slope * (at - start) for at in range(start, end)})
        else:
            taken = runs.cut(start, end)
            assert {at: run.value + slope * (at - run.start) for run in taken for at in range(run.start, run.end)} == {
                at: model.pop(at) for at in range(start, end) if at in model
            }
    return runs, model


@given(changes, st.sampled_from([0, 1]), ranges)
def test_a_run_map_is_a_dictionary(steps: list[tuple[bool, list[int], int]], slope: int, look: list[int]) -> None:
    runs, model = build(steps, slope)
    assert {at: runs.at(at) for at in range(ADDRESS_SPACE) if runs.at(at) is not None} == model
    assert runs.total() == len(model)
    assert list(runs.runs()) == list(runs.copy().runs())
    start, end = look
    inside = {at for run in runs.within(start, end) for at in range(run.start, run.end)}
    assert inside == {at for at in model if start <= at < end}
    assert runs.overlaps(start, end) == bool(inside)


@given(changes, st.sampled_from([0, 1]))
def test_runs_are_in_order_and_joined(steps: list[tuple[bool, list[int], int]], slope: int) -> None:
    runs = list(build(steps, slope)[0])
    for one, other in pairwise(runs):
        assert one.end <= other.start
        joinable = one.end == other.start and one.value + slope * (one.end - one.start) == other.value
        assert not joinable, f"{one} and {other} could be one"


@given(changes, st.sampled_from([0, 1]))
def test_a_dump_loads(steps: list[tuple[bool, list[int], int]], slope: int) -> None:
    runs, _ = build(steps, slope)
    assert RunMap.load(runs.dump(), slope=slope) == runs


@pytest.mark.parametrize("runs", [[Run(4, 4)], [Run(8, 9), Run(2, 3)], [Run(0, 5), Run(4, 6)]])
def test_a_damaged_dump_is_refused(runs: list[Run]) -> None:
    columns = zip(*runs, strict=True)
    data = b"".join(number.to_bytes(8, "little") for column in columns for number in column)
    with pytest.raises(ValueError, match="out of order"):
        RunMap.load(data)
    with pytest.raises(ValueError, match="whole number"):
        RunMap.load(data[:-1])
