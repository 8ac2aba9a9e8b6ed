"""What says of a node that it goes away, and when."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from podferry.controller.node_trouble import TRIGGERS, Trigger, trigger_of, trouble_of
from podferry.controller.program import pruned_node
from podferry.errors import UsageError
from podferry.kube.drain import BY_ANNOTATION

pytestmark = pytest.mark.unit
NOW = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)
SPOT = "aws-node-termination-handler/spot-itn"
OURS = (*TRIGGERS, Trigger("annotation", "example.com/maintenance", 60.0))


def node(*, taints: Any = (), conditions: Any = (), **annotations: str) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "n",
            "annotations": {name.replace("__", "/").replace("_", "."): value for name, value in annotations.items()},
        },
        "spec": {"taints": list(taints)},
        "status": {"conditions": list(conditions)},
    }


def left(one: dict[str, Any]) -> float | None:
    """Seconds until the node goes away; as the controller remembers it, so that nothing that counts is pruned."""
    found = trouble_of(pruned_node(one, OURS), OURS, NOW)
    return None if found is None else (found.deadline - NOW).total_seconds()


@pytest.mark.parametrize(
    ("one", "seconds"),
    [
        (node(), None),
        (node(taints=[{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]), None),
        (node(taints=[{"key": SPOT, "value": "77", "effect": "NoSchedule"}]), 120.0),
        (node(taints=[{"key": SPOT, "effect": "NoExecute", "timeAdded": "2026-11-30T11:59:30Z"}]), 90.0),
        (node(conditions=[{"type": "PreemptScheduled", "status": "False"}]), None),
        (
            node(
                conditions=[
                    {"type": "Ready", "status": "True"},
                    {"type": "PreemptScheduled", "status": "True", "lastTransitionTime": "2026-11-30T11:59:50Z"},
                ]
            ),
            20.0,
        ),
        (node(example_com__maintenance="2026-11-30T13:00:00Z"), 3600.0),
        (node(example_com__maintenance="soon"), 60.0),
        (node(taints=[{"key": SPOT, "effect": "NoSchedule"}], example_com__maintenance="soon"), 60.0),
    ],
)
def test_what_says_that_a_node_goes_away(one: dict[str, Any], seconds: float | None) -> None:
    assert left(one) == seconds


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("2026-11-30T12:10:00+00:00", 600.0), ("2026-11-30T12:10:00", 600.0), ("5m", 300.0), ("later", None)],
)
def test_podferrys_own_annotation_says_when(value: str, seconds: float | None) -> None:
    assert left({**node(), "metadata": {"name": "n", "annotations": {BY_ANNOTATION: value}}}) == seconds


def test_a_trouble_is_the_same_as_long_as_it_lasts_and_another_when_it_comes_again() -> None:
    def seen(since: str, now: datetime) -> str:
        one = node(conditions=[{"type": "TerminateScheduled", "status": "True", "lastTransitionTime": since}])
        found = trouble_of(one, TRIGGERS, now)
        assert found is not None
        return found.identity

    first = seen("2026-11-30T11:00:00Z", NOW)
    assert seen("2026-11-30T11:00:00Z", NOW + timedelta(minutes=3)) == first
    assert seen("2026-11-30T11:30:00Z", NOW) != first


def test_a_trigger_is_read_from_the_command_line() -> None:
    assert trigger_of("taint:example.com/going=2m") == Trigger("taint", "example.com/going", 120.0)
    for wrong in ("taint:example.com/going", "taint=2m", "label:a=2m", "taint:=2m", "taint:a=soon", ""):
        with pytest.raises(UsageError):
            trigger_of(wrong)
