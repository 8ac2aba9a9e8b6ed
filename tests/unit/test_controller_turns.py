"""The places that a controller gives out: never twice, and none is kept for a Migration that has ended."""

from __future__ import annotations

from typing import Any

import pytest

from podferry.controller.turns import Turns
from podferry.core.migration import MigrationPhase
from podferry.core.turns import Limits
from podferry.kube.migration import Migration

pytestmark = pytest.mark.unit
Json = dict[str, Any]


def body(uid: str, phase: str = "", **status: Any) -> Json:
    about = {"name": f"move-{uid}", "namespace": "x", "uid": uid, "creationTimestamp": f"2026-11-30T10:00:0{uid}Z"}
    shown = {**({"phase": phase} if phase else {}), "sourceNode": "a", **status}
    return {"metadata": about, "spec": {"podName": "train"}, "status": shown}


def migration(uid: str) -> Migration:
    return Migration.from_json(body(uid))


def turns(known: list[Json], **limits: int) -> Turns:
    return Turns(
        lambda: known, lambda: [], Limits(**{"cluster": 0, "namespace": 0, "outbound": 0, "inbound": 0} | limits)
    )


def test_a_place_is_given_once_and_counts_until_the_status_shows_it() -> None:
    known: list[Json] = []
    one = turns(known, cluster=1)
    assert one.take(migration("1"), "a") is None
    assert one.take(migration("1"), "a") is None, "it has its place already"
    wait = one.take(migration("2"), "a")
    assert wait is not None
    assert (wait.reason, one.waiting, one.under_way, one.due()) == ("ClusterBusy", 1, 1, [])
    known.append(body("1", str(MigrationPhase.RUNNING)))
    one.see(known[0])
    assert one.under_way == 1, "it is counted once"
    known[0] = body("1", str(MigrationPhase.COMPLETED))
    one.see(known[0])
    assert (one.under_way, one.due(), one.all_waiting()) == (0, [("x", "move-2")], [("x", "move-2")])
    assert one.take(migration("2"), "a") is None
    assert one.waiting == 0


def test_a_migration_that_is_gone_leaves_its_place_and_its_turn() -> None:
    one = turns([], cluster=1)
    one.take(migration("1"), "a")
    one.take(migration("2"), "a")
    one.leave("1")
    assert one.due() == [("x", "move-2")]
    one.leave("2")
    assert (one.due(), one.waiting, one.under_way) == ([], 0, 0)


@pytest.mark.parametrize(
    ("phase", "status", "kept"),
    [
        ("", {}, True),
        (str(MigrationPhase.PENDING), {}, True),
        (str(MigrationPhase.SCHEDULING), {}, True),
        (str(MigrationPhase.SCHEDULING), {"targetNode": "t"}, False),
        (str(MigrationPhase.FAILED), {}, False),
    ],
)
def test_a_target_node_is_taken_until_the_status_shows_it_or_the_move_is_over(
    phase: str, status: Json, kept: bool
) -> None:
    one = turns([], inbound=1)
    assert one.enter(migration("1"), "t") is None
    one.see(body("1", phase, **status))
    assert ("1" in one._chosen) is kept


def test_no_more_go_into_a_node_than_may() -> None:
    known = [body("1", str(MigrationPhase.RUNNING), targetNode="t")]
    one = turns(known, inbound=1)
    refused = one.enter(migration("2"), "t")
    assert refused is not None
    assert refused.reason == "TargetNodeBusy"
    assert "2" not in one._chosen
    assert one.enter(migration("2"), "u") is None
