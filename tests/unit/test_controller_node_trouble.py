"""What says of a node that it goes away, and when."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest

from podferry.controller.node_trouble import AGAIN, TRIGGERS, NodeTroubles, Trigger, trigger_of, trouble_of
from podferry.controller.program import pruned_node
from podferry.errors import UsageError
from podferry.kube.api_errors import ObjectAlreadyExists
from podferry.kube.cache import Cache
from podferry.kube.drain import BY_ANNOTATION, TROUBLE_ANNOTATION

pytestmark = pytest.mark.unit
NOW = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)
SPOT = "aws-node-termination-handler/spot-itn"
OURS = (*TRIGGERS, Trigger("annotation", "example.com/maintenance", 60.0))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


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


class Cluster:
    """A node and its drain, if any, as the controller remembers them, and what it writes."""

    def __init__(self, node: dict[str, Any] | None, drain: dict[str, Any] | None = None) -> None:
        self._known = {"Node": node, "NodeDrain": drain}
        self.written: list[tuple[str, dict[str, Any]]] = []
        self.faster = False

    def store(self, kind: Any) -> Any:
        return SimpleNamespace(get=lambda namespace, name: self._known[kind.kind])

    async def create(self, kind: Any, body: dict[str, Any], namespace: str = "") -> dict[str, Any]:
        if self.faster:
            raise ObjectAlreadyExists("somebody drains it already")
        self.written.append((f"create {kind.kind}", body))
        return body

    async def patch(self, kind: Any, name: str, patch: dict[str, Any], *, uid: str) -> None:
        assert (kind.kind, name, uid) == ("NodeDrain", "n", "d1")
        self.written.append(("patch", patch))

    async def delete(self, kind: Any, name: str, *, uid: str) -> None:
        assert (kind.kind, name, uid) == ("NodeDrain", "n", "d1")
        self.written.append(("delete", {}))


GOES = {**node(), "metadata": {"name": "n", "uid": "n1", "annotations": {BY_ANNOTATION: "2026-11-30T13:00:00Z"}}}
CAUSE = f"annotation {BY_ANNOTATION}=2026-11-30T13:00:00Z"


def drain(phase: str = "Draining", about: str = "", **spec: Any) -> dict[str, Any]:
    annotations = {TROUBLE_ANNOTATION: about} if about else {}
    return {
        "metadata": {"name": "n", "uid": "d1", "annotations": annotations},
        "spec": spec,
        "status": {"phase": phase},
    }


async def step(cluster: Cluster) -> float | None:
    return await NodeTroubles(cast(Cache, cluster)).step("n")


@pytest.mark.anyio
async def test_a_node_that_goes_away_is_drained_until_then_and_its_event_says_so() -> None:
    cluster = Cluster(GOES)
    assert await step(cluster) is None
    (_, made), (event, said) = cluster.written
    assert made["metadata"] == {"name": "n", "annotations": {TROUBLE_ANNOTATION: CAUSE}}
    assert made["spec"] == {"deadline": "2026-11-30T13:00:00Z", "cause": CAUSE}
    assert (event, said["reason"], said["type"]) == ("create Event", "DrainBegins", "Warning")
    cluster.faster = True
    assert await step(cluster) == AGAIN


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("deadline", "hurried"),
    [
        (None, "2026-11-30T13:00:00Z"),
        ("2026-11-30T14:00:00Z", "2026-11-30T13:00:00Z"),
        ("2026-11-30T12:30:00Z", "2026-11-30T12:30:00Z"),
    ],
)
async def test_a_drain_that_somebody_asked_for_gets_the_sooner_deadline(deadline: str | None, hurried: str) -> None:
    cluster = Cluster(GOES, drain(**({} if deadline is None else {"deadline": deadline})))
    assert await step(cluster) is None
    annotations = {"annotations": {TROUBLE_ANNOTATION: CAUSE}}
    assert cluster.written == [("patch", {"metadata": annotations, "spec": {"deadline": hurried}})]


@pytest.mark.anyio
async def test_a_drain_is_begun_hurried_and_forgotten_once() -> None:
    known = Cluster(GOES, drain(about=CAUSE))
    assert (await step(known), known.written) == (None, [])
    ended = Cluster(GOES, drain("Completed", about="another"))
    assert (await step(ended), ended.written) == (AGAIN, [("delete", {})])
    over = Cluster({**node(), "metadata": {"name": "n"}}, drain("Completed", about=CAUSE))
    assert await step(over) is None
    assert over.written == [("patch", {"metadata": {"annotations": {TROUBLE_ANNOTATION: None}}})]
    for nothing in (drain(about=CAUSE), drain("Completed"), None):
        goes_on = Cluster({**node(), "metadata": {"name": "n"}}, nothing)
        assert (await step(goes_on), goes_on.written) == (None, [])
