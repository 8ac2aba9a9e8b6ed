"""One NodeDrain, one step: look at the node, its pods and their Migrations as they are now, do what `core.drain` says comes next.

Nothing is remembered between steps: the state is the objects'. A controller that was killed anywhere goes on from them.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import structlog

from podferry.controller import eligibility, failures, pods
from podferry.controller.eligibility import PodUnfit
from podferry.controller.measuring import expected, measured_moves, work_of
from podferry.controller.policies import AppliedPolicy, Policies, settle
from podferry.controller.status_writer import clock
from podferry.controller.surroundings import Surveyor
from podferry.core.drain import DrainedPod, DrainPhase, DrainPlan, PodState, plan
from podferry.core.estimate import together
from podferry.core.migration import MigrationPhase
from podferry.errors import PodferryError
from podferry.kube.api_errors import ApiFailed, Conflict, ObjectNotFound
from podferry.kube.client import MIGRATIONS, NODE_DRAINS, NODES, PODS, Api, Fields, Json, Labels, ResourceKind
from podferry.kube.drain import MOST_PODS, PRIORITY_ANNOTATION, NodeDrain, PodDrain
from podferry.kube.events import Events
from podferry.kube.migration import API_VERSION, ROLE_LABEL, Migration, MigrationSpec
from podferry.kube.policy import PodWish
from podferry.kube.quantities import duration, timestamp

POLL_AGAIN = 3.0
SHORTENED = 200
"""Characters of a pod's name that are part of its Migration's."""
STAYING_OWNERS = frozenset({"DaemonSet", "Node"})
MIRROR = "kubernetes.io/config.mirror"


class DrainView:
    """The API server for the length of one step: an object that several pods share is read once."""

    def __init__(self, api: Api) -> None:
        self._api, self._known = api, dict[Any, Any]()

    async def find(self, kind: ResourceKind, name: str, namespace: str = "") -> Json | None:
        """As `Api.find`, once."""
        key = kind, name, namespace
        if key not in self._known:
            self._known[key] = await self._api.find(kind, name, namespace)
        found: Json | None = self._known[key]
        return found

    async def list(
        self, kind: ResourceKind, namespace: str = "", *, labels: Labels | None = None, fields: Fields | None = None
    ) -> Any:
        """As `Api.list`, once."""
        key = kind, namespace, *((labels or {}).items()), *((fields or {}).items())
        if key not in self._known:
            self._known[key] = await self._api.list(kind, namespace, labels=labels, fields=fields)
        return self._known[key]


class Drains:
    """Takes NodeDrains from wherever they are to their end."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._events = Events(api, "podferry-controller")
        self._log = structlog.get_logger()

    async def step(self, name: str) -> float | None:
        """Take the next step. Returns the seconds until the next look, or None to wait for a change."""
        body = await self._api.find(NODE_DRAINS, name)
        if body is None or "deletionTimestamp" in body["metadata"]:
            return None  # its Migrations go with it: they are its own
        drain = NodeDrain.from_json(body)
        if drain.ended:
            return None
        try:
            return await self._step(drain)
        except Conflict:
            return 0.0  # somebody was faster; look again

    async def _step(self, drain: NodeDrain) -> float | None:
        before = drain.status.model_copy(deep=True)
        node = await self._api.find(NODES, drain.name)
        if node is None:
            await self._node_gone(drain)
            return None
        drain.status.start_time = drain.status.start_time or timestamp()
        if not drain.spec.stop:
            await self._cordon(drain, node)
        migrations = [Migration.from_json(one) for one in (await self._api.list(MIGRATIONS))[0]]
        here = await self._pods(drain.name)
        found = await self._judge(drain, here, migrations)
        spec = drain.spec
        left = None if spec.deadline is None else -failures.age(spec.deadline, clock())
        what = plan(found, parallel=spec.parallel, evict_others=spec.evict_others, stopped=spec.stop, left=left)
        late = {one.uid for one in drain.status.pods if one.may_be_late}
        _tell(drain, here, migrations, what)
        for uid in what.late - late:
            await self._warn(drain, here[uid])
        for uid in what.move:
            await self._move(drain, here[uid])
        for uid in what.evict:
            await self._evict(drain, here[uid])
        if drain.status != before:
            drain = NodeDrain.from_json(await self._api.replace(NODE_DRAINS, drain.to_json(), "status"))
        if drain.ended:
            await self._announce(drain)
            return None
        return POLL_AGAIN

    async def _cordon(self, drain: NodeDrain, node: Json) -> None:
        if not node["spec"].get("unschedulable"):
            about = {"resourceVersion": node["metadata"]["resourceVersion"]}
            cordon = {"metadata": about, "spec": {"unschedulable": True}}
            await self._api.patch(NODES, drain.name, cordon, uid=node["metadata"]["uid"])
            self._log.info("cordoned", node=drain.name)
        drain.status.set_condition("Cordoned", True, "Unschedulable", f"kubectl uncordon {drain.name} undoes it")

    async def _pods(self, node: str) -> dict[str, Json]:
        """The pods that have to leave the node, by uid."""
        found, _ = await self._api.list(PODS, fields={"spec.nodeName": node})
        return {one["metadata"]["uid"]: one for one in found if has_to_leave(one)}

    async def _judge(self, drain: NodeDrain, here: dict[str, Json], migrations: list[Migration]) -> list[DrainedPod]:
        view = DrainView(self._api)
        survey, policies = Surveyor(view), Policies(view)
        judged = [await self._judge_pod(drain, pod, migrations, survey, policies) for pod in here.values()]
        took = _seconds(here, migrations)
        judged = [replace(one, work=work_of(here[one.uid], clock()), seconds=took[one.uid]) for one in judged]
        # The source is gone before its Migration has ended: until then the pod has not moved.
        gone = [one for one in drain.status.pods if one.uid not in here]
        return judged + [
            DrainedPod(one.uid, moving=True) for one in gone if any(not m.ended for m in _of(one.uid, migrations))
        ]

    async def _judge_pod(
        self, drain: NodeDrain, pod: Json, migrations: list[Migration], survey: Surveyor, policies: Policies
    ) -> DrainedPod:
        about, status = pod["metadata"], pod.get("status") or {}
        labels = about.get("labels") or {}
        of_pod = [one for one in migrations if _moves(one, pod)]
        failed = [one for one in of_pod if one.ended and _belongs(one, drain)]
        moving, settling = any(not one.ended for one in of_pod), ""
        if "deletionTimestamp" in about:
            settling = "it is being deleted"
        elif labels.get(ROLE_LABEL) in (pods.TARGET, pods.PLACEHOLDER):
            live = any(not one.ended and pods.made_by(pod, one) for one in migrations)
            settling = "it is just arriving" * live
        obstacles = [] if settling or moving else eligibility.obstacles(pod, await survey.around(pod))
        policy = await policies.of(pod)
        if (
            not obstacles
            and not (settling or moving)
            and isinstance(no := settle(wishes_of(drain, pod), policy), PodUnfit)
        ):
            obstacles = [no]
        return DrainedPod(
            about["uid"],
            started=str(status.get("startTime") or ""),
            priority=priority(pod, policy),
            obstacle="; ".join(str(one) for one in obstacles),
            moving=moving,
            settling=settling,
            attempts=len(failed),
            failure=_reason(failed),
        )

    async def _move(self, drain: NodeDrain, pod: Json) -> None:
        about = pod["metadata"]
        spec = wishes_of(drain, pod).model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
        owner = {
            "apiVersion": API_VERSION,
            "kind": drain.kind,
            "name": drain.name,
            "uid": drain.uid,
            "controller": True,
        }
        body: Json = {
            "metadata": {"generateName": f"drain-{about['name'][:SHORTENED]}-", "ownerReferences": [owner]},
            "spec": spec,
        }
        made = await self._api.create(MIGRATIONS, body, about["namespace"])
        self._log.info("moves", node=drain.name, pod=about["name"], migration=made["metadata"]["name"])

    async def _warn(self, drain: NodeDrain, pod: Json) -> None:
        """Warn the pod's owner, who may still save the job's state."""
        when = f"{drain.name} goes away at {drain.spec.deadline}"
        words = f"{when}, and other pods save more until then: the move of this one may be too late"
        with contextlib.suppress(PodferryError):
            await self._events.publish(pods.reference(pod), "MayBeTooLate", words, warning=True)

    async def _evict(self, drain: NodeDrain, pod: Json) -> None:
        about = pod["metadata"]
        listed = next(one for one in drain.status.pods if one.uid == about["uid"])
        try:
            await self._api.evict(about["name"], about["namespace"], uid=about["uid"])
        except (ObjectNotFound, Conflict):
            return
        except ApiFailed as refused:  # a PodDisruptionBudget, most often: it is asked again
            listed.message = f"{listed.message}; the eviction was refused: {refused.why}"
        else:
            await self._events.publish(
                pods.reference(pod), "EvictedByDrain", f"{drain.name} is drained: {listed.message}"
            )

    async def _node_gone(self, drain: NodeDrain) -> None:
        drain.status.phase, drain.status.summary = DrainPhase.INCOMPLETE, f"there is no node {drain.name}"
        drain.status.completion_time = timestamp()
        drain.status.set_condition("Completed", False, "NodeNotFound", drain.status.summary)
        await self._api.replace(NODE_DRAINS, drain.to_json(), "status")

    async def _announce(self, drain: NodeDrain) -> None:
        done = drain.status.phase is DrainPhase.COMPLETED
        reason = "NodeDrained" if done else "NodeDrainIncomplete"
        with contextlib.suppress(PodferryError):
            await self._events.publish(drain.to_json(), reason, drain.status.summary, warning=not done)
        self._log.info("drain ended", node=drain.name, phase=str(drain.status.phase), summary=drain.status.summary)


