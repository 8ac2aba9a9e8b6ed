"""Which MigrationPolicy applies to a pod, and what it makes of what a Migration asks for."""

from __future__ import annotations

from typing import Any

import pytest

from podferry.controller.drains import priority
from podferry.controller.eligibility import PodUnfit
from podferry.controller.evictions import DEADLINE, deadline_of
from podferry.controller.policies import AppliedPolicy, known, most_specific, settle
from podferry.kube.drain import PRIORITY_ANNOTATION
from podferry.kube.migration import DEADLINE_ANNOTATION, MigrationSpec
from podferry.kube.policy import MigrationPolicy, MigrationPolicySpec, PolicyUnreadable
from podferry.kube.settings import MoveSettings

pytestmark = pytest.mark.unit
Json = dict[str, Any]


def policy(name: str = "p", **spec: Any) -> MigrationPolicy:
    return MigrationPolicy.from_json({"metadata": {"name": name}, "spec": spec})


def applied(**spec: Any) -> AppliedPolicy:
    return AppliedPolicy("p", policy(**spec).spec)


def wish(**spec: Any) -> MigrationSpec:
    return MigrationSpec.model_validate({"podName": "train", **spec})


def labels(**of: str) -> Json:
    return {"matchLabels": of}


@pytest.mark.parametrize(
    ("policies", "chosen"),
    [
        ({}, None),
        ({"all": {}}, "all"),
        ({"all": {}, "pods": {"podSelector": labels(app="train")}}, "pods"),
        (
            {"pods": {"podSelector": labels(app="train")}, "others": {"podSelector": labels(app="web", tier="x")}},
            "pods",
        ),
        ({"namespace": {"namespaceSelector": labels(team="a")}, "pods": {"podSelector": labels(app="train")}}, "pods"),
        (
            {
                "pods": {"podSelector": labels(app="train")},
                "both": {"namespaceSelector": labels(team="a"), "podSelector": labels(app="train")},
            },
            "both",
        ),
        ({"b": {"podSelector": labels(app="train")}, "a": {"podSelector": labels(app="train")}}, "a"),
        ({"elsewhere": {"namespaceSelector": labels(team="b"), "podSelector": labels(app="train")}}, None),
    ],
)
def test_the_most_specific_policy_applies(policies: dict[str, Json], chosen: str | None) -> None:
    several = [policy(name, **spec) for name, spec in policies.items()]
    for order in (several, several[::-1]):
        found = most_specific(order, {"team": "a"}, {"app": "train", "index": "1"})
        assert (found.name if found else None) == chosen


@pytest.mark.parametrize(
    ("operator", "values", "of", "selected"),
    [
        ("In", ["a", "b"], {"k": "a"}, True),
        ("In", ["a"], {}, False),
        ("NotIn", ["a"], {"k": "a"}, False),
        ("NotIn", ["a"], {}, True),
        ("Exists", [], {"k": ""}, True),
        ("Exists", [], {}, False),
        ("DoesNotExist", [], {"k": "a"}, False),
        ("DoesNotExist", [], {}, True),
    ],
)
def test_selectors_are_those_of_kubernetes(
    operator: str, values: list[str], of: dict[str, str], selected: bool
) -> None:
    expression = {"key": "k", "operator": operator, "values": values}
    one = policy(podSelector={"matchExpressions": [expression]})
    assert (most_specific([one], {}, of) is one) is selected


def test_without_a_policy_it_is_as_asked_or_as_ever() -> None:
    assert settle(wish(), AppliedPolicy()) == MoveSettings()
    asked = {"mode": "stop", "allowPostCopy": True, "maxDowntime": "9s", "timeout": "3h", "bandwidth": "1Gi"}
    assert settle(wish(**asked), AppliedPolicy()) == MoveSettings.model_validate({"policy": "", **asked})


