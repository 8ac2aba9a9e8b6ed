"""May this pod move at all? The pod and what it belongs to go in, obstacles come out: each with a reason and a remedy.

What only a node knows (its kernel, what the processes hold open) is asked later by the engine's own preflight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from podferry.controller import placement, shares
from podferry.errors import Refused
from podferry.kube.migration import UID_LABEL
from podferry.kube.settings import MoveSettings
from podferry.model import Connections, Mode

Json = dict[str, Any]

HANDLER = "podferry"
SHARED_ACCESS = frozenset({"ReadWriteMany", "ReadOnlyMany"})
DEFAULT_THRESHOLD, LEAST_THRESHOLD = 3, 2
"""Failures of a liveness probe after which the kubelet restarts a container: Kubernetes' default, and what a long stop takes."""
NATIVE_RESOURCES = ("cpu", "memory", "ephemeral-storage", "hugepages-")

# Volumes that the kubelet makes anew on any node, or that any node can mount at the same time.
MOVABLE_VOLUMES = frozenset(
    {"emptyDir", "configMap", "secret", "projected", "downwardAPI", "nfs", "cephfs", "glusterfs", "azureFile", "image"}
)


class PodUnfit(Refused):
    """Something of the pod stands in the way of moving it. `reason` is the word for programs."""

    code = "PF120"
    reason = "NotEligible"


@dataclass(frozen=True)
class Surroundings:
    """What stands around the pod: its controller (None for a pod of its own), its claims by name and, by the claims' names, the
    volumes that these are bound to (as far as they may be read), its RuntimeClass, its node (None where that may not be read), and
    the uids of the other Migrations of its namespace that have not ended."""

    owner: Json | None = None
    claims: Mapping[str, Json] = field(default_factory=dict)
    volumes: Mapping[str, Json] = field(default_factory=dict)
    runtime_class: Json | None = None
    node: Json | None = None
    under_way: frozenset[str] = frozenset()


Check = Callable[[Json, Surroundings], Iterator[PodUnfit]]


def obstacles(pod: Json, around: Surroundings) -> list[PodUnfit]:
    """Everything that stands in the way, the most basic first."""
    return [found for check in CHECKS for found in check(pod, around)]


def controller_of(pod: Json) -> Json | None:
    """The owner reference of the pod's controller."""
    return next((one for one in pod["metadata"].get("ownerReferences") or [] if one.get("controller")), None)


KNOWN_OWNERS: Mapping[tuple[str, str], str] = {
    ("batch", "Job"): "Job",
    ("apps", "ReplicaSet"): "ReplicaSet",
    ("apps", "StatefulSet"): "StatefulSet",
    ("apps", "DaemonSet"): "DaemonSet",
    ("", "Node"): "Node",
}
"""By API group and kind: other groups have kinds of the same names (Volcano's Job, OpenKruise's StatefulSet and DaemonSet)."""


def kind_of_owner(reference: Json) -> str | None:
    """Which of Kubernetes' own kinds an owner reference names; None where it is none that podferry knows."""
    group, _, version = str(reference.get("apiVersion") or "").rpartition("/")
    return KNOWN_OWNERS.get((group, str(reference["kind"]))) if version else None


def containers(pod: Json) -> list[Json]:
    """The containers that run as long as the pod does: sidecars and the main ones."""
    sidecars = [one for one in pod["spec"].get("initContainers") or [] if one.get("restartPolicy") == "Always"]
    return sidecars + list(pod["spec"]["containers"])


def impatient_probe(pod: Json, settings: MoveSettings) -> PodUnfit | None:
    """A liveness probe that has the container restarted at its first failure, where the pod may stand still for long. One that is
    under way when the pod is frozen fails, whoever answers those that come later (`podferry.workload.answering`).
    """
    if settings.mode is Mode.LIVE and not settings.allow_post_copy:
        return None
    hasty = [
        one["name"]
        for one in containers(pod)
        if (probe := one.get("livenessProbe"))
        and int(probe.get("failureThreshold") or DEFAULT_THRESHOLD) < LEAST_THRESHOLD
    ]
    if not hasty:
        return None
    return unfit(
        "ImpatientProbe",
        f"the kubelet restarts the pod's containers when a liveness probe fails once, and in mode {settings.mode} one may",
        why=", ".join(hasty),
        remedy="a failureThreshold of 2 or more, which counts from the pod's next start; or mode live",
    )


