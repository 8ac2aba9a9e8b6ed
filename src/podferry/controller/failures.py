"""Failures around a migration, with the reason and message of its condition. Pure: objects in, an ending or None out."""

from __future__ import annotations

import datetime
from typing import Any

from podferry.core.migration import MIGRATION_ENDS
from podferry.core.phases import SourcePhase, TargetPhase
from podferry.errors import PodferryError
from podferry.kube.api_errors import ApiFailed, Forbidden, ObjectNotFound
from podferry.kube.migration import SCHEDULED, UID_LABEL, Ending, EnginePhases, Migration
from podferry.kube.quantities import seconds
from podferry.model import Outcome

Json = dict[str, Any]

CANCEL_REQUESTED, TIMED_OUT, POD_DELETED, POD_ENDED = "CancelRequested", "TimedOut", "PodDeleted", "PodEnded"
JOB_SUSPENDED, NAMESPACE_TERMINATING = "JobSuspended", "NamespaceTerminating"
UNSCHEDULABLE, QUOTA_EXCEEDED, WEBHOOK_DENIED, POD_INVALID = (
    "Unschedulable",
    "QuotaExceeded",
    "WebhookDenied",
    "PodInvalid",
)
NAME_TAKEN, NAME_NOT_KEPT, AGENT_TOO_OLD = "NameTaken", "NameNotKept", "AgentTooOld"
VOLUME_MISSING, TARGET_POD_FAILED, TARGET_POD_GONE = "VolumeMissing", "TargetPodFailed", "TargetPodGone"
TARGET_POD_STUCK, JOB_DIED = "TargetPodStuck", "JobDied"
TARGET_NODE_LOST, SOURCE_NODE_LOST, SOURCE_SILENT = "TargetNodeLost", "SourceNodeLost", "SourceAgentSilent"

VERDICT_KEPT = 3600
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
_STARTING = ("ContainerCreating", "PodInitializing")
_OF_VOLUMES = frozenset({"FailedMount", "FailedAttachVolume", "FailedMapVolume"})


def ending(outcome: Outcome, reason: str, message: str, *, remedy: str = "", code: str = "") -> Ending:
    """An ending in words."""
    return Ending(outcome=str(outcome), reason=reason, message=message[:8000], remedy=remedy[:2000], code=code)


def of_cancel(migration: Migration) -> Ending | None:
    """Somebody does not want it any more."""
    if not migration.cancel_wanted:
        return None
    how = "spec.cancel" if migration.spec.cancel else "the Migration was deleted"
    return ending(Outcome.CANCELLED, CANCEL_REQUESTED, f"cancelled on request ({how})")


def of_source(source: Json | None, owner: Json | None, migration: Migration) -> Ending | None:
    """The pod that moves, or its owner, wants something else now. A rollout, a drain, a suspended Job: they win."""
    wanted = migration.status.source_pod
    if source is None or (wanted is not None and source["metadata"]["uid"] != wanted.uid):
        return ending(Outcome.FAILED, POD_DELETED, "the pod was deleted during the move")
    if owner is not None and owner["spec"].get("suspend"):
        return ending(Outcome.FAILED, JOB_SUSPENDED, f"Job {owner['metadata']['name']} was suspended during the move")
    if "deletionTimestamp" in source["metadata"]:
        return ending(Outcome.FAILED, POD_DELETED, "the pod is being deleted: its owner's wish goes before the move")
    phase = source.get("status", {}).get("phase")
    if phase in ("Succeeded", "Failed"):
        return ending(Outcome.FAILED, POD_ENDED, f"the pod ended by itself ({phase}) before it had moved")
    return None


def of_creation(error: PodferryError, what: str) -> Ending:
    """The API server did not take a pod of ours."""
    why, reason = error.why, "PodRefused"
    if isinstance(error, Forbidden) and "exceeded quota" in why:
        reason = QUOTA_EXCEEDED
    elif (isinstance(error, Forbidden) and "being terminated" in why) or isinstance(error, ObjectNotFound):
        reason = NAMESPACE_TERMINATING
    elif "webhook" in why:
        reason = WEBHOOK_DENIED
    elif isinstance(error, ApiFailed) and error.status == 422:
        reason = POD_INVALID
    remedies = {
        QUOTA_EXCEEDED: "the move needs room in the quota for two pods for a moment: raise it, or move at another time",
        WEBHOOK_DENIED: "see why the webhook refuses a copy of this pod",
    }
    return ending(
        Outcome.ROLLED_BACK, reason, f"{what} was refused: {why}", remedy=remedies.get(reason, ""), code=error.code
    )


def of_taken_name(body: Json, what: str) -> Ending:
    """There is a pod already of the name that `what` was to have, and the Migration did not make it."""
    name = body["metadata"]["name"]
    return ending(
        Outcome.ROLLED_BACK,
        NAME_TAKEN,
        f"{what} was not created: pod {name} exists, and podferry did not make it",
        remedy=f"see who made pod {name}, remove it, and migrate again",
    )


