"""Whether each pod that opted in can move now, said on the pod itself: the condition `PodferryMovable`, looked at again rarely.

Whoever waits for a node to be emptied, or asks why his job was evicted, finds it where he looks first. A pod that asks by its label
to be moved and runs without podferry's RuntimeClass was missed: it is told so by an event, once, and counted.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from enum import StrEnum

import anyio
import structlog

from podferry.controller import eligibility, pods
from podferry.controller.drains import DrainView, has_to_leave
from podferry.controller.policies import Policies, forbids
from podferry.controller.surroundings import Surveyor
from podferry.errors import PodferryError
from podferry.kube.api_errors import Conflict, ObjectNotFound
from podferry.kube.client import NAMESPACES, PODS, RUNTIME_CLASSES, Api, Json
from podferry.kube.events import Events
from podferry.kube.migration import GROUP, UID_LABEL
from podferry.kube.quantities import timestamp

MOVABLE = "PodferryMovable"
OPT_IN = f"{GROUP}/opt-in"
"""On a pod, or on its namespace: `true` lets deploy/opt-in set the RuntimeClass."""
FIRST = 20.0
PAUSE = 0.05
"""Seconds between two pods: what is not urgent leaves the API server to others."""
LONGEST = 2000


class OptedIn(StrEnum):
    """The state of a pod that opted in, for the metric."""

    MOVABLE = "movable"
    HELD = "held"
    MISSED = "missed"


class Movability:
    """Checks every pod of the cluster, some hundred at a time, and says of those that opted in whether they can move."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._events = Events(api, "podferry-controller")
        self._log = structlog.get_logger()
        self._told: set[str] = set()
        self.counted: Counter[OptedIn] = Counter()
        """Pods that opted in, as they were found the last time."""

    def counted_as(self, state: OptedIn) -> float:
        """How many were found to be so."""
        return float(self.counted[state])

    async def run(self, every: float) -> None:
        """For ever, each `every` seconds."""
        await anyio.sleep(min(FIRST, every))
        while True:
            try:
                await self.sweep()
            except PodferryError as error:
                self._log.warning("whether pods can move cannot be said now", error=str(error))
            await anyio.sleep(every)

    async def sweep(self) -> None:
        """Check all of them once."""
        found, seen = Counter[OptedIn](), set[str]()
        async for page, _ in self._api.pages(PODS):
            view = DrainView(self._api)
            survey, policies = Surveyor(view), Policies(view)
            for pod in page:
                if not has_to_leave(pod) or "deletionTimestamp" in pod["metadata"]:
                    continue
                if await self._runs_under_us(pod, view):
                    obstacles = eligibility.obstacles(pod, await survey.around(pod))
                    no = forbids(await policies.of(pod))
                    kind = await self._say(pod, obstacles + ([no] if no is not None else []))
                elif await self._asks(pod, view):
                    kind = OptedIn.MISSED
                    await self._miss(pod)
                else:
                    continue
                found[kind] += 1
                seen.add(pod["metadata"]["uid"])
                await anyio.sleep(PAUSE)
        self.counted, self._told = found, self._told & seen

    async def _runs_under_us(self, pod: Json, view: DrainView) -> bool:
        name = pod["spec"].get("runtimeClassName")
        if not name:
            return False
        found = await view.find(RUNTIME_CLASSES, name)
        return found is not None and found.get("handler") == eligibility.HANDLER

    async def _asks(self, pod: Json, view: DrainView) -> bool:
        """The pod's own label goes before its namespace's."""
        own = (pod["metadata"].get("labels") or {}).get(OPT_IN)
        if own is not None:
            return bool(own == "true")
        namespace = await view.find(NAMESPACES, pod["metadata"]["namespace"])
        return ((namespace or {}).get("metadata", {}).get("labels") or {}).get(OPT_IN) == "true"

    async def _say(self, pod: Json, obstacles: list[eligibility.PodUnfit]) -> OptedIn:
        about, status = pod["metadata"], pod.get("status") or {}
        kind = OptedIn.HELD if obstacles else OptedIn.MOVABLE
        if UID_LABEL in (about.get("labels") or {}):
            return kind  # it moves: what is said of it now would be old in a moment
        new = {
            "type": MOVABLE,
            "status": str(not obstacles),
            "reason": obstacles[0].reason if obstacles else "NothingInTheWay",
            "message": "; ".join(str(one) for one in obstacles)[:LONGEST],
        }
        conditions = status.get("conditions") or []
        old = next((one for one in conditions if one["type"] == MOVABLE), None)
        if old is not None and all(old.get(name, "") == value for name, value in new.items()):
            return kind
        same = old is not None and old["status"] == new["status"]
        new["lastTransitionTime"] = old["lastTransitionTime"] if old is not None and same else timestamp()
        body = {
            "metadata": {name: about[name] for name in ("resourceVersion", "uid")},
            "status": {"conditions": [*(one for one in conditions if one["type"] != MOVABLE), new]},
        }
        with contextlib.suppress(Conflict, ObjectNotFound):  # it has changed just now: the next time, then
            await self._api.patch(PODS, about["name"], body, about["namespace"], uid=about["uid"], part="status")
        return kind

    async def _miss(self, pod: Json) -> None:
        """Why it was left alone, as far as it says itself."""
        if pod["metadata"]["uid"] in self._told:
            return
        self._told.add(pod["metadata"]["uid"])
        name = pod["spec"].get("runtimeClassName")
        others = [
            one
            for one in eligibility.obstacles(pod, await Surveyor(self._api).around(pod))
            if one.reason not in PASSING
        ]
        if name:
            why = f"its runtimeClassName is {name}"
        elif others:
            why = "; ".join(str(one) for one in others)
        else:
            why = "it was made before the label was set, or deploy/opt-in is not installed; its next start can opt in"
        words = f"it asks to be moved by {OPT_IN} and runs without podferry's RuntimeClass: {why}"
        await self._events.publish(pods.reference(pod), "NotOptedIn", words, warning=True)


PASSING = frozenset({"RuntimeClassMissing", "PodNotRunning", "ContainerNotRunning", "InitContainerRunning"})
"""Reasons that do not tell why a pod was left alone when it was made."""