def unfit(reason: str, what: str, *, why: str = "", remedy: str = "") -> PodUnfit:
    """An obstacle, by the word for programs and in words for people."""
    error = PodUnfit(what, why=why, remedy=remedy)
    error.reason = reason
    return error


def _runs(pod: Json, around: Surroundings) -> Iterator[PodUnfit]:
    status = pod.get("status") or {}
    if "deletionTimestamp" in pod["metadata"]:
        yield unfit("PodTerminating", "the pod is being deleted", remedy="nothing; it will not need to move")
        return
    if status.get("phase") != "Running":
        yield unfit(
            "PodNotRunning",
            "the pod does not run",
            why=f"it is {status.get('phase', 'unknown')}",
            remedy="wait until it runs; a pod that has not begun can simply be scheduled elsewhere",
        )
        return
    wanted = {one["name"] for one in containers(pod)}
    states = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    running = {one["name"] for one in states if "running" in (one.get("state") or {})}
    if missing := sorted(wanted - running):
        yield unfit(
            "ContainerNotRunning",
            "not all of the pod's containers run",
            why=", ".join(missing),
            remedy="wait until they run; a container that has ended cannot be moved",
        )
    if busy := sorted(running - wanted):
        yield unfit(
            "InitContainerRunning", "an init container is still at work", why=", ".join(busy), remedy="wait for its end"
        )


def _runtime(pod: Json, around: Surroundings) -> Iterator[PodUnfit]:
    name = pod["spec"].get("runtimeClassName")
    handler = (around.runtime_class or {}).get("handler") if name else None
    if handler != HANDLER and not (name == HANDLER and around.runtime_class is None):
        yield unfit(
            "RuntimeClassMissing",
            "the pod was not started through podferry",
            why=f"its runtimeClassName is {name!r}" if name else "it has no runtimeClassName",
            remedy=f"set `runtimeClassName: {HANDLER}` in the pod's template; it counts from the pod's next start",
        )


def _owner(pod: Json, around: Surroundings) -> Iterator[PodUnfit]:
    if "kubernetes.io/config.mirror" in (pod["metadata"].get("annotations") or {}):
        yield unfit(
            "StaticPod", "the pod is static: its node's kubelet made it", remedy="static pods stay on their node"
        )
        return
    reference = controller_of(pod)
    if reference is None:
        return
    name = f"{reference['kind']} {reference['name']}"
    match kind_of_owner(reference):
        case "Job":
            yield from _job(name, around.owner)
        case "ReplicaSet":
            pass
        case "StatefulSet":
            yield from _by_name(name, pod, around.owner)
        case "DaemonSet":
            yield unfit("DaemonSet", "the pod belongs to its node", why=f"{name} has one on each", remedy="none needed")
        case "Node":
            yield unfit("StaticPod", "the pod is static: its node's kubelet made it", remedy="it stays on its node")
        case _:
            yield unfit(
                "UnknownOwner",
                "podferry does not know how to hand the pod over",
                why=f"it belongs to {name} ({reference.get('apiVersion', '')})",
                remedy="pods of Jobs, of Deployments and ReplicaSets, and pods of their own can move",
            )


def _job(name: str, job: Json | None) -> Iterator[PodUnfit]:
    if job is None:
        yield unfit("OwnerGone", "the pod's owner is gone", why=name, remedy="nothing; the pod will go too")
    elif "deletionTimestamp" in job["metadata"]:
        yield unfit("OwnerTerminating", "the pod's owner is being deleted", why=name, remedy="nothing; the pod will go")
    elif job["spec"].get("suspend"):
        yield unfit("JobSuspended", "the job is suspended", why=name, remedy="resume it; its pods start anew then")


