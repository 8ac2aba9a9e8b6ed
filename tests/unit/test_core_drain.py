"""What a drain decides: order, limits, what stays, and when it is over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.core.drain import ATTEMPTS, DrainedPod, DrainPhase, PodState, plan

pytestmark = pytest.mark.unit
ROOM = 50


def test_priority_goes_before_age_and_age_before_youth() -> None:
    pods = [
        DrainedPod("young", started="2026-11-30T10:00:00Z"),
        DrainedPod("old", started="2026-11-28T10:00:00Z"),
        DrainedPod("urgent", started="2026-11-30T11:00:00Z", priority=5),
        DrainedPod("unknown"),
    ]
    assert plan(pods, parallel=ROOM).move == ("urgent", "old", "young", "unknown")


@pytest.mark.parametrize(("parallel", "moving", "begun"), [(2, 1, 1), (2, 2, 0), (1, 1, 0), (9, 0, 9), (3, 5, 0)])
def test_no_more_is_asked_for_at_once(parallel: int, moving: int, begun: int) -> None:
    under_way = [DrainedPod(f"m{number}", moving=True) for number in range(moving)]
    waiting = [DrainedPod(f"w{number}") for number in range(9)]
    assert len(plan(under_way + waiting, parallel=parallel).move) == begun


def test_a_pod_that_cannot_move_stays_unless_it_is_to_be_evicted() -> None:
    pods = [DrainedPod("a", obstacle="hostPath"), DrainedPod("b", attempts=ATTEMPTS, failure="no node")]
    left = plan(pods, parallel=ROOM)
    assert (left.move, left.evict, left.phase) == ((), (), DrainPhase.INCOMPLETE)
    assert {uid: state for uid, (state, _) in left.states.items()} == {"a": PodState.LEFT, "b": PodState.LEFT}
    assert "no node" in left.states["b"][1]
    evicted = plan(pods, parallel=ROOM, evict_others=True)
    assert (set(evicted.evict), evicted.phase) == ({"a", "b"}, DrainPhase.DRAINING)


def test_a_failed_move_is_tried_again_a_bounded_number_of_times() -> None:
    for attempts in range(ATTEMPTS):
        again = plan([DrainedPod("a", attempts=attempts, failure="no node")], parallel=ROOM)
        assert again.move == ("a",)
    assert plan([DrainedPod("a", attempts=ATTEMPTS, failure="x")], parallel=ROOM).move == ()


def test_what_settles_by_itself_is_waited_for() -> None:
    what = plan([DrainedPod("a", settling="it is being deleted")], parallel=ROOM, evict_others=True)
    assert (what.move, what.evict, what.phase) == ((), (), DrainPhase.DRAINING)


def test_a_stopped_drain_begins_nothing_and_is_stopped_once_nothing_moves() -> None:
    pods = [DrainedPod("a"), DrainedPod("b", obstacle="hostPath")]
    what = plan(pods, parallel=ROOM, evict_others=True, stopped=True)
    assert (what.move, what.evict, what.phase) == ((), (), DrainPhase.STOPPED)
    assert plan([], parallel=ROOM, stopped=True).phase is DrainPhase.COMPLETED


pods_of_any_kind = st.lists(
    st.builds(
        DrainedPod,
        uid=st.uuids().map(str),
        started=st.sampled_from(["", "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"]),
        priority=st.integers(-3, 3),
        obstacle=st.sampled_from(["", "hostPath"]),
        moving=st.booleans(),
        settling=st.sampled_from(["", "it is being deleted"]),
        attempts=st.integers(0, 5),
        work=st.floats(0.0, 1e6),
        seconds=st.none() | st.floats(0.0, 500.0),
    ),
    max_size=30,
    unique_by=lambda one: one.uid,
)


@given(pods_of_any_kind, st.integers(1, 9), st.booleans(), st.booleans(), st.none() | st.floats(-10.0, 300.0))
def test_whatever_is_there_limits_hold_and_every_pod_has_a_state(
    pods: list[DrainedPod], parallel: int, evict: bool, stopped: bool, left: float | None
) -> None:
    what = plan(pods, parallel=parallel, evict_others=evict, stopped=stopped, left=left)
    moving = {one.uid for one in pods if one.moving}
    assert set(what.states) == {one.uid for one in pods}
    assert not what.move or len(moving) + len(what.move) <= parallel
    assert not set(what.move) & moving
    assert not set(what.move) & set(what.evict)
    assert (what.phase is DrainPhase.COMPLETED) == (not pods)
    if what.phase is DrainPhase.INCOMPLETE:
        assert {state for state, _ in what.states.values()} == {PodState.LEFT}


def test_with_a_deadline_those_go_first_that_save_most() -> None:
    """Two minutes, one move at a time: a pod that takes all of it saves less than two that share it."""
    pods = [
        DrainedPod("whole", work=1000.0, seconds=110.0, started="2026-01-01T00:00:00Z"),
        DrainedPod("one", work=700.0, seconds=50.0, started="2026-02-01T00:00:00Z"),
        DrainedPod("other", work=600.0, seconds=50.0, started="2026-03-01T00:00:00Z"),
    ]
    assert plan(pods, parallel=1).move == ("whole",)
    what = plan(pods, parallel=1, left=120.0)
    assert (what.move, what.late) == (("one",), {"whole"})
    assert "too late" in what.states["whole"][1]
    only = plan(pods[:1], parallel=1, left=60.0)
    assert (only.move, only.late) == (("whole",), {"whole"}), (
        "what a move takes is an estimate: it is tried all the same"
    )


def test_a_priority_goes_before_all_work_and_a_move_under_way_takes_its_time() -> None:
    pods = [
        DrainedPod("urgent", priority=1, work=1.0, seconds=60.0),
        DrainedPod("much", work=1000.0, seconds=60.0),
        DrainedPod("gone", moving=True, seconds=30.0),
    ]
    what = plan(pods, parallel=2, left=80.0)
    assert (what.move, what.late) == (("urgent",), {"much"})
    assert plan(pods, parallel=3, left=80.0).late == set()


def test_where_nothing_tells_how_long_moves_take_the_longest_running_goes_first() -> None:
    pods = [DrainedPod("young", started="2026-02-01T00:00:00Z"), DrainedPod("old", started="2026-01-01T00:00:00Z")]
    what = plan(pods, parallel=1, left=10.0)
    assert (what.move, what.late) == (("old",), set())