@pytest.mark.parametrize(
    ("spec", "asked", "settled"),
    [
        ({"modes": ["stop", "live"]}, {}, {"mode": "stop"}),
        ({"modes": ["stop", "live"]}, {"mode": "live"}, {"mode": "live"}),
        ({"modes": ["postcopy", "live"], "allowPostCopy": False}, {}, {"mode": "live"}),
        ({"allowPostCopy": True, "allowAutoConverge": True}, {}, {"allowPostCopy": True, "allowAutoConverge": True}),
        ({"allowPostCopy": True}, {"allowPostCopy": False}, {}),
        ({"maxDowntime": "300ms"}, {}, {"maxDowntime": "300ms"}),
        ({"maxDowntime": "300ms"}, {"maxDowntime": "1s"}, {"maxDowntime": "300ms"}),
        ({"maxDowntime": "1s"}, {"maxDowntime": "300ms"}, {"maxDowntime": "300ms"}),
        ({"timeout": "2h"}, {}, {"timeout": "2h"}),
        ({"timeout": "10m"}, {"timeout": "1h"}, {"timeout": "10m"}),
        ({"maxFreeze": "2s"}, {"maxFreeze": "3s"}, {"maxFreeze": "2s"}),
        ({"bandwidth": "50Mi"}, {"bandwidth": "1Gi"}, {"bandwidth": "50Mi"}),
        ({"bandwidthPerNode": "100M", "parallelPerNode": 4}, {}, {"bandwidth": "25000000"}),
        ({"bandwidthPerNode": "100M", "parallelPerNode": 4, "bandwidth": "1M"}, {}, {"bandwidth": "1M"}),
        ({"ttlSecondsAfterFinished": 5}, {}, {"ttlSecondsAfterFinished": 5}),
        ({"connections": "Require"}, {}, {"connections": "Require"}),
        ({"connections": "Require"}, {"connections": "Close"}, {"connections": "Close"}),
        ({}, {"connections": "Require"}, {"connections": "Require"}),
        ({}, {}, {"connections": "Close"}),
    ],
)
def test_what_is_not_asked_is_the_policys_and_what_is_beyond_it_comes_down(
    spec: Json, asked: Json, settled: Json
) -> None:
    assert settle(wish(**asked), applied(**spec)) == MoveSettings.model_validate({"policy": "p", **settled})


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ({"movable": False}, {}),
        ({"modes": ["live"]}, {"mode": "stop"}),
        ({"allowPostCopy": False}, {"allowPostCopy": True}),
        ({"allowPostCopy": False}, {"mode": "postcopy"}),
        ({"allowAutoConverge": False}, {"allowAutoConverge": True}),
    ],
)
def test_what_a_policy_does_not_allow_is_refused_in_its_name(spec: Json, asked: Json) -> None:
    found = settle(wish(**asked), applied(**spec, ttlSecondsAfterFinished=7))
    assert isinstance(found, PodUnfit)
    assert (found.reason, "MigrationPolicy p" in str(found), bool(found.remedy)) == ("ForbiddenByPolicy", True, True)
    noted = known(found, applied(**spec, ttlSecondsAfterFinished=7))
    assert (noted.policy, noted.ttl_seconds_after_finished) == ("p", 7)


@pytest.mark.parametrize(
    ("spec", "annotation", "deadline"),
    [
        ({}, None, DEADLINE),
        ({}, "20m", "20m"),
        ({}, "no duration", DEADLINE),
        ({"evictionDeadline": "5m"}, None, "5m"),
        ({"evictionDeadline": "5m"}, "20m", "5m"),
        ({"evictionDeadline": "5m"}, "1m", "1m"),
        ({"podAnnotations": ["priority"]}, "20m", DEADLINE),
    ],
)
def test_a_pod_may_shorten_its_evictions_deadline_where_its_policy_heeds_it(
    spec: Json, annotation: str | None, deadline: str
) -> None:
    pod = {"metadata": {"annotations": {} if annotation is None else {DEADLINE_ANNOTATION: annotation}}}
    assert deadline_of(pod, applied(**spec)) == deadline


@pytest.mark.parametrize(
    ("spec", "found"), [({}, 7), ({"podAnnotations": []}, 0), ({"podAnnotations": ["priority"]}, 7)]
)
def test_a_pods_priority_counts_where_its_policy_heeds_it(spec: Json, found: int) -> None:
    assert priority({"metadata": {"annotations": {PRIORITY_ANNOTATION: "7"}}}, applied(**spec)) == found


def test_a_policy_of_another_release_is_not_guessed_at() -> None:
    assert MigrationPolicySpec.model_validate({"ofTheFuture": 1}).movable
    with pytest.raises(PolicyUnreadable):
        policy(modes=["teleport"])