def has_to_leave(pod: Json) -> bool:
    """Whether a drain has to do with the pod: what belongs to its node stays, and what has ended computes no more."""
    about = pod["metadata"]
    owner = eligibility.controller_of(pod)
    return not (
        MIRROR in (about.get("annotations") or {})
        or (owner is not None and eligibility.kind_of_owner(owner) in STAYING_OWNERS)
        or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
    )


def _moves(migration: Migration, pod: Json) -> bool:
    """Whether it is, or was, this very pod that the Migration moves."""
    about, source = pod["metadata"], migration.status.source_pod
    if migration.namespace != about["namespace"]:
        return False
    return bool(source.uid == about["uid"] if source is not None else migration.spec.pod_name == about["name"])


def _belongs(migration: Migration, drain: NodeDrain) -> bool:
    owners = migration.metadata.get("ownerReferences") or []
    return any(one["uid"] == drain.uid and one.get("controller") for one in owners)


def wishes_of(drain: NodeDrain, pod: Json) -> MigrationSpec:
    """The spec of the Migration that the drain creates for the pod."""
    wishes = {"mode", "timeout", "allow_post_copy", "allow_auto_converge", "requested_by"}
    return MigrationSpec(pod_name=pod["metadata"]["name"], **drain.spec.model_dump(include=wishes, exclude_none=True))


