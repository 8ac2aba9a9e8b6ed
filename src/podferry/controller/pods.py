"""The pods that a migration makes, and the patches that hand the source's place to the target's. All of it is pure.

The target is a clone of the source that nobody counts in the source's place yet: its controller is the Migration, so that no
ReplicaSet or Job adopts it whatever its labels (kube-controller-manager, `BaseControllerRefManager.ClaimObject`), and it has no
finalizers. It gets the source's labels as soon as it exists, so that NetworkPolicies hold before the job runs in it; owner and
finalizers come at the hand-over, in one patch.
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from podferry.controller import verifying
from podferry.kube.client import MIGRATIONS, PODS
from podferry.kube.migration import (
    API_VERSION,
    HANDED_OVER_ANNOTATION,
    LEAVING_ANNOTATION,
    NAME_ANNOTATION,
    ORIGIN_ANNOTATION,
    ROLE_LABEL,
    UID_LABEL,
    Migration,
)
from podferry.kube.paths import is_subdomain
from podferry.kube.resources import resized
from podferry.model import Mode

Json = dict[str, Any]

TARGET, PLACEHOLDER = "target", "placeholder"
LONGEST_NAME, LONGEST_HOSTNAME = 253, 63
LEAST_COST = "-2147483648"
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
KEPT_NAMES = "podferry-kept-names"
"""The admission policy that keeps a name for a target pod (deploy/policies.yaml)."""

# What the API server, admission or the scheduler fill in, and will fill in again.
FILLED_IN = ("nodeName", "priority", "overhead", "ephemeralContainers", "schedulingGates", "preemptionPolicy")
OF_LIVENESS = frozenset({"initialDelaySeconds", "periodSeconds", "failureThreshold", "successThreshold"})
LONGEST_FETCH = 86400
"""Seconds that a job may take to answer after its resume in post-copy."""
UNOWNED_SECURITY: Json = {
    "allowPrivilegeEscalation": False,
    "runAsNonRoot": True,
    "runAsUser": 65534,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
MY_ANNOTATIONS = (NAME_ANNOTATION, ORIGIN_ANNOTATION, HANDED_OVER_ANNOTATION, LEAVING_ANNOTATION, DELETION_COST)


def target_pod(source: Json, migration: Migration, node: str, now: datetime.datetime) -> Json:
    """The pod that takes the source's place on `node`, as it is created `now`: which no owner counts yet."""
    spec = copy.deepcopy(source["spec"])
    for name in FILLED_IN:
        spec.pop(name, None)
    if "." not in source["metadata"]["name"]:  # a hostname with dots is refused; CRIU restores the old one anyway
        spec.setdefault("hostname", source["metadata"]["name"][:LONGEST_HOSTNAME].rstrip("-"))
    # Init containers have finished, startup probes have passed and postStart hooks have run: none of it a second time.
    wanted, residents = migration.spec.resources, spec.pop("initContainers", None) or []
    sidecars = [resized(one, wanted) for one in residents if one.get("restartPolicy") == "Always"]
    if sidecars:
        spec["initContainers"] = sidecars
    spec["containers"] = [resized(one, wanted) for one in spec["containers"]]
    fetches = migration.settings.mode is Mode.POSTCOPY or migration.settings.allow_post_copy
    for one in [*sidecars, *spec["containers"]]:
        one.pop("startupProbe", None)
        if fetches and "livenessProbe" in one:
            one["startupProbe"] = _until_it_answers(one["livenessProbe"])
        verifying.probed(one, source, migration.spec.verify)
        (one.get("lifecycle") or {}).pop("postStart", None)
    if limit := spec.get("activeDeadlineSeconds"):
        begun = datetime.datetime.fromisoformat(source["status"]["startTime"])
        spec["activeDeadlineSeconds"] = max(1, limit - int((now - begun).total_seconds()))
    _pin(spec, [{"key": "metadata.name", "operator": "In", "values": [node]}])
    annotations = {
        name: value
        for name, value in (source["metadata"].get("annotations") or {}).items()
        if name not in MY_ANNOTATIONS and not name.startswith("cni.") and name != "k8s.v1.cni.cncf.io/network-status"
    }
    origin = _origin(source)
    return {
        "metadata": {
            "name": source["metadata"]["name"] if migration.status.keeps_name else name_of(source, migration, TARGET),
            "namespace": source["metadata"]["namespace"],
            "labels": _labels(migration, TARGET),
            "annotations": {**annotations, NAME_ANNOTATION: migration.name, ORIGIN_ANNOTATION: origin},
            "ownerReferences": [_ours(migration)],
        },
        "spec": spec,
    }