def of_waiting(pod: Json, what: str, patience: float, now: datetime.datetime) -> Ending | None:
    """The scheduler has found no node for `pod` for `patience` seconds."""
    if pod["spec"].get("nodeName"):
        return None
    reason, message = unscheduled(pod) or (UNSCHEDULABLE, "the scheduler has said nothing yet")
    if age(pod["metadata"]["creationTimestamp"], now) < patience:
        return None
    return ending(
        Outcome.ROLLED_BACK,
        reason,
        f"{what} found no node within {patience:.0f} s: {message}",
        remedy="make room, or name another targetNode or nodeSelector",
    )


def unscheduled(pod: Json) -> tuple[str, str] | None:
    """Why the scheduler has not placed the pod, in its own words."""
    for one in pod.get("status", {}).get("conditions") or []:
        if one["type"] == "PodScheduled" and one["status"] == "False":
            message = one.get("message", "")
            missing = "persistentvolumeclaim" in message and "not found" in message
            return (VOLUME_MISSING if missing else UNSCHEDULABLE), message
    return None


def of_target(target: Json | None, migration: Migration, patience: float, now: datetime.datetime) -> Ending | None:
    """The pod that shall take over is in trouble, before the job runs in it."""
    wanted = migration.status.target_pod
    if wanted is None:
        return None
    if target is None or target["metadata"]["uid"] != wanted.uid or "deletionTimestamp" in target["metadata"]:
        return ending(Outcome.ROLLED_BACK, TARGET_POD_GONE, "the target pod was deleted before the job had moved")
    status = target.get("status", {})
    if status.get("phase") in ("Failed", "Succeeded"):
        why = status.get("message") or status.get("reason") or status["phase"]
        return ending(Outcome.ROLLED_BACK, TARGET_POD_FAILED, f"the target pod ended before the job had moved: {why}")
    return of_waiting(target, "the target pod", patience, now)


def of_start(target: Json, warnings: list[Json]) -> Ending | None:
    """What keeps the kubelet from starting the target pod, by the pod's status and the `warnings` about it (events.k8s.io).

    What went wrong before the pod had its sandbox is no longer so once it has one; what goes wrong later stands in the status.
    """
    status = target.get("status", {})
    for one in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (one.get("state") or {}).get("waiting") or {}
        if waiting.get("reason", _STARTING[0]) not in _STARTING:
            words = f"{one['name']}: {waiting['reason']}: {waiting.get('message', '')}"
            return _stuck(TARGET_POD_STUCK, words)
    conditions = status.get("conditions") or []
    if any(one["type"] == "PodReadyToStartContainers" and one["status"] == "True" for one in conditions):
        return None
    told = [one for one in warnings if one.get("type") == "Warning"]
    if not told:
        return None
    last = max(told, key=lambda one: str(one.get("deprecatedLastTimestamp") or one.get("eventTime") or ""))
    reason = VOLUME_MISSING if last.get("reason") in _OF_VOLUMES else TARGET_POD_STUCK
    return _stuck(reason, f"{last.get('reason')}: {last.get('note', '')}")


def _stuck(reason: str, words: str) -> Ending:
    return ending(
        Outcome.ROLLED_BACK,
        reason,
        f"the target pod does not start: {words}",
        remedy="see to it that a new pod like this one could start on the target node",
    )


def of_old_agent(migration: Migration) -> Ending:
    """The target's agent asks for a pod of the source's name before it has the right to run."""
    node = migration.status.target_node
    return ending(
        Outcome.ROLLED_BACK,
        AGENT_TOO_OLD,
        f"the agent of {node} does not know pods that keep their names",
        remedy=f"upgrade podferry-agent on {node}, and migrate again",
    )


def of_free_name(source: Json) -> Ending:
    """Nothing keeps the source's owner from making a pod of its name before podferry does."""
    return ending(
        Outcome.ROLLED_BACK,
        NAME_NOT_KEPT,
        f"{source['metadata']['name']} keeps its name, and no admission policy keeps that for the target pod",
        remedy="install podferry-kept-names (deploy/policies.yaml; Kubernetes 1.30 or later), and migrate again",
    )


def of_large_pod(source: Json) -> Ending:
    """The Migration's status cannot hold the pod."""
    return ending(
        Outcome.ROLLED_BACK,
        POD_INVALID,
        f"the object of {source['metadata']['name']} is too large to be kept while its name changes hands",
        remedy="take annotations or environment variables out of the pod's template",
    )


def of_target_node(node: Json | None, name: str) -> Ending | None:
    """The target's node is gone or does not answer."""
    if node is None:
        return ending(Outcome.ROLLED_BACK, TARGET_NODE_LOST, f"node {name} is gone")
    if not ready(node):
        return ending(Outcome.ROLLED_BACK, TARGET_NODE_LOST, f"node {name} is not ready any more")
    return None