def priority(pod: Json, policy: AppliedPolicy) -> int:
    """The pod's own wish, where it is a number and its policy heeds it; a wish that is none changes nothing."""
    if not policy.heeds(PodWish.PRIORITY):
        return 0
    try:
        return int((pod["metadata"].get("annotations") or {}).get(PRIORITY_ANNOTATION, "0"))
    except ValueError:
        return 0


def _reason(failed: list[Migration]) -> str:
    if not failed:
        return ""
    last = max(failed, key=lambda one: str(one.metadata.get("creationTimestamp")))
    return last.status.ending.message if last.status.ending else str(last.status.phase)


def _tell(drain: NodeDrain, here: dict[str, Json], migrations: list[Migration], what: DrainPlan) -> None:
    """Write into the status what became of the pods, those that have left included."""
    status = drain.status
    known = {one.uid: one for one in status.pods}
    for uid, (state, message) in what.states.items():
        if uid not in known:
            about = here[uid]["metadata"]
            known[uid] = PodDrain(namespace=about["namespace"], name=about["name"], uid=uid, state=state)
        known[uid].state, known[uid].message = state, message[:1000]
        known[uid].may_be_late = uid in what.late
        if taken_up := _of(uid, migrations):
            known[uid].migration = taken_up[-1].name
            if state is PodState.MOVING:
                known[uid].message = _far(taken_up[-1])
    for uid, one in known.items():
        if uid not in what.states and one.state not in (PodState.MOVED, PodState.GONE):
            _has_left(one, migrations)
    status.pods = list(known.values())[:MOST_PODS]
    status.total, status.left = len(known), len(what.states)
    status.moved = sum(one.state is PodState.MOVED for one in known.values())
    status.phase = what.phase
    status.remaining = _remaining(drain, here, migrations, what)
    counts = {state: sum(one.state is state for one in known.values()) for state in PodState}
    status.summary = ", ".join(f"{count} {state.lower()}" for state, count in counts.items() if count) or "no pods"
    if drain.ended:
        completed = status.phase is DrainPhase.COMPLETED
        status.completion_time = timestamp()
        status.set_condition("Completed", completed, "NodeEmpty" if completed else "PodsLeft", status.summary)


