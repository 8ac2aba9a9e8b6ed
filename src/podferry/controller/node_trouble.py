"""Nodes that are about to go away: what says so of them, and the NodeDrain that saves what there is time for.

Whoever hears of it, a cloud's termination handler, a node-problem-detector, a person, says it on the Node object: by a taint, a
condition or an annotation. Which of them count, and how long a node then has, are `Trigger`s. `TRIGGERS` are those of large clouds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog

from podferry.controller.status_writer import clock
from podferry.errors import PodferryError, UsageError
from podferry.kube.api_errors import Conflict, ObjectAlreadyExists, ObjectNotFound
from podferry.kube.cache import Cache
from podferry.kube.client import NODE_DRAINS, NODES, Json
from podferry.kube.drain import NODE_ANNOTATIONS, TROUBLE_ANNOTATION, NodeDrain
from podferry.kube.events import Events
from podferry.kube.quantities import seconds, timestamp

AGAIN = 0.5


@dataclass(frozen=True)
class Trigger:
    """A taint, condition or annotation (`kind`) of this `key` says that its node goes away in so many seconds."""

    kind: str
    key: str
    seconds: float


TRIGGERS = (
    # aws-node-termination-handler with its taints on: EC2 takes a spot instance two minutes after it has said so.
    Trigger("taint", "aws-node-termination-handler/spot-itn", 120.0),
    # GKE: preemptible and spot machines have 25 s for pods that are not critical.
    Trigger("taint", "cloud.google.com/impending-node-termination", 25.0),
    # AKS: its node-problem-detector reads the scheduled events; a preemption comes 30 s later at the earliest, a termination 5 min.
    Trigger("condition", "PreemptScheduled", 30.0),
    Trigger("condition", "TerminateScheduled", 300.0),
)


@dataclass(frozen=True)
class GoingAway:
    """A mark on a Node object that announces its end. `identity` stays the same as long as the mark does."""

    identity: str
    deadline: datetime


def trigger_of(text: str) -> Trigger:
    """`KIND:KEY=TIME`, e.g. taint:example.com/going=2m. Raises `UsageError`."""
    what, _, time = text.rpartition("=")
    kind, _, key = what.partition(":")
    try:
        if kind in ("taint", "condition", "annotation") and key:
            return Trigger(kind, key, seconds(time))
    except ValueError:
        pass
    raise UsageError(
        f"{text!r} is no trouble of a node", why="it is KIND:KEY=TIME", remedy="taint:example.com/going=2m, say"
    )


def trouble_of(node: Json, triggers: Sequence[Trigger], now: datetime) -> GoingAway | None:
    """The trouble that comes first; None where the node has none."""
    found = [*_by_hand(node, now), *(one for trigger in triggers for one in _seen(node, trigger, now))]
    return min(found, key=lambda one: one.deadline, default=None)


def _seen(node: Json, trigger: Trigger, now: datetime) -> Iterator[GoingAway]:
    after = timedelta(seconds=trigger.seconds)
    match trigger.kind:
        case "taint":
            for one in (node.get("spec") or {}).get("taints") or []:
                if one["key"] == trigger.key:
                    since, value = one.get("timeAdded"), one.get("value")
                    name = (
                        f"taint {trigger.key}" + (f"={value}" if value else "") + (f" since {since}" if since else "")
                    )
                    yield GoingAway(name, (_time(since) or now) + after)
        case "condition":
            for one in (node.get("status") or {}).get("conditions") or []:
                if one["type"] == trigger.key and one["status"] == "True":
                    since = one.get("lastTransitionTime")
                    yield GoingAway(f"condition {trigger.key} since {since}", (_time(since) or now) + after)
        case _:
            value = (node["metadata"].get("annotations") or {}).get(trigger.key)
            if value is not None:
                yield GoingAway(f"annotation {trigger.key}={value[:200]}", _time(value) or now + after)


def _by_hand(node: Json, now: datetime) -> Iterator[GoingAway]:
    """podferry's own annotations, a person's and its agent's, say when: a time, or from now on."""
    for name in NODE_ANNOTATIONS:
        value = (node["metadata"].get("annotations") or {}).get(name)
        if value is None:
            continue
        when = _time(value)
        with contextlib.suppress(ValueError):
            when = when or now + timedelta(seconds=seconds(value))
        if when is None:
            structlog.get_logger().warning(
                "not a time", node=node["metadata"]["name"], annotation=name, value=value[:200]
            )
        else:
            yield GoingAway(f"annotation {name}={value[:200]}", when)


def _time(text: Any) -> datetime | None:
    try:
        found = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


class NodeTroubles:
    """Begins drains of nodes in trouble. Remembers nothing: which trouble a NodeDrain is about stands in its annotation."""

    def __init__(self, api: Cache, triggers: Sequence[Trigger] = TRIGGERS) -> None:
        self._api, self._triggers = api, triggers
        self._events = Events(api, "podferry-controller")
        self._log = structlog.get_logger()

    async def step(self, name: str) -> float | None:
        """Take the next step for the node of this name. Returns the seconds until the next look, or None to wait for a change."""
        node = self._api.store(NODES).get("", name)
        known = self._api.store(NODE_DRAINS).get("", name)
        failure = trouble_of(node, self._triggers, clock()) if node is not None else None
        drain = NodeDrain.from_json(known) if known is not None else None
        try:
            if node is None or failure is None:
                await self._over(drain)
            elif drain is None:
                await self._begin(node, failure)
            elif drain.about != failure.identity and drain.ended:
                await self._api.delete(NODE_DRAINS, name, uid=drain.uid)
                return AGAIN
            elif drain.about != failure.identity:
                await self._hurry(drain, failure)
        except (Conflict, ObjectNotFound, ObjectAlreadyExists):
            return AGAIN  # somebody was faster: the watch has to bring it
        return None

    async def _begin(self, node: Json, failure: GoingAway) -> None:
        about = node["metadata"]
        spec = {"deadline": timestamp(failure.deadline), "cause": failure.identity}
        annotations = {TROUBLE_ANNOTATION: failure.identity}
        await self._api.create(
            NODE_DRAINS, {"metadata": {"name": about["name"], "annotations": annotations}, "spec": spec}
        )
        self._log.warning("a node goes away", node=about["name"], because=failure.identity, deadline=spec["deadline"])
        subject = {"apiVersion": NODES.api, "kind": NODES.kind, "metadata": about}
        words = f"{failure.identity}: its pods are moved until {spec['deadline']}"
        with contextlib.suppress(PodferryError):
            await self._events.publish(subject, "DrainBegins", words, warning=True)

    async def _hurry(self, drain: NodeDrain, failure: GoingAway) -> None:
        """Somebody drains the node already: now there is a deadline, or a sooner one. Whether it was stopped is left as it is."""
        sooner = [failure.deadline, *([_time(drain.spec.deadline)] if drain.spec.deadline else [])]
        deadline = min(one for one in sooner if one is not None)
        patch = {
            "metadata": {"annotations": {TROUBLE_ANNOTATION: failure.identity}},
            "spec": {"deadline": timestamp(deadline)},
        }
        await self._api.patch(NODE_DRAINS, drain.name, patch, uid=drain.uid)

    async def _over(self, drain: NodeDrain | None) -> None:
        """The trouble is over: the next one is another, also where it looks the same. A drain that has begun goes on."""
        if drain is not None and drain.ended and drain.about:
            patch = {"metadata": {"annotations": {TROUBLE_ANNOTATION: None}}}
            await self._api.patch(NODE_DRAINS, drain.name, patch, uid=drain.uid)
