"""Evictions become moves: what a request to evict a pod is answered, and the Migration that it begins.

`kubectl drain`, autoscalers and node upgrades ask the eviction API and try again while it answers 429 (Too Many Requests). So a pod
that can move is not evicted: the answer is 429 with how far its move is. A pod that cannot move is evicted as ever; so is one whose
move failed, or has not ended by its deadline: no eviction is blocked for ever.
"""

from __future__ import annotations

import contextlib
import datetime
from dataclasses import dataclass
from typing import Any

import structlog

from podferry.controller import eligibility, failures, pods
from podferry.controller.eligibility import PodUnfit
from podferry.controller.metrics import ControllerMetrics
from podferry.controller.policies import AppliedPolicy, Policies, settle
from podferry.controller.surroundings import Surveyor
from podferry.core.migration import MigrationPhase
from podferry.kube.api_errors import ApiFailed, ObjectAlreadyExists
from podferry.kube.client import MIGRATIONS, PODS, Api
from podferry.kube.migration import (
    CAUSE_LABEL,
    DEADLINE_ANNOTATION,
    NAME_ANNOTATION,
    ROLE_LABEL,
    UID_LABEL,
    Migration,
    MigrationSpec,
    MigrationUnreadable,
)
from podferry.kube.policy import PodWish
from podferry.kube.quantities import seconds

Json = dict[str, Any]

EVICTION = "eviction"
DEADLINE = "1h"
KEPT = 600
"""Seconds that an ended Migration of an eviction stays. So long its failure lets evictions through; then a move is tried again."""
LONGEST_NAME = 200


@dataclass(frozen=True)
class Answer:
    """Whether the eviction may go on, and in words why. A refusal is always one for now."""

    allowed: bool
    why: str = ""


class Evictions:
    """Answers for the API server, and begins moves."""

    def __init__(self, api: Api, account: str, metrics: ControllerMetrics | None = None) -> None:
        """`account` is the controller's own name: what a NodeDrain evicts is not moved."""
        self._metrics = metrics or ControllerMetrics()
        self._api, self._account = api, account
        self._survey, self._policies = Surveyor(api), Policies(api)
        self._log = structlog.get_logger()

    async def review(self, request: Json) -> Json:
        """The response of an admission.k8s.io/v1 review of `pods/eviction`."""
        answer = await self._answer(request)
        self._metrics.evicted(allowed=answer.allowed)
        response: Json = {"uid": request["uid"], "allowed": answer.allowed}
        if not answer.allowed:
            response["status"] = {"code": 429, "reason": "TooManyRequests", "message": answer.why}
        elif answer.why:
            response["warnings"] = [f"podferry: {answer.why}"[:250]]
        return response

    async def _answer(self, request: Json) -> Answer:
        namespace, name, user = request["namespace"], request["name"], str(request["userInfo"]["username"])
        if user == self._account:
            return Answer(True)
        pod = await self._api.find(PODS, name, namespace)
        if pod is None or not pod["spec"].get("runtimeClassName") or not _runs(pod):
            return Answer(True)
        moves, policy = await self._moves(pod), await self._policies.of(pod)
        now = datetime.datetime.now(datetime.UTC)
        if busy := next((one for one in moves if not one.ended), None):
            return _of_move(busy, pod, now, deadline_of(pod, policy))
        if failed := next((one for one in moves if one.metadata.get("labels", {}).get(CAUSE_LABEL) == EVICTION), None):
            why = failed.status.ending.message if failed.status.ending else str(failed.status.phase)
            return Answer(True, f"{name} is evicted, since its move failed: {why}")
        spec = MigrationSpec(pod_name=name, timeout=deadline_of(pod, policy))
        found = eligibility.obstacles(pod, await self._survey.around(pod))
        if isinstance(no := settle(spec, policy), PodUnfit):
            found.append(no)
        if found:
            return Answer(True, f"{name} is evicted, since it cannot move: {'; '.join(map(str, found))}")
        return await self._begin(pod, user, deadline_of(pod, policy), dry=bool(request.get("dryRun")))

    async def _moves(self, pod: Json) -> list[Migration]:
        """The Migrations that have to do with this very pod: of which it is the source, or the target that arrives."""
        about = pod["metadata"]
        found, _ = await self._api.list(MIGRATIONS, about["namespace"], fields={"spec.podName": about["name"]})
        labels, annotations = about.get("labels") or {}, about.get("annotations") or {}
        if labels.get(ROLE_LABEL) == pods.TARGET and (name := annotations.get(NAME_ANNOTATION)):
            arriving = await self._api.find(MIGRATIONS, name, about["namespace"])
            found += [arriving] if arriving is not None else []
        moves = []
        for body in found:
            with contextlib.suppress(MigrationUnreadable):
                moves.append(Migration.from_json(body))
        return [one for one in moves if _is_about(one, about["uid"], str(labels.get(UID_LABEL)))]

    async def _begin(self, pod: Json, user: str, deadline: str, *, dry: bool) -> Answer:
        about = pod["metadata"]
        name = f"evict-{about['name'][:LONGEST_NAME]}-{about['uid'][:8]}"
        body = {
            "metadata": {"name": name, "labels": {CAUSE_LABEL: EVICTION}},
            "spec": {
                "podName": about["name"],
                "timeout": deadline,
                "requestedBy": user,
                "ttlSecondsAfterFinished": KEPT,
            },
        }
        if not dry:
            try:
                await self._api.create(MIGRATIONS, body, about["namespace"])
            except ObjectAlreadyExists:  # two asked at once
                self._log.debug("a move of it has begun already", pod=about["name"], migration=name)
            except ApiFailed as refused:
                return Answer(True, f"{about['name']} is evicted, since no move could be begun: {refused.why}")
            self._log.info("an eviction becomes a move", pod=about["name"], migration=name, requested_by=user)
        return Answer(False, f"{about['name']} moves to another node instead of being evicted: Migration {name} begins")