def _until_it_answers(probe: Json) -> Json:
    """In post-copy a job may stand still on the target too, until the pages that it needs have come. Its liveness probe counts only
    once it has been answered there: a startup probe that asks the same, and has more patience than any move.
    """
    same = {name: value for name, value in probe.items() if name not in OF_LIVENESS}
    return {**copy.deepcopy(same), "periodSeconds": 1, "failureThreshold": LONGEST_FETCH}


def wear_labels(source: Json, target: Json) -> Json | None:
    """The target gets the source's labels; None where it has them. An update after the creation: admission that injects by labels
    has worked on the source already, and must not work on its clone once more.
    """
    wanted, worn = _own_labels(source), target["metadata"].get("labels") or {}
    return None if wanted.items() <= worn.items() else _patch(target, labels=wanted)


def placeholder_pod(source: Json, migration: Migration, image: str, never: Iterable[str] = ()) -> Json:
    """A pod that asks the scheduler for what the source needs, anywhere but on the source's node, and holds the room. `never` are
    further nodes that it cannot move to."""
    wanted = source["spec"]
    keep = (
        "affinity",
        "tolerations",
        "nodeSelector",
        "topologySpreadConstraints",
        "schedulerName",
        "priorityClassName",
    )
    spec: Json = {name: copy.deepcopy(wanted[name]) for name in (*keep, "runtimeClassName") if name in wanted}
    volumes = [one for one in wanted.get("volumes") or [] if "persistentVolumeClaim" in one]
    resident = [one for one in wanted.get("initContainers") or [] if one.get("restartPolicy") == "Always"]
    spec |= {
        "containers": [
            {
                "name": one["name"],
                "image": image,
                "imagePullPolicy": "IfNotPresent",
                "command": ["sleep", "infinity"],
                "resources": resized(one, migration.spec.resources).get("resources") or {},
                "securityContext": UNOWNED_SECURITY,
            }
            for one in [*resident, *wanted["containers"]]
        ],
        "volumes": copy.deepcopy(volumes),
        "terminationGracePeriodSeconds": 0,
        "restartPolicy": "Always",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
    }
    if migration.spec.node_selector:
        spec["nodeSelector"] = {**(spec.get("nodeSelector") or {}), **migration.spec.node_selector}
    # The API server takes one name for each demand on a field.
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [one]} for one in (wanted["nodeName"], *never)]
    if migration.spec.target_node:
        fields = [{"key": "metadata.name", "operator": "In", "values": [migration.spec.target_node]}]
    _pin(spec, fields)
    return {
        "metadata": {
            "name": name_of(source, migration, PLACEHOLDER),
            "namespace": source["metadata"]["namespace"],
            "labels": _labels(migration, PLACEHOLDER),
            "annotations": {NAME_ANNOTATION: migration.name},
            "ownerReferences": [_ours(migration)],
        },
        "spec": spec,
    }


def name_of(source: Json, migration: Migration, role: str) -> str:
    """A name that is the same however often it is asked for, so that creating twice creates one."""
    suffix = hashlib.sha256(f"{migration.uid}/{role}".encode()).hexdigest()[:5]
    return f"{_origin(source)[: LONGEST_NAME - 6].rstrip('-.')}-{suffix}"


def _origin(source: Json) -> str:
    """What the names of a pod and of its successors begin with. A user can write the annotation: one that is no name is ignored."""
    about = source["metadata"]
    earlier = str((about.get("annotations") or {}).get(ORIGIN_ANNOTATION) or "")
    if is_subdomain(earlier):
        return earlier
    return str((about.get("generateName") or "").rstrip("-.") or about["name"])


# What is ours. Labels, annotations and names say nothing of it: whoever may write pods can write them.


def made_by(pod: Json, migration: Migration) -> bool:
    """Whether the Migration made the pod: it controls it, or the controller noted the pod's uid when it had made it."""
    about, noted = pod["metadata"], migration.status.target_pod
    controllers = [one["uid"] for one in about.get("ownerReferences") or [] if one.get("controller")]
    return controllers == [migration.uid] or (noted is not None and noted.uid == about["uid"])


