"""A small cluster for the controller: an API server, two nodes, and their kubelets and agents played by the test.

On the fake API server the scheduler is played too. Owners' controllers are never played: what they do is only shown
by the real ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import anyio
from anyio.abc import TaskGroup

from podferry.controller.patience import ControllerSettings
from podferry.controller.pods import TARGET
from podferry.controller.program import Controller
from podferry.kube import status as store
from podferry.kube.api_errors import ApiFailed, ApiUnreachable, Conflict, ObjectNotFound
from podferry.kube.client import MIGRATIONS, NAMESPACES, NODES, PODS, RUNTIME_CLASSES, Api, Json, ResourceKind
from podferry.kube.migration import (
    HANDED_OVER,
    HANDED_OVER_ANNOTATION,
    RESUMED,
    ROLE_LABEL,
    TARGET_CREATED,
    TARGET_READY,
    TARGET_REQUESTED,
    Ending,
    EnginePhases,
    Migration,
)
from podferry.kube.quantities import timestamp
from podferry.kube.watch import follow

from .fake import FakeApiServer
from .portrait import name_of, portrait

ACCOUNTS = ResourceKind("v1", "ServiceAccount", "serviceaccounts")
PATIENCE = 60.0
QUICK = ControllerSettings(image="pause", scheduling=3.0, silence=20.0, readiness=10.0, farewell=4.0, removal=3.0)


@dataclass
class World:
    """A namespace with what lives in it."""

    api: Api
    namespace: str
    tasks: TaskGroup
    fake: FakeApiServer | None = None
    nodes: list[str] = field(default_factory=list)
    resumed: set[str] = field(default_factory=set)
    also: list[tuple[ResourceKind, str]] = field(default_factory=list)
    """What is of no namespace and goes with it."""
    answers: bool = True
    """Whether jobs answer the startup probes of kubelets."""

    @classmethod
    @asynccontextmanager
    async def open(cls, api: Api, namespace: str, fake: FakeApiServer | None = None) -> AsyncIterator[Self]:
        """Ready for pods; everything in it goes at the end."""
        async with anyio.create_task_group() as tasks:
            world = cls(api, namespace, tasks, fake)
            await world._set_up()
            tasks.start_soon(world._kubelets)
            if fake is not None:
                tasks.start_soon(world._scheduler)
            try:
                yield world
            finally:
                tasks.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    await world._tear_down()

    async def _set_up(self) -> None:
        await self.api.create(NAMESPACES, {"metadata": {"name": self.namespace}})
        if self.fake is not None:
            await self.api.create(RUNTIME_CLASSES, {"metadata": {"name": "podferry"}, "handler": "podferry"})
        for letter in "ab":
            name = f"{self.namespace}-{letter}"
            self.nodes.append(name)
            await self.api.create(NODES, {"metadata": {"name": name}, "spec": {}})
            room = {"cpu": "4", "memory": "8Gi", "pods": "110"}
            status = {
                "conditions": [
                    {"type": "Ready", "status": "True", "reason": "Played", "lastTransitionTime": timestamp()}
                ],
                "addresses": [{"type": "InternalIP", "address": f"10.1.0.{ord(letter)}"}],
                "capacity": room,
                "allocatable": room,
            }
            await self.patch(NODES, name, {"status": status}, part="status")
        if self.fake is None:
            await self.until(self._has_account)
            for name in self.nodes:  # the node lifecycle controller, which would take this off, does not run
                await self._untaint(name)

    async def _untaint(self, name: str) -> None:
        await self.patch(NODES, name, {"spec": {"taints": None}})

    async def _has_account(self) -> bool:
        return await self.api.find(ACCOUNTS, "default", self.namespace) is not None

    async def _tear_down(self) -> None:
        for kind in (PODS, MIGRATIONS):
            for one in (await self.api.list(kind, self.namespace))[0]:
                with contextlib.suppress(ApiFailed):
                    if one["metadata"].get("finalizers"):
                        about = {"metadata": {"finalizers": None}}
                        await self.patch(kind, one["metadata"]["name"], about, self.namespace)
                    await self.api.delete(kind, one["metadata"]["name"], self.namespace, grace=0)
        for kind, name in self.also:
            await self.api.delete(kind, name)
        await self.api.delete(NAMESPACES, self.namespace)
        for name in self.nodes:
            await self.api.delete(NODES, name)

    # What the test does.

    def controller(self, settings: ControllerSettings = QUICK) -> anyio.CancelScope:
        """Run a controller. Cancelling the scope kills it."""
        scope = anyio.CancelScope()

        async def run() -> None:
            with scope:
                await Controller(self.api, self.namespace, settings).run()

        self.tasks.start_soon(run)
        return scope

    async def pod(self, name: str = "train", *, labels: Json | None = None, **spec: Any) -> Json:
        """A pod of its own that runs on the first node."""
        body = {
            "metadata": {"name": name, **({"labels": labels} if labels else {})},
            "spec": {
                "nodeName": self.nodes[0],
                "runtimeClassName": "podferry",
                "containers": [{"name": "main", "image": "train", "resources": {"requests": {"cpu": "100m"}}}],
                **spec,
            },
        }
        await self.api.create(PODS, body, self.namespace)
        return await self.running(name)

    async def running(self, name: str) -> Json:
        """The pod, once it runs and is ready."""

        async def runs() -> bool:
            pod = await self.api.find(PODS, name, self.namespace)
            return pod is not None and pod.get("status", {}).get("phase") == "Running"

        await self.until(runs)
        return await self.api.get(PODS, name, self.namespace)

    async def migrate(self, pod: str = "train", name: str = "move", **spec: Any) -> Migration:
        """Ask for a migration."""
        body = {"metadata": {"name": name}, "spec": {"podName": pod, **spec}}
        return Migration.from_json(await self.api.create(MIGRATIONS, body, self.namespace))

    async def has_moved(self, *, mebibytes: int, seconds: int) -> None:
        """Have a pod moved earlier, which is gone by now, in so many seconds (below 60)."""
        await self.migrate("gone", "earlier")
        done = {
            "phase": "Completed",
            "progress": {"bytes": mebibytes << 20},
            "downtime": "300ms",
            "startTime": "2026-11-30T10:00:00Z",
            "completionTime": f"2026-11-30T10:00:{seconds:02}Z",
        }
        await self.patch(MIGRATIONS, "earlier", {"status": done}, self.namespace, part="status")

    async def get(self, name: str = "move") -> Migration:
        """The Migration as it is now."""
        return Migration.from_json(await self.api.get(MIGRATIONS, name, self.namespace))

    async def ended(self, name: str = "move") -> Migration:
        """The Migration once it has ended."""

        async def over() -> bool:
            return (await self.get(name)).ended

        await self.until(over)
        return await self.get(name)

    async def set(self, change: store.Change, name: str = "move") -> Migration:
        """What an agent does: change the status."""
        return await store.change(self.api, await self.get(name), change)

    async def patch(self, kind: ResourceKind, name: str, patch: Json, namespace: str = "", *, part: str = "") -> Json:
        """What a user or a kubelet changes, of whatever has the name."""
        return await self.api.patch(kind, name, patch, namespace, uid=None, part=part)

    async def until(self, holds: Callable[[], Awaitable[bool]], seconds: float = PATIENCE) -> None:
        """Wait until it holds; where it does not, say how everything looks."""
        with anyio.move_on_after(seconds):
            while not await holds():
                await anyio.sleep(0.03)
            return
        looks = await portrait(self.api, self.namespace)
        raise AssertionError(f"it did not come to be within {seconds:.0f} s: {name_of(holds)}\n{looks}")

    async def reached(self, what: Callable[[Migration], bool], name: str = "move") -> Migration:
        """The Migration once `what` is so."""

        async def so() -> bool:
            return what(await self.get(name))

        await self.until(so)
        return await self.get(name)

    # What agents do.

    async def agents_prepare_target(self, name: str = "move") -> Migration:
        """Both agents up to the point where only GO is missing."""
        await self.reached(lambda one: one.status.phase == "Running", name)

        def asked(now: Migration) -> bool:
            now.status.engine = EnginePhases(source="prepare-target", target="receive")
            now.status.set_condition(TARGET_REQUESTED, True, "Converged")
            return True

        await self.set(asked, name)
        await self.reached(lambda one: one.status.holds(TARGET_CREATED), name)

        def prepared(now: Migration) -> bool:
            now.status.set_condition(TARGET_READY, True, "Waiting")
            return True

        return await self.set(prepared, name)

    async def agents_resume(self, name: str = "move", source: str = "commit") -> Migration:
        """GO: the job runs on the target, and its kubelet says so. The source goes on in phase `source`."""
        migration = await self.get(name)
        assert migration.status.target_pod is not None
        self.resumed.add(migration.status.target_pod.uid)
        await self._play(await self.api.get(PODS, migration.status.target_pod.name, self.namespace))

        def resumed(now: Migration) -> bool:
            now.status.engine = EnginePhases(source=source, target="fill")
            now.status.downtime = "42ms"
            now.status.set_condition(RESUMED, True, "Running")
            return True

        return await self.set(resumed, name)

    async def agents_part(self, name: str = "move") -> None:
        """The source's agent waits for the hand-over, kills the frozen original and says that it is done."""
        await self.reached(lambda one: one.status.holds(HANDED_OVER) or one.ended, name)
        await self.agents_end("completed", name)

    async def agents_end(self, outcome: str, name: str = "move", reason: str = "Engine", message: str = "") -> None:
        """The source's agent says how the engine ended."""

        def over(now: Migration) -> bool:
            now.status.engine_ending = Ending(outcome=outcome, reason=reason, message=message)
            return True

        await self.set(over, name)

    async def agents_move(self, name: str = "move") -> None:
        """All of it."""
        await self.agents_prepare_target(name)
        await self.agents_resume(name)
        await self.agents_part(name)

    # What kubelets do.

    async def _kubelets(self) -> None:
        async for what, pod in follow(self.api, PODS, self.namespace):
            if what != "DELETED":
                await _insist(self._play, pod)

    async def _play(self, pod: Json) -> None:
        about, spec = pod["metadata"], pod["spec"]
        if "nodeName" not in spec or spec["nodeName"] not in self.nodes:
            return
        if "deletionTimestamp" in about:
            await self.api.delete(PODS, about["name"], self.namespace, uid=about["uid"], grace=0)
            return
        waits = about.get("labels", {}).get(ROLE_LABEL) == TARGET and HANDED_OVER_ANNOTATION not in (
            about.get("annotations") or {}
        )
        if pod.get("status", {}).get("phase") != "Pending" or (waits and about["uid"] not in self.resumed):
            return
        ready = self.answers or not any("startupProbe" in one for one in spec["containers"])
        await self.report(pod, "Running", {"running": {"startedAt": timestamp()}}, ready=ready)

    async def report(self, pod: Json, phase: str, state: Json, *, ready: bool) -> None:
        """A pod's status as its kubelet would say it."""
        states = [
            {
                "name": one["name"],
                "image": one["image"],
                "imageID": "",
                "ready": ready,
                "started": ready,
                "restartCount": 0,
                "state": state,
            }
            for one in pod["spec"]["containers"]
        ]
        word, now = str(ready), timestamp()
        conditions = [
            {"type": type, "status": word, "lastTransitionTime": now}
            for type in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
        ]
        status = {"phase": phase, "conditions": conditions, "containerStatuses": states, "startTime": now}
        await self.patch(PODS, pod["metadata"]["name"], {"status": status}, self.namespace, part="status")

    async def finish(self, name: str, code: int = 0) -> None:
        """The pod's containers end."""
        pod = await self.api.get(PODS, name, self.namespace)
        ended = {"terminated": {"exitCode": code, "startedAt": timestamp(), "finishedAt": timestamp()}}
        await self.report(pod, "Succeeded" if code == 0 else "Failed", ended, ready=False)

    # What the scheduler does, where it is not there.

    async def _scheduler(self) -> None:
        async for what, pod in follow(self.api, PODS, self.namespace):
            if what == "DELETED" or "nodeName" in pod["spec"]:
                continue
            await _insist(self._schedule, pod)

    async def _schedule(self, pod: Json) -> None:
        if node := self._fitting(pod["spec"]):
            await self.patch(PODS, pod["metadata"]["name"], {"spec": {"nodeName": node}}, self.namespace)
            return
        why = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes fit"}
        if why not in (pod["status"].get("conditions") or []):
            patch = {"status": {"conditions": [why]}}
            await self.patch(PODS, pod["metadata"]["name"], patch, self.namespace, part="status")

    def _fitting(self, spec: Json) -> str | None:
        required = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        (rule,) = required["nodeSelectorTerms"][0]["matchFields"]
        fits = [one for one in self.nodes if (one in rule["values"]) == (rule["operator"] == "In")]
        return None if spec.get("nodeSelector") else next(iter(fits), None)


async def _insist(act: Callable[[Json], Awaitable[None]], pod: Json) -> None:
    """What a kubelet or a scheduler does with a pod, once the API server answers."""
    while True:
        try:
            with contextlib.suppress(Conflict, ObjectNotFound):
                await act(pod)
            return
        except ApiUnreachable:
            await anyio.sleep(0.1)