def _by_name(name: str, pod: Json, owner: Json | None) -> Iterator[PodUnfit]:
    """The owner finds its pods by their names, so the source's object is deleted before the target's is made."""
    if owner is None:
        yield unfit("OwnerGone", "the pod's owner is gone", why=name, remedy="nothing; the pod will go too")
    elif "deletionTimestamp" in owner["metadata"]:
        yield unfit("OwnerTerminating", "the pod's owner is being deleted", why=name, remedy="nothing; the pod will go")
    if finalizers := pod["metadata"].get("finalizers"):
        yield unfit(
            "Finalizers",
            f"the pod keeps its name, and {', '.join(finalizers)} would keep that taken while it moves",
            why=f"a pod of {name} can only be made when the one of the same name is gone",
            remedy="have whoever set the finalizers on the pod take them off",
        )


def keeps_name(pod: Json) -> bool:
    """Whether the target pod must have the source's name: its owner finds its pods by their names."""
    reference = controller_of(pod)
    return reference is not None and kind_of_owner(reference) == "StatefulSet"


def late_making(pod: Json, settings: MoveSettings) -> PodUnfit | None:
    """What a pod cannot have whose object is gone before the target pod is made, and that keeps its name."""
    if not keeps_name(pod):
        return None
    if settings.mode is Mode.POSTCOPY:
        return unfit(
            "KeepsName",
            "the pod keeps its name, and such a pod does not move in mode postcopy",
            why="its object is gone while the source still has memory of the job",
            remedy="mode live or stop",
        )
    if settings.connections is Connections.PRESERVE:
        return unfit(
            "KeepsName",
            "the pod keeps its name, and connections of such a pod are not preserved",
            why="its new address is known only when the source's pod is gone, and those at the other ends must know it before",
            remedy="connections: Close or Require",
        )
    return None


def _shares(pod: Json, around: Surroundings) -> Iterator[PodUnfit]:
    spec = pod["spec"]
    for key, what in (("hostNetwork", "network"), ("hostPID", "processes"), ("hostIPC", "IPC")):
        if spec.get(key):
            yield unfit(
                key[0].upper() + key[1:],
                f"the pod shares its node's {what}",
                why=f"{key}: true",
                remedy=f"run it without {key}",
            )
    if spec.get("shareProcessNamespace"):
        yield unfit(
            "ShareProcessNamespace",
            "the pod's containers share one process namespace",
            why="its first process belongs to the sandbox, which does not move",
            remedy="run it without shareProcessNamespace",
        )
    if spec.get("hostUsers") is False:
        yield unfit(
            "UserNamespace",
            "the pod has a user namespace of its own",
            why="hostUsers: false; its mapping belongs to the node",
            remedy="run it without hostUsers: false",
        )


def _placement(pod: Json, around: Surroundings) -> Iterator[PodUnfit]:
    name, labels = pod["spec"].get("nodeName"), ((around.node or {}).get("metadata") or {}).get("labels") or {}
    if name and (why := placement.pin(pod, name, labels)):
        yield unfit(
            "PinnedToNode",
            "the pod's own rules allow no node but the one it is on",
            why=why,
            remedy="ask in the pod's template for what the node has (a label of its own), or only prefer it: "
            "preferredDuringSchedulingIgnoredDuringExecution; it counts from the pod's next start",
        )