def of_resumed(migration: Migration, target: Json | None, *, source_gone: bool) -> Ending | None:
    """The owner has the target, and the source's agent has not said how it ended: what became of the job nevertheless. In
    post-copy it runs there without all its memory for a while (`fetching`).
    """
    engine = migration.status.engine or EnginePhases()
    waiting = engine.source in (SourcePhase.RESUME, SourcePhase.SERVE, SourcePhase.LOST)
    if engine.target == TargetPhase.DIED and (waiting or source_gone):
        return ending(Outcome.FAILED, JOB_DIED, "the job died on the target before it had all its memory")
    if not fetching(engine):
        return None
    lacks = "the job on the target had not all its memory yet"
    if source_gone:
        return ending(Outcome.FAILED, SOURCE_NODE_LOST, f"the source's node is gone, and {lacks}")
    phase = (target or {}).get("status", {}).get("phase")
    if target is None or phase in ("Failed", "Succeeded"):
        what = "is gone" if target is None else f"has ended ({phase})"
        return ending(Outcome.FAILED, TARGET_POD_GONE, f"the target pod {what}, and {lacks}")
    return None


def fetching(engine: EnginePhases) -> bool:
    """Whether the target may still need memory from the frozen original."""
    lost = engine.source == SourcePhase.LOST and engine.target == TargetPhase.FILL
    return lost or (engine.source == SourcePhase.SERVE and engine.target != TargetPhase.DONE)


def of_time(migration: Migration, now: datetime.datetime, *, slack: float = 0.0) -> Ending | None:
    """It takes too long. The engine keeps the same deadline; `slack` (seconds) lets it come first."""
    limit = seconds(migration.settings.timeout)
    if migration.status.start_time is None or age(migration.status.start_time, now) < limit + slack:
        return None
    return ending(
        Outcome.ROLLED_BACK,
        TIMED_OUT,
        f"it was not done within {migration.settings.timeout}",
        remedy="a longer spec.timeout, or another mode",
    )


def of_silence(migration: Migration, patience: float, now: datetime.datetime) -> Ending | None:
    """The source's agent has not taken up the order for `patience` seconds."""
    placed, engine = migration.status.condition(SCHEDULED), migration.status.engine
    if (engine is not None and engine.source) or placed is None or age(placed.last_transition_time, now) < patience:
        return None
    node = migration.status.source_node
    return ending(
        Outcome.ROLLED_BACK,
        SOURCE_SILENT,
        f"no agent on {node} took it up within {patience:.0f} s",
        remedy=f"see podferry-agent on {node}: kubectl -n podferry-system get pods -o wide",
    )


def of_age(migration: Migration, now: datetime.datetime) -> float | None:
    """Seconds until an ended Migration may be deleted, 0 where it may be now; None where it stays (batch/v1's
    `ttlSecondsAfterFinished`).

    While the source's agent has not said that it is done, the Migration holds the verdict that it will ask for when it
    returns: then it stays for an hour at least.
    """
    status, ttl = migration.status, migration.spec.ttl_seconds_after_finished
    if ttl is None:
        ttl = migration.settings.ttl_seconds_after_finished
    if ttl is None or status.completion_time is None:
        return None
    began = status.engine is not None and bool(status.engine.source)
    least = ttl if status.engine_ending is not None or not began else max(ttl, VERDICT_KEPT)
    return max(0.0, least - age(status.completion_time, now))


def ready(node: Json) -> bool:
    """Whether the node's kubelet answers."""
    conditions = node.get("status", {}).get("conditions") or []
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def gone_or_fenced(node: Json | None) -> bool:
    """Whether nothing runs on the node for certain: it was removed, or somebody vouches for it by the out-of-service taint."""
    return node is None or any(one["key"] == OUT_OF_SERVICE for one in node["spec"].get("taints") or [])


def pod_ready(pod: Json) -> bool:
    """Whether the pod runs and its kubelet calls it ready."""
    status = pod.get("status", {})
    conditions = status.get("conditions") or []
    return status.get("phase") == "Running" and any(
        one["type"] == "Ready" and one["status"] == "True" for one in conditions
    )


def claims(pod: Json, migration: Migration) -> bool:
    """Whether the pod carries this migration's label."""
    return (pod["metadata"].get("labels") or {}).get(UID_LABEL) == migration.uid


def age(since: str, now: datetime.datetime) -> float:
    """Seconds since a metav1.Time."""
    return (now - datetime.datetime.fromisoformat(since)).total_seconds()


def under_way(migrations: list[Json], but: str) -> frozenset[str]:
    """The uids of the Migrations that have not ended, except one."""
    found = {
        one["metadata"]["uid"]
        for one in migrations
        if (one.get("status") or {}).get("phase") not in set(MIGRATION_ENDS)
    }
    return frozenset(found - {but})