def as_made(pod: Json, wanted: Json) -> bool:
    """Whether a pod that has the name of `wanted` is the one that an earlier try of ours made of it, and has not begun to run.

    A pod that somebody made before us under a name that he foresaw may run anything: its containers must be those that we ask
    for, and none may have started. What the API server filled in is not compared.
    """
    about, want = pod["metadata"], wanted["metadata"]
    states = [*((pod.get("status") or {}).get("containerStatuses") or [])]
    states += (pod.get("status") or {}).get("initContainerStatuses") or []
    begun = any(set(one.get("state") or {}) & {"running", "terminated"} for one in states)
    mine = {key: value for key, value in wanted["spec"].items() if key != "activeDeadlineSeconds"}  # it runs down
    return (
        not begun
        and (about.get("labels") or {}).items() >= want["labels"].items()
        and about.get("ownerReferences") == want["ownerReferences"]
        and _holds(pod["spec"], mine)
    )


def _holds(found: Any, wanted: Any) -> bool:
    """Whether `found` is `wanted` with defaults filled in: maps may have more keys, lists must have as many elements."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(
            _holds(found.get(key), value) for key, value in wanted.items() if value not in (None, [], {})
        )
    if isinstance(wanted, list):
        return (
            isinstance(found, list)
            and len(found) == len(wanted)
            and all(_holds(*pair) for pair in zip(found, wanted, strict=True))
        )
    return bool(found == wanted)


def _labels(migration: Migration, role: str) -> dict[str, str]:
    return {UID_LABEL: migration.uid, ROLE_LABEL: role}


def _own_labels(source: Json) -> Json:
    """The source's labels, but for those that say that it moves."""
    labels = source["metadata"].get("labels") or {}
    return {name: value for name, value in labels.items() if name not in (UID_LABEL, ROLE_LABEL)}


def _ours(migration: Migration) -> Json:
    """The Migration controls the pods that it makes: nobody adopts them, and they go with it."""
    return {
        "apiVersion": API_VERSION,
        "kind": MIGRATIONS.kind,
        "name": migration.name,
        "uid": migration.uid,
        "controller": True,
    }


def _pin(spec: Json, fields: list[Json]) -> None:
    """Demand of every way that the pod may be placed that the node also satisfies `fields`."""
    affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    required = affinity.setdefault("requiredDuringSchedulingIgnoredDuringExecution", {"nodeSelectorTerms": []})
    for term in required["nodeSelectorTerms"]:
        # An earlier migration's pin names the node that the pod leaves now.
        others = [one for one in term.get("matchFields") or [] if one.get("key") != "metadata.name"]
        term["matchFields"] = [*others, *copy.deepcopy(fields)]
    if not required["nodeSelectorTerms"]:
        required["nodeSelectorTerms"] = [{"matchFields": copy.deepcopy(fields)}]


# A pod that keeps its name. Its object goes before the target's can be made, so the Migration keeps what both are made of.


@dataclass(frozen=True)
class KeptPlace:
    """`source` is the metadata of the pod that is gone, as far as the hand-over wants it; `target` the pod to make."""

    source: Json
    target: Json


def keep_place(source: Json, migration: Migration, node: str, now: datetime.datetime) -> str:
    """`KeptPlace` as the Migration's status has it."""
    wanted = ("name", "namespace", "uid", "labels", "ownerReferences", "finalizers", "generateName")
    about = {name: source["metadata"][name] for name in wanted if name in source["metadata"]}
    if origin := (source["metadata"].get("annotations") or {}).get(
        ORIGIN_ANNOTATION
    ):  # the placeholder's name is made of it
        about["annotations"] = {ORIGIN_ANNOTATION: origin}
    kept = {"source": {"metadata": about}, "target": target_pod(source, migration, node, now)}
    return json.dumps(kept, separators=(",", ":"))


def probe(kept: str) -> Json:
    """What is no target pod of the Migration but has its name: the API server must refuse it, as a pod of the owner's."""
    body: Json = json.loads(kept)["target"]
    body["metadata"]["labels"][UID_LABEL] = "probe"
    return body


def kept_place(migration: Migration) -> KeptPlace | None:
    """What was kept; None where the source's object is not given up."""
    if migration.status.kept_place is None:
        return None
    return KeptPlace(**json.loads(migration.status.kept_place))


