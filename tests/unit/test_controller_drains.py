"""What a drain's status says of its pods, while it runs and at its end."""

from __future__ import annotations

from typing import Any

import pytest

from podferry.controller import drains
from podferry.core.drain import DrainPhase, DrainPlan, PodState
from podferry.kube.drain import NodeDrain
from podferry.kube.migration import Migration, MigrationPhase

pytestmark = pytest.mark.unit
Json = dict[str, Any]
PODS = {
    uid: {
        "metadata": {"name": f"pod-{uid}", "namespace": "default", "uid": uid},
        "spec": {"containers": [{"name": "main"}]},
    }
    for uid in ("p1", "p2")
}


def plan(
    phase: DrainPhase, states: dict[str, tuple[PodState, str]], *, late: frozenset[str] = frozenset()
) -> DrainPlan:
    return DrainPlan((), (), states, phase, late)


def moved(uid: str, phase: MigrationPhase) -> Migration:
    about = {
        "name": f"drain-{uid}",
        "namespace": "default",
        "uid": f"m-{uid}",
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    source = {"name": f"pod-{uid}", "uid": uid}
    status = {"phase": phase, "sourcePod": source, "targetNode": "node-b", "downtime": "212ms"}
    return Migration.from_json({"metadata": about, "spec": {"podName": f"pod-{uid}"}, "status": status})


def drain() -> NodeDrain:
    return NodeDrain.from_json({"metadata": {"name": "node-a", "uid": "d1"}})


def test_a_drain_that_runs_has_no_time_of_completion_and_counts_its_pods() -> None:
    one = drain()
    states = {"p1": (PodState.MOVING, ""), "p2": (PodState.WAITING, "two moves leave the node already")}
    drains._tell(one, PODS, [], plan(DrainPhase.DRAINING, states, late=frozenset({"p2"})))
    assert (one.status.total, one.status.left, one.status.moved) == (2, 2, 0)
    assert one.status.completion_time is None
    assert [condition.type for condition in one.status.conditions] == []
    assert one.status.summary == "1 waiting, 1 moving"
    assert {pod.uid: pod.may_be_late for pod in one.status.pods} == {"p1": False, "p2": True}


def test_a_drain_that_has_emptied_its_node_says_so_and_where_each_pod_went() -> None:
    one = drain()
    drains._tell(one, PODS, [], plan(DrainPhase.DRAINING, dict.fromkeys(PODS, (PodState.WAITING, ""))))
    drains._tell(one, {}, [moved("p1", MigrationPhase.COMPLETED)], plan(DrainPhase.COMPLETED, {}))
    assert (one.status.total, one.status.left, one.status.moved) == (2, 0, 1)
    assert one.status.completion_time is not None
    (condition,) = one.status.conditions
    assert (condition.type, condition.status, condition.reason) == ("Completed", "True", "NodeEmpty")
    assert [(pod.state, pod.node, pod.downtime) for pod in one.status.pods] == [
        (PodState.MOVED, "node-b", "212ms"),
        (PodState.GONE, "", ""),
    ], "the second was deleted, or ended"


def test_a_drain_that_leaves_pods_has_ended_and_is_not_complete() -> None:
    one = drain()
    drains._tell(one, PODS, [], plan(DrainPhase.INCOMPLETE, {"p1": (PodState.LEFT, "a DaemonSet's")}))
    assert one.status.completion_time is not None
    (condition,) = one.status.conditions
    assert (condition.status, condition.reason) == ("False", "PodsLeft")
    assert one.status.pods[0].message == "a DaemonSet's"


def test_a_drain_that_is_stopped_has_not_ended() -> None:
    one = drain()
    drains._tell(one, PODS, [], plan(DrainPhase.STOPPED, {"p1": (PodState.WAITING, "")}))
    assert one.status.completion_time is None
    assert one.status.remaining == ""