def _runs(pod: Json) -> bool:
    ended = (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
    return not ended and "deletionTimestamp" not in pod["metadata"]


def _is_about(migration: Migration, uid: str, claimed: str) -> bool:
    """A Migration that has not taken its pod up yet is about the pod of its name."""
    source, target = migration.status.source_pod, migration.status.target_pod
    if source is None:
        return not migration.ended or migration.metadata.get("labels", {}).get(CAUSE_LABEL) == EVICTION
    return source.uid == uid or (target is not None and target.uid == uid and claimed == migration.uid)


def _of_move(migration: Migration, pod: Json, now: datetime.datetime, limit: str) -> Answer:
    status, about = migration.status, pod["metadata"]
    late = failures.age(str(migration.metadata["creationTimestamp"]), now) > seconds(limit)
    # Once the job runs on the target, its source pod must not go before its owner has the new one.
    if late and status.phase in (MigrationPhase.PENDING, MigrationPhase.SCHEDULING, MigrationPhase.RUNNING):
        return Answer(True, f"{about['name']} is evicted, since its move has not ended within {limit}")
    far = status.progress.summary if status.progress is not None and status.progress.summary else str(status.phase)
    return Answer(False, f"{about['name']} moves to another node: Migration {migration.name}, {far}")


def deadline_of(pod: Json, policy: AppliedPolicy) -> str:
    """How long a move may hold the pod's eviction up: as its policy says, or less where the pod's own wish is a duration."""
    most = policy.spec.eviction_deadline
    wish = (pod["metadata"].get("annotations") or {}).get(DEADLINE_ANNOTATION)
    if wish is None or not policy.heeds(PodWish.EVICTION_DEADLINE):
        return most or DEADLINE
    try:
        asked = seconds(str(wish))
    except ValueError:
        return most or DEADLINE
    return most if most is not None and asked > seconds(most) else str(wish)