# The hand-over. Each patch is a merge patch that carries the resourceVersion it was made from.


def claim(pod: Json, migration: Migration) -> Json:
    """Mark the source as on its way. One Migration wins, by compare-and-swap."""
    return _patch(pod, labels={UID_LABEL: migration.uid})


def unclaim(pod: Json) -> Json:
    """Release the pod from podferry's labels and annotations."""
    return _patch(pod, labels={UID_LABEL: None, ROLE_LABEL: None}, annotations={DELETION_COST: None})


def step_back(source: Json) -> Json:
    """Should its owner find one pod too many for a moment, it shall be the source that goes."""
    return _patch(source, annotations={DELETION_COST: LEAST_COST})


def not_ready(source: Json, now: str) -> Json:
    """Status: Services leave the source now, and owners rank it behind the target."""
    message = "the job has moved to another node"
    conditions = []
    for one in (source.get("status") or {}).get("conditions") or []:
        if one["type"] in ("Ready", "ContainersReady") and one["status"] != "False":
            one = {**one, "status": "False", "reason": "Migrated", "message": message, "lastTransitionTime": now}  # noqa: PLW2901
        conditions.append(one)
    return {
        "metadata": {name: source["metadata"][name] for name in ("resourceVersion", "uid")},
        "status": {"conditions": conditions},
    }


def take_place(source: Json, target: Json, *, blocking: bool = True) -> Json:
    """The target becomes what the source was: labels, owners and finalizers, in one step. Without `blocking` no owner's
    deletion in the foreground waits for it.
    """
    about = source["metadata"]
    patch = _patch(
        target, labels={**_own_labels(source), ROLE_LABEL: TARGET}, annotations={HANDED_OVER_ANNOTATION: about["uid"]}
    )
    owners = [dict(one) for one in about.get("ownerReferences") or []]
    for one in owners if not blocking else []:
        one.pop("blockOwnerDeletion", None)
    patch["metadata"]["ownerReferences"] = owners or None
    patch["metadata"]["finalizers"] = about.get("finalizers") or None
    return patch


def step_aside(source: Json, now: str) -> Json:
    """The source is none that its owner selects; so the owner lets it go (ReplicaSets and Jobs do: `ClaimPods`)."""
    labels = {name: None for name in (source["metadata"].get("labels") or {}) if name != UID_LABEL}
    return _patch(source, labels=labels, annotations={LEAVING_ANNOTATION: now})


def stepped_aside(source: Json) -> str | None:
    """Since when the source's owner has been asked to let it go."""
    since: str | None = (source["metadata"].get("annotations") or {}).get(LEAVING_ANNOTATION)
    return since


def leave_place(source: Json) -> Json:
    """Take the source pod from its owner, which then does not count the pod's end."""
    labels = {name: None for name in (source["metadata"].get("labels") or {}) if name != UID_LABEL}
    patch = _patch(source, labels=labels)
    patch["metadata"]["ownerReferences"] = None
    patch["metadata"]["finalizers"] = None
    return patch


def took_place(target: Json, migration: Migration) -> bool:
    """Whether the owner has the target already: it names the source that it followed, and the Migration controls it no more."""
    about, source = target["metadata"], migration.status.source_pod
    followed = (about.get("annotations") or {}).get(HANDED_OVER_ANNOTATION)
    mine = any(one["uid"] == migration.uid for one in about.get("ownerReferences") or [])
    return source is not None and followed == source.uid and not mine


def left_place(source: Json) -> bool:
    """Whether the source pod has no owner any more."""
    about = source["metadata"]
    return not (about.get("ownerReferences") or about.get("finalizers") or set(about.get("labels") or {}) - {UID_LABEL})


def _patch(pod: Json, *, labels: Json | None = None, annotations: Json | None = None) -> Json:
    about: Json = {"resourceVersion": pod["metadata"]["resourceVersion"], "uid": pod["metadata"]["uid"]}
    if labels:
        about["labels"] = labels
    if annotations:
        about["annotations"] = annotations
    return {"metadata": about}


def reference(pod: Json) -> Json:
    """The pod as an event's subject."""
    return {"apiVersion": PODS.api, "kind": PODS.kind, "metadata": pod["metadata"]}
