"""The hand-over: the cluster follows the job to its new pod, in an order that no owner can misunderstand.

The job runs on the target by now, and its original is frozen. (1) The source is marked as the one to go, should anybody
find one pod too many, and leaves its Services. (2) One patch gives the target the source's owners and finalizers (its
labels it has since it was made). (3) One patch takes the labels off the source, and its owner lets it go. (4) The
source is deleted. Between (2) and (3) the owner sees two pods, for some milliseconds. It never sees none, so it starts
no replacement; and should it act just then, it removes the pod that is not ready (kube-controller-manager,
`controller.ActivePods`), which is the source, and a Job takes its tracking finalizer off before it deletes
(`deleteJobPods`), so that nothing is counted as failed.

Its kubelet would call the source ready again within ten seconds (`syncPeriod` of pkg/kubelet/status), and of two ready pods a Job
removes the target, which has been so for less time. The admission policy `podferry-moved-pods` (deploy/policies.yaml) refuses it.

That the owner lets the source go, and nobody takes it away from it, is for that case: it waits to see the deletion that
it has asked for, and sees it only of a pod that it owns (`DeletionObserved`). Were the source unowned when the request
arrives, the owner would neither make nor remove a pod until it lost patience, after five minutes
(`ExpectationsTimeout`). It does not ask and let go at once: one worker does both, one after the other.
"""

from __future__ import annotations

import contextlib
import datetime

from podferry.controller import eligibility, failures, pods
from podferry.kube.api_errors import Conflict, Forbidden, ObjectNotFound
from podferry.kube.client import PODS, Api, Json
from podferry.kube.migration import RESUMED, VERIFIED, Ending, Migration
from podferry.kube.quantities import timestamp
from podferry.model import Outcome

SOON = 0.25
GRACE = 5
"""Seconds that the kubelet gives the frozen original; the agent has killed it by then."""


class HandOver:
    """Does what is next of the hand-over of one migration."""

    def __init__(self, api: Api, readiness: float, release: float) -> None:
        """`readiness`: seconds for the target to be called ready; `release`: for an owner to let the source go."""
        self._api, self._readiness, self._release = api, readiness, release

    def failure(self, migration: Migration, source: Json | None, target: Json | None) -> Ending | None:
        """Somebody wanted the pod gone, or the target is gone, before the owner had it."""
        if target is None or "deletionTimestamp" in target["metadata"]:
            return failures.ending(
                Outcome.FAILED, failures.TARGET_POD_GONE, "the target pod was deleted: the job went with it"
            )
        if pods.took_place(target, migration) or pods.kept_place(migration) is not None:
            return None
        if source is None or "deletionTimestamp" in source["metadata"]:
            return failures.ending(
                Outcome.FAILED,
                failures.POD_DELETED,
                "the pod was deleted while it moved: its owner's wish goes before the move",
            )
        return None

    async def step(self, migration: Migration, source: Json | None, target: Json | None) -> float | None:
        """The next of the four. None once the owner has the target and the source is unowned; else when to come again."""
        assert target is not None
        if (kept := pods.kept_place(migration)) is not None:  # there are no two pods that anybody could confuse
            if not pods.took_place(target, migration):
                await self._take_place(kept.source, target)
            return None
        if not pods.took_place(target, migration):
            assert source is not None
            if self._wait(migration, target):
                return SOON
            source = await self._mark(source)
            await self._take_place(source, target)
        if source is not None and not pods.left_place(source):
            with contextlib.suppress(ObjectNotFound):
                return await self._leave(source)
        return None

    async def _take_place(self, source: Json, target: Json) -> None:
        """Where OwnerReferencesPermissionEnforcement is on (OpenShift), `blockOwnerDeletion` takes a right on the owner.
        podferry has it for the owners that it knows, and whoever else may stand beside them shall not keep the pod.
        """
        try:
            await self._patch(target, pods.take_place(source, target))
        except Forbidden:
            await self._patch(target, pods.take_place(source, target, blocking=False))

    async def dismiss(self, source: Json) -> None:
        """Delete the source pod, which has no owner any more."""
        about = source["metadata"]
        with contextlib.suppress(Conflict):  # another pod has the name by now
            await self._api.delete(PODS, about["name"], about["namespace"], uid=about["uid"], grace=GRACE)

    async def _leave(self, source: Json) -> float:
        """The source leaves its owner. What it belongs to besides is taken off it."""
        asked = pods.stepped_aside(source)
        if eligibility.controller_of(source) is None or "deletionTimestamp" in source["metadata"]:
            await self._patch(source, pods.leave_place(source))
        elif asked is None:
            await self._patch(source, pods.step_aside(source, timestamp()))
        elif failures.age(asked, datetime.datetime.now(datetime.UTC)) > self._release:
            await self._patch(source, pods.leave_place(source))
        else:
            return SOON
        return 0.0

    def _wait(self, migration: Migration, target: Json) -> bool:
        """An owner ranks a pod that is not ready behind one that is; so the target may take a while to be called ready."""
        if failures.pod_ready(target):
            return False
        since = migration.status.condition(VERIFIED) or migration.status.condition(RESUMED)
        now = datetime.datetime.now(datetime.UTC)
        return since is not None and failures.age(since.last_transition_time, now) < self._readiness

    async def _mark(self, source: Json) -> Json:
        """The source ranks last from now on."""
        if (source["metadata"].get("annotations") or {}).get(pods.DELETION_COST) != pods.LEAST_COST:
            source = await self._patch(source, pods.step_back(source))
        return await self._api.patch(
            PODS,
            source["metadata"]["name"],
            pods.not_ready(source, timestamp()),
            source["metadata"]["namespace"],
            uid=source["metadata"]["uid"],
            part="status",
        )

    async def _patch(self, pod: Json, patch: Json) -> Json:
        about = pod["metadata"]
        return await self._api.patch(PODS, about["name"], patch, about["namespace"], uid=about["uid"])
