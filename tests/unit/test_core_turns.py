"""Whose turn it is: limits, fairness, and that nobody waits for nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.core.turns import Group, Limits, Move, next_turns, wait

pytestmark = pytest.mark.unit

NODES, NAMESPACES = ("a", "b", "c"), ("x", "y", "z")


def uids(waiting: list[Move], under_way: list[Move], limits: Limits) -> list[str]:
    return [one.uid for one in next_turns(waiting, under_way, limits)]


def test_who_asked_first_goes_first() -> None:
    waiting = [Move("late", "x", "a", created="2026-11-30T11:00:00Z"), Move("early", "x", "a", created="2026-11-30T10")]
    assert uids(waiting, [], Limits(cluster=1)) == ["early"]


def test_a_namespace_with_two_hundred_moves_does_not_keep_another_waiting() -> None:
    flood = [Move(f"f{number:03}", "x", f"n{number}", created="2026-11-30T10") for number in range(200)]
    mine = Move("mine", "y", "a", created="2026-11-30T12")
    assert uids([*flood, mine], [], Limits(cluster=2)) == ["f000", "mine"]
    assert uids([*flood, mine], flood[:1], Limits(cluster=2)) == ["mine"]


def test_who_cannot_begin_is_passed_over_and_keeps_his_place() -> None:
    busy = [Move("1", "x", "a"), Move("2", "x", "a")]
    first, second = Move("3", "x", "a", created="2026-11-30T10"), Move("4", "x", "b", created="2026-11-30T11")
    assert uids([first, second], busy, Limits()) == ["4"]
    assert uids([first, second], busy[:1], Limits(cluster=2)) == ["3"]


@pytest.mark.parametrize(
    ("limits", "reason", "words"),
    [
        (Limits(cluster=2), "ClusterBusy", "the cluster has 2 moves under way"),
        (Limits(namespace=2), "NamespaceBusy", "namespace x"),
        (Limits(outbound=2), "SourceNodeBusy", "node a has 2 moves out"),
        (Limits(outbound=0, inbound=2), "TargetNodeBusy", "node t has 2 moves in"),
        (Limits(0, 0, 0, 0), "", ""),
    ],
)
def test_what_it_waits_for_is_said(limits: Limits, reason: str, words: str) -> None:
    busy = [Move("1", "x", "a", "t"), Move("2", "x", "a", "t")]
    found = wait(Move("3", "x", "a", "t"), busy, limits)
    assert (found.reason if found else "") == reason
    assert words in (found.message if found else "")


def test_who_drains_a_node_says_how_many_leave_it_at_once() -> None:
    waiting = [Move(str(number), "x", "a") for number in range(9)]
    found = next_turns(waiting, [], Limits(), lambda node: 4 if node == "a" else 2)
    assert len(list(found)) == 4


moves = st.lists(
    st.builds(
        Move,
        uid=st.uuids().map(str),
        namespace=st.sampled_from(NAMESPACES),
        source=st.sampled_from(NODES),
        target=st.sampled_from(("", *NODES)),
        created=st.sampled_from(("", "2026-11-30T10", "2026-11-30T11")),
    ),
    max_size=20,
    unique_by=lambda one: one.uid,
)


@given(moves, moves, st.builds(Limits, *[st.integers(0, 6)] * 4))
def test_limits_hold_and_no_place_stays_empty_while_somebody_could_take_it(
    waiting: list[Move], under_way: list[Move], limits: Limits
) -> None:
    begun = list(next_turns(waiting, under_way, limits))
    now = [*under_way, *begun]
    assert set(begun) <= set(waiting)
    if begun:
        assert not limits.cluster or len(now) <= limits.cluster
    for of, limit in (("namespace", limits.namespace), ("source", limits.outbound), ("target", limits.inbound)):
        for value in {getattr(one, of) for one in begun} - {""}:
            assert not limit or sum(getattr(one, of) == value for one in now) <= limit
    for one in waiting:
        assert one in begun or wait(one, now, limits) is not None


def test_a_groups_own_limits_hold_beside_those_of_all() -> None:
    """Two of a policy's moves in the cluster, one out of a node; who has no policy does not count."""
    few, unlimited = Group("few", cluster=2, outbound=1), Limits(0, 0, 0, 0)
    waiting = [
        Move("a", "x", "n", created="1", group=few),
        Move("b", "x", "n", created="2", group=few),
        Move("c", "x", "m", created="3", group=few),
        Move("d", "x", "o", created="4", group=few),
        Move("e", "x", "n", created="5"),
    ]
    assert [one.uid for one in next_turns(waiting, [], unlimited)] == ["a", "c", "e"]
    begun = [Move("a", "x", "n", group=Group("few")), Move("c", "x", "m", group=Group("few"))]
    kept = wait(waiting[3], begun, unlimited)
    assert kept is not None
    assert (kept.reason, "policy few has 2 moves" in kept.message) == ("PolicyBusy", True)
    kept = wait(waiting[1], begun[:1], unlimited)
    assert kept is not None
    assert "policy few on node n has 1 moves" in kept.message
    assert wait(Move("f", "x", "n", group=Group("others", 1, 1)), begun, unlimited) is None


def test_what_leaves_a_node_that_goes_away_comes_first() -> None:
    waiting = [
        Move("a", "x", "n", created="1"),
        Move("b", "y", "m", created="2", urgent=True),
        Move("c", "y", "m", created="3"),
    ]
    under_way = [Move("d", "y", "o")]
    assert [one.uid for one in next_turns(waiting, under_way, Limits(2, 0, 0, 0))] == ["b"]
