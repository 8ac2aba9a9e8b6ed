"""A node of ten pods of five kinds of owners is emptied, there and back: by podferry, and by plain `kubectl drain`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from podferry.lab import Lab

from .draining import ELIGIBLE, STAYS, TITLES, Drained, Node, evictions, until
from .installing import A, B

pytestmark = pytest.mark.cluster
LIMIT = 2
"""Moves out of a node at once, where nobody says otherwise."""


@pytest.fixture
def node(installed: Lab) -> Iterator[Node]:
    """Node A, full of pods that count."""
    made = Node(installed)
    try:
        made.fill()
        yield made
    finally:
        made.clear()


@pytest.mark.parametrize("rounds", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_node_is_drained_and_refilled_and_no_job_notices(node: Node, rounds: int) -> None:
    """There by podferry, back by what knows nothing of podferry: its evictions become moves."""
    drains: list[Drained] = []
    with evictions(node.kubectl):
        for _ in range(rounds):
            drains.append(node.by_podferry(A))
            node.sound(B)
            drains.append(node.by_kubectl(B))
            node.sound(A)
    print("", TITLES, *(one.row() for one in drains), sep="\n")
    for one in drains:
        assert len(one.downtimes) == ELIGIBLE, one
        assert 0 < one.most <= LIMIT, one
    assert node.pods()[STAYS]["spec"]["nodeName"] == A, "what cannot move was evicted, and its owner made another"
    node.finish()


@pytest.mark.slow
def test_what_kubectl_drain_does_without_podferry(node: Node) -> None:
    """To compare with: everything starts anew, and what has no owner, or may not be tried again, is gone."""
    before = {name: len(node.counted(name)) for name in node.pods()}
    seen = node.by_kubectl(A, "kubectl drain, without podferry")
    kept = set(node.pods()) & set(before)
    print(
        "", TITLES, seen.row(), f"counted before: {sum(before.values())}; pods that are still there: {kept}", sep="\n"
    )
    assert not seen.downtimes
    assert kept <= {STAYS}
    until(lambda: len(node.pods()) >= 5, "the owners that can have made new pods")
