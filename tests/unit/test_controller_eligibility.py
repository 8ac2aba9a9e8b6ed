"""What stands in the way of moving a pod, one obstacle at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from podferry.controller import placement
from podferry.controller.eligibility import Surroundings, late_making, obstacles
from podferry.kube.migration import UID_LABEL
from podferry.kube.settings import MoveSettings
from podferry.model import Connections, Mode

pytestmark = pytest.mark.unit

Json = dict[str, Any]
RUNNING: Json = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
CLASS: Json = {"metadata": {"name": "podferry"}, "handler": "podferry"}


def pod(**spec: Any) -> Json:
    containers = spec.pop("containers", [{"name": "main"}])
    return {
        "metadata": {"name": "train", "namespace": "default", "uid": "u", "labels": {}},
        "spec": {"runtimeClassName": "podferry", "nodeName": "a", "containers": containers, **spec},
        "status": {
            "phase": "Running",
            "containerStatuses": [{"name": one["name"], "state": RUNNING} for one in containers],
        },
    }


def owned(kind: str, api: str = "batch/v1") -> Json:
    made = pod()
    made["metadata"]["ownerReferences"] = [
        {"apiVersion": api, "kind": kind, "name": "owner", "uid": "o", "controller": True}
    ]
    return made


def reasons(pod: Json, around: Surroundings | None = None) -> list[str]:
    found = obstacles(pod, around or Surroundings(runtime_class=CLASS))
    for one in found:
        assert one.what
        assert one.remedy, f"{one.what} has no remedy"
    return [one.reason for one in found]


def test_an_ordinary_pod_may_move() -> None:
    assert reasons(pod()) == []


def test_nothing_is_changed_by_looking() -> None:
    made = owned("Job")
    before = copy.deepcopy(made)
    reasons(made)
    assert made == before


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"runtimeClassName": None}, "RuntimeClassMissing"),
        ({"hostNetwork": True}, "HostNetwork"),
        ({"hostPID": True}, "HostPID"),
        ({"hostIPC": True}, "HostIPC"),
        ({"shareProcessNamespace": True}, "ShareProcessNamespace"),
        ({"hostUsers": False}, "UserNamespace"),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/srv"}}]}, "HostPath"),
        ({"volumes": [{"name": "v", "ephemeral": {}}]}, "VolumeNotShared"),
        ({"volumes": [{"name": "v", "csi": {"driver": "d"}}]}, "VolumeNotShared"),
        ({"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "absent"}}]}, "VolumeMissing"),
        ({"containers": [{"name": "main", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]}, "Devices"),
        ({"containers": [{"name": "main", "securityContext": {"privileged": True}}]}, "Privileged"),
        ({"containers": [{"name": "main", "volumeDevices": [{"name": "v"}]}]}, "BlockVolume"),
        ({"resourceClaims": [{"name": "gpu"}]}, "Devices"),
    ],
)
def test_each_of_these_stands_in_the_way(spec: Json, reason: str) -> None:
    assert reasons(pod(**spec)) == [reason]


@pytest.mark.parametrize(
    "volume",
    [
        {"emptyDir": {"medium": "Memory"}},
        {"configMap": {"name": "c"}},
        {"secret": {"secretName": "s"}},
        {"projected": {"sources": []}},
        {"downwardAPI": {}},
        {"nfs": {"server": "s", "path": "/"}},
        {},
    ],
)
def test_these_volumes_may_move(volume: Json) -> None:
    assert reasons(pod(volumes=[{"name": "v", **volume}])) == []


@pytest.mark.parametrize(
    ("modes", "found"), [(["ReadWriteOnce"], ["VolumeNotShared"]), (["ReadWriteMany"], []), ([], ["VolumeNotShared"])]
)
def test_a_claim_must_be_one_that_two_nodes_can_have(modes: list[str], found: list[str]) -> None:
    claim = {"spec": {"accessModes": modes}}
    made = pod(volumes=[{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}])
    assert reasons(made, Surroundings(claims={"data": claim}, runtime_class=CLASS)) == found


ONCE, POD_ONCE = "ReadWriteOnce", "ReadWriteOncePod"
PINNED: Json = {"required": {"nodeSelectorTerms": []}}


@pytest.mark.parametrize(
    ("mode", "spec", "found"),
    [
        (ONCE, {"nfs": {"server": "s", "path": "/"}}, []),
        (POD_ONCE, {"nfs": {"server": "s", "path": "/"}}, ["VolumeNotShared"]),
        (ONCE, {"csi": {"driver": "nfs.csi.k8s.io"}}, []),
        (ONCE, {"csi": {"driver": "ebs.csi.aws.com"}}, ["VolumeNotShared"]),
        (ONCE, {"local": {"path": "/disk"}, "nodeAffinity": PINNED}, ["LocalVolume"]),
        ("ReadWriteMany", {"local": {"path": "/a-share-on-each-of-them"}, "nodeAffinity": PINNED}, []),
        ("ReadWriteMany", {"hostPath": {"path": "/share"}}, []),
        (ONCE, {"hostPath": {"path": "/share"}}, ["VolumeNotShared"]),
    ],
)
def test_a_claim_by_the_volume_that_it_is_bound_to(mode: str, spec: Json, found: list[str]) -> None:
    claim = {"spec": {"accessModes": [mode], "volumeName": "pv"}}
    made = pod(volumes=[{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}])
    around = Surroundings(
        claims={"data": claim}, volumes={"data": {"metadata": {"name": "pv"}, "spec": spec}}, runtime_class=CLASS
    )
    assert reasons(made, around) == found


@pytest.mark.parametrize("part", ["subPath", "subPathExpr"])
@pytest.mark.parametrize(("kind", "found"), [("emptyDir", ["SubPath"]), ("configMap", [])])
def test_a_part_of_what_moves_along(part: str, kind: str, found: list[str]) -> None:
    mounts = [{"name": "v", "mountPath": "/v", part: "below"}]
    made = pod(containers=[{"name": "main", "volumeMounts": mounts}], volumes=[{"name": "v", kind: {}}])
    assert reasons(made) == found


def test_a_runtime_class_of_another_name_counts_by_its_handler() -> None:
    assert reasons(pod(runtimeClassName="mine")) == []
    other = {"handler": "runc"}
    assert reasons(pod(runtimeClassName="mine"), Surroundings(runtime_class=other)) == ["RuntimeClassMissing"]


@pytest.mark.parametrize(
    ("kind", "api", "found"),
    [
        ("ReplicaSet", "apps/v1", []),
        ("StatefulSet", "apps/v1", ["OwnerGone"]),
        ("StatefulSet", "apps.kruise.io/v1", ["UnknownOwner"]),
        ("DaemonSet", "apps/v1", ["DaemonSet"]),
        ("Node", "v1", ["StaticPod"]),
        ("Job", "batch/v1", ["OwnerGone"]),
        ("Job", "batch/v2", ["OwnerGone"]),
        ("TFJob", "kubeflow.org/v1", ["UnknownOwner"]),
        ("Job", "batch.volcano.sh/v1alpha1", ["UnknownOwner"]),
        ("ReplicaSet", "apps.example.com/v1", ["UnknownOwner"]),
        ("ReplicaSet", "v1", ["UnknownOwner"]),
        ("DaemonSet", "apps.kruise.io/v1alpha1", ["UnknownOwner"]),
        ("Node", "storage.example.com/v1", ["UnknownOwner"]),
        ("Job", "", ["UnknownOwner"]),
    ],
)
def test_owners_are_known_by_group_and_kind(kind: str, api: str, found: list[str]) -> None:
    assert reasons(owned(kind, api)) == found


@pytest.mark.parametrize(
    ("owner", "finalizers", "found"),
    [
        ({"metadata": {}, "spec": {}}, [], []),
        ({"metadata": {}, "spec": {}}, ["example.com/mine"], ["Finalizers"]),
        ({"metadata": {"deletionTimestamp": "now"}, "spec": {}}, [], ["OwnerTerminating"]),
        (None, ["example.com/mine"], ["OwnerGone", "Finalizers"]),
    ],
)
def test_a_stateful_sets_pod(owner: Json | None, finalizers: list[str], found: list[str]) -> None:
    made = owned("StatefulSet", "apps/v1")
    made["metadata"]["finalizers"] = finalizers
    assert reasons(made, Surroundings(owner=owner, runtime_class=CLASS)) == found


@pytest.mark.parametrize(
    ("kind", "mode", "connections", "found"),
    [
        ("StatefulSet", Mode.POSTCOPY, Connections.CLOSE, "KeepsName"),
        ("StatefulSet", Mode.LIVE, Connections.CLOSE, None),
        ("StatefulSet", Mode.STOP, Connections.REQUIRE, None),
        ("StatefulSet", Mode.LIVE, Connections.PRESERVE, "KeepsName"),
        ("ReplicaSet", Mode.POSTCOPY, Connections.PRESERVE, None),
    ],
)
def test_what_a_pod_that_keeps_its_name_cannot_have_since_its_object_goes_first(
    kind: str, mode: Mode, connections: Connections, found: str | None
) -> None:
    refused = late_making(owned(kind, "apps/v1"), MoveSettings(mode=mode, connections=connections))
    assert (refused and refused.reason) == found


@pytest.mark.parametrize(
    ("job", "found"),
    [
        ({"metadata": {}, "spec": {}}, []),
        ({"metadata": {}, "spec": {"suspend": True}}, ["JobSuspended"]),
        ({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}, "spec": {}}, ["OwnerTerminating"]),
    ],
)
def test_a_jobs_own_wishes(job: Json, found: list[str]) -> None:
    assert reasons(owned("Job"), Surroundings(owner=job, runtime_class=CLASS)) == found


def test_a_mirror_pod_is_static() -> None:
    made = pod()
    made["metadata"]["annotations"] = {"kubernetes.io/config.mirror": "x"}
    assert reasons(made) == ["StaticPod"]


@pytest.mark.parametrize(
    ("status", "found"),
    [
        ({"phase": "Pending"}, ["PodNotRunning"]),
        ({"phase": "Running", "containerStatuses": []}, ["ContainerNotRunning"]),
        (
            {"phase": "Running", "containerStatuses": [{"name": "main", "state": {"terminated": {}}}]},
            ["ContainerNotRunning"],
        ),
        (
            {
                "phase": "Running",
                "containerStatuses": [{"name": "main", "state": RUNNING}],
                "initContainerStatuses": [{"name": "prepare", "state": RUNNING}],
            },
            ["InitContainerRunning"],
        ),
        (
            {
                "phase": "Running",
                "containerStatuses": [{"name": "main", "state": RUNNING}],
                "ephemeralContainerStatuses": [{"name": "debug", "state": RUNNING}],
            },
            ["EphemeralContainer"],
        ),
    ],
)
def test_what_runs_and_what_does_not(status: Json, found: list[str]) -> None:
    assert reasons({**pod(), "status": status}) == found


def test_a_sidecar_must_run_too() -> None:
    made = pod(initContainers=[{"name": "once"}, {"name": "proxy", "restartPolicy": "Always"}])
    assert reasons(made) == ["ContainerNotRunning"]
    made["status"]["initContainerStatuses"] = [
        {"name": "proxy", "state": RUNNING},
        {"name": "once", "state": {"terminated": {}}},
    ]
    assert reasons(made) == []


def test_a_pod_that_is_going_has_one_obstacle() -> None:
    made = pod()
    made["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert reasons(made) == ["PodTerminating"]


def test_a_claim_counts_as_long_as_its_migration_is_under_way() -> None:
    made = pod()
    made["metadata"]["labels"] = {UID_LABEL: "other"}
    assert reasons(made, Surroundings(runtime_class=CLASS, under_way=frozenset({"other"}))) == ["AlreadyMigrating"]
    assert reasons(made) == [], "one that was removed by force binds nobody"


def test_every_obstacle_is_said_at_once() -> None:
    made = pod(runtimeClassName=None, hostNetwork=True, volumes=[{"name": "v", "hostPath": {"path": "/"}}])
    assert reasons(made) == ["RuntimeClassMissing", "HostNetwork", "HostPath"]


HOST = "kubernetes.io/hostname"
NODE: Json = {"metadata": {"name": "a", "labels": {HOST: "host-a", "disk": "fast", "cores": "8"}}}


def rule(key: str, operator: str, *values: str) -> Json:
    return {"key": key, "operator": operator, "values": list(values)}


def required(*terms: list[Json]) -> Json:
    """A pod's spec whose node must fit one of the terms."""
    wanted = {"nodeSelectorTerms": [{"matchExpressions": term} for term in terms]}
    return {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": wanted}}}


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ({"nodeSelector": {HOST: "host-a"}}, ["PinnedToNode"]),
        ({"nodeSelector": {"disk": "fast"}}, []),
        (required([rule(HOST, "In", "host-a")]), ["PinnedToNode"]),
        (required([rule("disk", "Exists"), rule(HOST, "In", "host-a")]), ["PinnedToNode"]),
        (required([rule(HOST, "In", "host-a")], [rule(HOST, "In", "host-a")]), ["PinnedToNode"]),
        (required([rule(HOST, "In", "host-a", "host-b")]), []),
        (required([rule(HOST, "In", "host-a")], [rule("disk", "Exists")]), []),
        (required([rule(HOST, "NotIn", "host-b")]), []),
        ({"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}}, []),
    ],
)
def test_a_pod_whose_rules_allow_no_other_node(spec: Json, found: list[str]) -> None:
    assert reasons(pod(**spec), Surroundings(runtime_class=CLASS, node=NODE)) == found


def test_what_ties_a_pod_to_its_node_is_named_with_what_to_do() -> None:
    (found,) = obstacles(pod(nodeSelector={HOST: "host-a"}), Surroundings(runtime_class=CLASS, node=NODE))
    assert found.why == f"nodeSelector {HOST}: host-a"
    assert "preferredDuringScheduling" in found.remedy


def test_a_node_that_may_not_be_read_has_its_own_name_for_a_hostname() -> None:
    assert reasons(pod(**required([rule(HOST, "In", "a")]))) == ["PinnedToNode"]
    assert reasons(pod(**required([rule(HOST, "In", "b")]))) == []


def test_an_earlier_moves_pin_does_not_tie_a_pod() -> None:
    """The target pod names its node so; the next move names another (`pods.target_pod`)."""
    fields = [{"matchFields": [rule("metadata.name", "In", "a")]}]
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": fields}}}
    made = pod(affinity=affinity)
    assert reasons(made) == []
    assert placement.allows(made, {})


@pytest.mark.parametrize(
    ("spec", "allowed"),
    [
        ({}, True),
        ({"nodeSelector": {"disk": "fast"}}, True),
        ({"nodeSelector": {"disk": "slow"}}, False),
        ({"nodeSelector": {"tape": "any"}}, False),
        (required([rule("disk", "In", "slow", "fast")]), True),
        (required([rule("disk", "In", "slow")]), False),
        (required([rule("disk", "NotIn", "slow")]), True),
        (required([rule("tape", "NotIn", "any")]), True),
        (required([rule("disk", "NotIn", "fast")]), False),
        (required([rule("disk", "Exists")]), True),
        (required([rule("tape", "Exists")]), False),
        (required([rule("tape", "DoesNotExist")]), True),
        (required([rule("disk", "DoesNotExist")]), False),
        (required([rule("cores", "Gt", "4")]), True),
        (required([rule("cores", "Gt", "8")]), False),
        (required([rule("cores", "Lt", "16")]), True),
        (required([rule("disk", "Gt", "4")]), False),
        (required([rule("tape", "Lt", "4")]), False),
        (required([rule("disk", "Exists"), rule("tape", "Exists")]), False),
        (required([rule("tape", "Exists")], [rule("disk", "Exists")]), True),
        (required([]), False),
        ({"nodeSelector": {"disk": "slow"}, **required([rule("disk", "Exists")])}, False),
    ],
)
def test_which_nodes_a_pods_rules_allow(spec: Json, allowed: bool) -> None:
    assert placement.allows(pod(**spec), NODE["metadata"]["labels"]) is allowed