def _far(migration: Migration) -> str:
    """How far a move is, in a few words."""
    status = migration.status
    return (status.progress.summary if status.progress else "") or str(status.message or status.phase)


def _seconds(here: dict[str, Json], migrations: list[Migration]) -> dict[str, float | None]:
    """How long the move of each pod will take, or of one under way still will; None where nothing tells."""
    earlier, found = measured_moves(migrations), dict[str, float | None]()
    for uid, pod in here.items():
        whole = expected(pod, earlier)
        begun = [m.status.start_time for m in _of(uid, migrations) if not m.ended and m.status.start_time]
        passed = sum(failures.age(since, clock()) for since in begun[:1])
        found[uid] = None if whole is None else max(0.0, whole.seconds - passed)
    return found


def _remaining(drain: NodeDrain, here: dict[str, Json], migrations: list[Migration], what: DrainPlan) -> str:
    """Notes of each pod how long its move will take; returns how long all that are left will, and nothing where nothing tells."""
    earlier, took, left = measured_moves(migrations), _seconds(here, migrations), []
    for one in drain.status.pods:
        if one.uid not in here or one.state not in (PodState.WAITING, PodState.MOVING):
            continue
        whole, still = expected(here[one.uid], earlier), took[one.uid]
        one.estimate = duration(whole.seconds) if whole is not None else ""
        left += [still] if still is not None else []
    return duration(together(left, drain.spec.parallel)) if left and what.phase is DrainPhase.DRAINING else ""


def _has_left(one: PodDrain, migrations: list[Migration]) -> None:
    """The pod is on the node no more: whether it moved, its Migrations say."""
    moved = next((m for m in _of(one.uid, migrations) if m.status.phase is MigrationPhase.COMPLETED), None)
    if moved is None:
        one.state = PodState.GONE
        return
    one.state, one.message, one.migration = PodState.MOVED, "", moved.name
    one.node, one.downtime = moved.status.target_node or "", moved.status.downtime or ""


def _of(uid: str, migrations: list[Migration]) -> list[Migration]:
    """The Migrations that have taken this pod up, the oldest first."""
    found = [one for one in migrations if one.status.source_pod is not None and one.status.source_pod.uid == uid]
    return sorted(found, key=lambda one: str(one.metadata.get("creationTimestamp")))