def _volumes(pod: Json, around: Surroundings) -> Iterator[PodUnfit]:
    for volume in pod["spec"].get("volumes") or []:
        name = volume["name"]
        kind = next((one for one in volume if one != "name"), "emptyDir")
        if kind == "hostPath":
            yield unfit(
                "HostPath",
                "the pod uses a directory of its node",
                why=f"volume {name}: {volume[kind].get('path')}",
                remedy="use a volume that other nodes can reach, or an emptyDir, which moves along",
            )
        elif kind == "persistentVolumeClaim":
            yield from _claim(name, volume[kind]["claimName"], around)
        elif kind not in MOVABLE_VOLUMES:
            yield unfit(
                "VolumeNotShared",
                "the pod uses a volume that only one node can have",
                why=f"volume {name} ({kind})",
                remedy="use a claim with access mode ReadWriteMany",
            )
    scratch = {one["name"] for one in pod["spec"].get("volumes") or [] if not set(one) - {"name", "emptyDir"}}
    parts = {
        f"{one['name']}: {mount['name']}"
        for one in containers(pod)
        for mount in one.get("volumeMounts") or []
        if mount["name"] in scratch and (mount.get("subPath") or mount.get("subPathExpr"))
    }
    if parts:
        yield unfit(
            "SubPath",
            "a container has only a part of an emptyDir mounted",
            why=", ".join(sorted(parts)),
            remedy="mount the whole volume: a subPath of an emptyDir cannot move yet",
        )
    if blocks := [one["name"] for one in containers(pod) if one.get("volumeDevices")]:
        yield unfit("BlockVolume", "the pod uses raw block volumes", why=", ".join(blocks), remedy="use a file system")


def _claim(volume: str, name: str, around: Surroundings) -> Iterator[PodUnfit]:
    claim, bound = around.claims.get(name), around.volumes.get(name) or {}
    if claim is None:
        yield unfit(
            "VolumeMissing", "a claim of the pod does not exist", why=f"volume {volume}: {name}", remedy="create it"
        )
        return
    modes = claim.get("status", {}).get("accessModes") or claim["spec"].get("accessModes") or []
    spec = bound.get("spec") or {}
    if SHARED_ACCESS & set(modes) or shares.holds(spec, modes):
        return
    if "local" in spec:
        yield unfit(
            "LocalVolume",
            "the pod uses a disk of its node",
            why=f"volume {volume}: claim {name} is bound to the local volume {bound['metadata']['name']}",
            remedy="a local volume cannot follow its pod: use one that other nodes can reach",
        )
    else:
        driver = (spec.get("csi") or {}).get("driver")
        of = f" of {driver}" if driver else ""
        yield unfit(
            "VolumeNotShared",
            "the pod uses a volume that only one node can have",
            why=f"volume {volume}: claim {name}{of} is {', '.join(modes) or 'without an access mode'}",
            remedy="use a claim with access mode ReadWriteMany: both nodes have it mounted for a moment",
        )


def _devices(pod: Json, around: Surroundings) -> Iterator[PodUnfit]:
    for one in containers(pod):
        named = {**(one.get("resources", {}).get("requests") or {}), **(one.get("resources", {}).get("limits") or {})}
        if extended := sorted(name for name in named if not name.startswith(NATIVE_RESOURCES)):
            yield unfit(
                "Devices",
                "the pod uses devices of its node",
                why=f"container {one['name']}: {', '.join(extended)}",
                remedy="a job with devices cannot move yet",
            )
        if (one.get("securityContext") or {}).get("privileged"):
            yield unfit(
                "Privileged",
                "a container of the pod is privileged",
                why=f"{one['name']} sees its node's devices",
                remedy="name the capabilities that it needs instead",
            )
    if pod["spec"].get("resourceClaims"):
        yield unfit("Devices", "the pod has claims on devices", why="resourceClaims", remedy="it cannot move yet")


def _debugged(pod: Json, around: Surroundings) -> Iterator[PodUnfit]:
    states = (pod.get("status") or {}).get("ephemeralContainerStatuses") or []
    if names := [one["name"] for one in states if "running" in (one.get("state") or {})]:
        yield unfit(
            "EphemeralContainer",
            "somebody is debugging the pod",
            why=f"ephemeral containers run: {', '.join(names)}",
            remedy="end them; they cannot be made anew on another node",
        )


def _busy(pod: Json, around: Surroundings) -> Iterator[PodUnfit]:
    claimed = (pod["metadata"].get("labels") or {}).get(UID_LABEL)
    if claimed in around.under_way:
        yield unfit(
            "AlreadyMigrating",
            "the pod is being migrated already",
            why=f"by the Migration with uid {claimed}",
            remedy="wait for it or cancel it: kubectl get migrations",
        )


CHECKS: tuple[Check, ...] = (_runs, _busy, _runtime, _owner, _shares, _placement, _volumes, _devices, _debugged)
