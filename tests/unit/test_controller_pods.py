"""The pods that a migration makes, and the patches of the hand-over."""

from __future__ import annotations

import copy
import datetime
from typing import Any

import pytest

from podferry.controller import failures, placement, pods
from podferry.controller.program import pruned_node
from podferry.errors import Failed
from podferry.kube.api_errors import of_status
from podferry.kube.migration import (
    HANDED_OVER_ANNOTATION,
    NAME_ANNOTATION,
    ORIGIN_ANNOTATION,
    ROLE_LABEL,
    UID_LABEL,
    Migration,
    PodReference,
)

pytestmark = pytest.mark.unit

Json = dict[str, Any]
NOW = datetime.datetime(2026, 1, 1, 0, 10, tzinfo=datetime.UTC)


def migration(uid: str = "m1", **spec: Any) -> Migration:
    about = {"name": "move", "namespace": "default", "uid": uid}
    return Migration.from_json({"metadata": about, "spec": {"podName": "train", **spec}})


def source() -> Json:
    return {
        "metadata": {
            "name": "train-0-abcde",
            "generateName": "train-0-",
            "namespace": "default",
            "uid": "s1",
            "resourceVersion": "7",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app": "train", "batch.kubernetes.io/job-completion-index": "0", UID_LABEL: "m1"},
            "annotations": {
                "batch.kubernetes.io/job-completion-index": "0",
                "cni.projectcalico.org/podIP": "10.0.0.1/32",
            },
            "ownerReferences": [{"kind": "Job", "name": "train", "uid": "j", "controller": True}],
            "finalizers": ["batch.kubernetes.io/job-tracking"],
        },
        "spec": {
            "nodeName": "a",
            "priority": 0,
            "preemptionPolicy": "PreemptLowerPriority",
            "overhead": {"memory": "10Mi"},
            "ephemeralContainers": [{"name": "debug"}],
            "runtimeClassName": "podferry",
            "initContainers": [{"name": "once"}, {"name": "proxy", "restartPolicy": "Always", "startupProbe": {}}],
            "containers": [
                {
                    "name": "main",
                    "startupProbe": {},
                    "livenessProbe": {},
                    "lifecycle": {"postStart": {"exec": {}}, "preStop": {"exec": {}}},
                    "resources": {"requests": {"cpu": "1"}},
                    "volumeMounts": [
                        {"name": "kube-api-access-x", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}
                    ],
                }
            ],
            "volumes": [
                {"name": "kube-api-access-x", "projected": {}},
                {"name": "d", "persistentVolumeClaim": {"claimName": "d"}},
            ],
            "tolerations": [{"key": "gpu"}],
            "aFieldOfTheFuture": {"kept": True},
        },
        "status": {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True"}, {"type": "PodScheduled", "status": "True"}],
        },
    }


def test_the_clone_is_the_sources_spec_and_nobodys_pod() -> None:
    before = source()
    made = pods.target_pod(before, migration(), "b", NOW)
    about, spec = made["metadata"], made["spec"]
    assert before == source(), "the source was not touched"
    assert about["labels"] == {UID_LABEL: "m1", ROLE_LABEL: "target"}
    assert (about["annotations"][NAME_ANNOTATION], about["annotations"][ORIGIN_ANNOTATION]) == ("move", "train-0")
    assert about["annotations"]["batch.kubernetes.io/job-completion-index"] == "0"
    assert "cni.projectcalico.org/podIP" not in about["annotations"]
    assert [one["kind"] for one in about["ownerReferences"]] == ["Migration"]
    assert "finalizers" not in about
    for name in ("nodeName", "priority", "preemptionPolicy", "overhead", "ephemeralContainers"):
        assert name not in spec
    assert spec["aFieldOfTheFuture"] == {"kept": True}
    assert [one["name"] for one in spec["initContainers"]] == ["proxy"]
    assert "startupProbe" not in spec["containers"][0]
    assert "livenessProbe" in spec["containers"][0]
    assert spec["containers"][0]["lifecycle"] == {"preStop": {"exec": {}}}
    assert spec["volumes"] == before["spec"]["volumes"], "the token's volume keeps its name: admission finds it there"
    assert spec["hostname"] == "train-0-abcde"


def as_stored() -> tuple[Json, Json]:
    """A target pod as the controller creates it, and as the API server returns it: with defaults filled in."""
    wanted = pods.target_pod(source(), migration(), "b", NOW)
    stored = copy.deepcopy(wanted)
    stored["metadata"]["labels"]["added-by"] = "a webhook"
    stored["spec"]["dnsPolicy"] = "ClusterFirst"
    stored["spec"]["containers"][0]["resources"]["limits"] = {"cpu": "1"}
    stored["status"] = {"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}
    return wanted, stored


def test_the_target_pod_of_an_earlier_try_is_known_again_with_the_defaults_of_the_api_server() -> None:
    wanted, stored = as_stored()
    assert pods.as_made(stored, wanted)
    stored["spec"]["activeDeadlineSeconds"] = 5
    assert pods.as_made(stored, wanted | {"spec": wanted["spec"] | {"activeDeadlineSeconds": 9}}), "it runs down"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("metadata", "labels"), {}),
        (("metadata", "ownerReferences"), []),
        (("spec", "containers", 0, "resources", "requests", "cpu"), "2"),
        (("spec", "containers", 0, "resources"), None),
        (("spec", "containers", 0, "name"), "another"),
        (("spec", "containers"), []),
        (("spec", "volumes"), {"name": "d"}),
        (("status", "containerStatuses", 0, "state"), {"running": {}}),
        (("status", "initContainerStatuses"), [{"state": {"terminated": {"exitCode": 0}}}]),
    ],
)
def test_a_pod_that_runs_or_asks_for_something_else_is_not_the_one_of_an_earlier_try(
    path: tuple[str | int, ...], value: object
) -> None:
    wanted, stored = as_stored()
    part: Any = stored
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    assert not pods.as_made(stored, wanted)


@pytest.mark.parametrize(("limit", "left"), [(3600, 2700), (600, 1)])
def test_a_deadline_of_the_pods_own_goes_on(limit: int, left: int) -> None:
    one = source()
    one["spec"]["activeDeadlineSeconds"] = limit
    one["status"]["startTime"] = (NOW - datetime.timedelta(minutes=15)).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert pods.target_pod(one, migration(), "b", NOW)["spec"]["activeDeadlineSeconds"] == left


def test_a_hostname_of_its_own_is_kept_and_one_that_cannot_be_is_left_out() -> None:
    one = source()
    one["spec"]["hostname"] = "train-0"
    assert pods.target_pod(one, migration(), "b", NOW)["spec"]["hostname"] == "train-0"
    dotted = source()
    dotted["metadata"]["name"] = "train.v1"
    assert "hostname" not in pods.target_pod(dotted, migration(), "b", NOW)["spec"]


def test_the_pin_goes_into_every_way_of_being_placed_and_replaces_an_earlier_one() -> None:
    one = source()
    terms = [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["x"]}]}, {"matchFields": [_pin("a")]}]
    one["spec"]["affinity"] = {
        "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    }
    made = pods.target_pod(one, migration(), "b", NOW)["spec"]["affinity"]["nodeAffinity"]
    after = made["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [term["matchFields"] for term in after] == [[_pin("b")], [_pin("b")]]
    assert after[0]["matchExpressions"] == terms[0]["matchExpressions"]


def _pin(node: str) -> Json:
    return {"key": "metadata.name", "operator": "In", "values": [node]}


def test_the_placeholder_wants_what_the_pod_wants_elsewhere() -> None:
    made = pods.placeholder_pod(source(), migration(nodeSelector={"disk": "fast"}), "image")["spec"]
    (term,) = made["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchFields"] == [{"key": "metadata.name", "operator": "NotIn", "values": ["a"]}]
    assert made["nodeSelector"] == {"disk": "fast"}
    assert made["tolerations"] == [{"key": "gpu"}]
    assert [one["name"] for one in made["containers"]] == ["proxy", "main"]
    assert made["containers"][1]["resources"] == {"requests": {"cpu": "1"}}
    assert [one["name"] for one in made["volumes"]] == ["d"], "only what decides about the place"
    assert made["containers"][0]["securityContext"]["runAsNonRoot"]
    assert not made["automountServiceAccountToken"]


def of_runtime(name: str, version: str | None) -> pods.Json:
    return {"metadata": {"name": name}, "status": {"nodeInfo": {"containerRuntimeVersion": version} if version else {}}}


def test_the_placeholder_goes_to_no_node_with_another_runtime() -> None:
    told = {
        "a": "cri-o://1.34.1",
        "d": "containerd://2.1.9",
        "b": "containerd://1.7.24",
        "c": "cri-o://1.35.0",
        "e": None,
    }
    nodes = [pruned_node(of_runtime(*one)) for one in told.items()]
    never = placement.of_other_runtimes(nodes, "a")
    assert never == ["b", "d"], "what is not told, and other versions of the same, are no reason"
    assert placement.of_other_runtimes(nodes, "e") == placement.of_other_runtimes(nodes, "gone") == []
    made = pods.placeholder_pod(source(), migration(), "image", never)["spec"]
    (term,) = made["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchFields"] == [{"key": "metadata.name", "operator": "NotIn", "values": [one]} for one in "abd"]
    named = pods.placeholder_pod(source(), migration(targetNode="b"), "image", never)["spec"]
    (term,) = named["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchFields"] == [_pin("b")], "then it is for the agents to refuse it in words"


def test_a_named_node_is_the_only_one() -> None:
    made = pods.placeholder_pod(source(), migration(targetNode="c"), "image")["spec"]
    (term,) = made["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchFields"] == [_pin("c")]


def test_names_are_of_one_family_and_the_same_each_time() -> None:
    first = pods.target_pod(source(), migration("m1"), "b", NOW)
    assert first["metadata"]["name"] == pods.name_of(source(), migration("m1"), "target")
    second = pods.target_pod({**first, "metadata": {**first["metadata"], "uid": "x"}}, migration("m2"), "a", NOW)
    for one in (first, second):
        assert one["metadata"]["name"].startswith("train-0-")
        assert len(one["metadata"]["name"]) == len("train-0-") + 5
    assert first["metadata"]["name"] != second["metadata"]["name"]
    assert pods.name_of(source(), migration(), "placeholder") != pods.name_of(source(), migration(), "target")
    long = source()
    long["metadata"] |= {"name": "x" * 253}
    del long["metadata"]["generateName"]
    assert len(pods.name_of(long, migration(), "target")) == 253


def test_the_target_takes_the_place_in_one_patch_and_the_source_leaves_it_in_one() -> None:
    target = pods.target_pod(source(), migration(), "b", NOW)
    target["metadata"] |= {"uid": "t1", "resourceVersion": "9"}
    patch = pods.take_place(source(), target)["metadata"]
    assert (patch["uid"], patch["resourceVersion"]) == ("t1", "9")
    assert patch["ownerReferences"] == source()["metadata"]["ownerReferences"]
    assert patch["finalizers"] == ["batch.kubernetes.io/job-tracking"]
    assert patch["labels"] == {"app": "train", "batch.kubernetes.io/job-completion-index": "0", ROLE_LABEL: "target"}
    assert patch["annotations"] == {HANDED_OVER_ANNOTATION: "s1"}
    leave = pods.leave_place(source())["metadata"]
    assert (leave["ownerReferences"], leave["finalizers"]) == (None, None)
    assert leave["labels"] == {"app": None, "batch.kubernetes.io/job-completion-index": None}
    assert (leave["uid"], leave["resourceVersion"]) == ("s1", "7")


@pytest.mark.parametrize("spec", [{"mode": "postcopy"}, {"allowPostCopy": True}, {"mode": "stop"}, {}])
def test_in_post_copy_liveness_counts_only_once_the_job_has_answered_on_the_target(spec: Json) -> None:
    before = source()
    asks = {"httpGet": {"path": "/alive", "port": "web"}, "timeoutSeconds": 5}
    before["spec"]["containers"][0]["livenessProbe"] = {**asks, "periodSeconds": 3, "failureThreshold": 2}
    (main,) = pods.target_pod(before, migration(**spec), "b", NOW)["spec"]["containers"]
    assert main["livenessProbe"] == before["spec"]["containers"][0]["livenessProbe"]
    startup = {**asks, "periodSeconds": 1, "failureThreshold": pods.LONGEST_FETCH}
    assert main.get("startupProbe") == (startup if "postcopy" in spec.values() or "allowPostCopy" in spec else None)


def test_the_target_wears_the_sources_labels_but_for_ours() -> None:
    target = {"metadata": {"uid": "t1", "resourceVersion": "5", "labels": {UID_LABEL: "m1", ROLE_LABEL: "target"}}}
    patch = pods.wear_labels(source(), target)
    assert patch is not None
    labels = {"app": "train", "batch.kubernetes.io/job-completion-index": "0"}
    assert patch == {"metadata": {"uid": "t1", "resourceVersion": "5", "labels": labels}}
    target["metadata"]["labels"] |= labels  # type: ignore[index, operator]
    assert pods.wear_labels(source(), target) is None


def test_the_source_steps_aside_from_its_owner_with_its_labels_alone() -> None:
    aside = pods.step_aside(source(), "2026-11-27T19:00:00Z")["metadata"]
    assert aside["labels"] == {"app": None, "batch.kubernetes.io/job-completion-index": None}
    assert (aside["uid"], aside["resourceVersion"]) == ("s1", "7")
    assert not {"ownerReferences", "finalizers"} & set(aside), "they are its owner's to take off"
    assert pods.stepped_aside(source()) is None
    assert pods.stepped_aside({"metadata": aside}) == "2026-11-27T19:00:00Z"


def test_a_pod_of_its_own_hands_over_labels_alone() -> None:
    bare = source()
    for name in ("ownerReferences", "finalizers"):
        del bare["metadata"][name]
    target = pods.target_pod(bare, migration(), "b", NOW)
    target["metadata"] |= {"uid": "t1", "resourceVersion": "9"}
    patch = pods.take_place(bare, target)["metadata"]
    assert (patch["ownerReferences"], patch["finalizers"]) == (None, None)


def test_what_has_happened_is_seen_from_the_pods_alone() -> None:
    one = source()
    assert not pods.left_place(one)
    moving = migration()
    moving.status.source_pod = PodReference(name="train", uid="s0")
    assert not pods.took_place(one, moving)
    one["metadata"] |= {"labels": {UID_LABEL: "m1"}, "ownerReferences": [], "finalizers": []}
    assert pods.left_place(one)
    one["metadata"]["annotations"][HANDED_OVER_ANNOTATION] = "somebody else's"
    assert not pods.took_place(one, moving)
    one["metadata"]["annotations"][HANDED_OVER_ANNOTATION] = "s0"
    assert pods.took_place(one, moving)


def test_a_second_clone_has_not_taken_its_place_yet() -> None:
    again = copy.deepcopy(source())
    again["metadata"]["annotations"] |= {
        HANDED_OVER_ANNOTATION: "s0",
        NAME_ANNOTATION: "before",
        pods.DELETION_COST: "-1",
    }
    annotations = pods.target_pod(again, migration(), "b", NOW)["metadata"]["annotations"]
    assert HANDED_OVER_ANNOTATION not in annotations
    assert pods.DELETION_COST not in annotations
    assert annotations[NAME_ANNOTATION] == "move"


def test_only_readiness_is_taken_from_the_source() -> None:
    conditions = pods.not_ready(source(), "2026-01-01T00:00:00Z")["status"]["conditions"]
    assert [(one["type"], one["status"]) for one in conditions] == [("Ready", "False"), ("PodScheduled", "True")]


@pytest.mark.parametrize(
    ("status", "reason", "message", "word"),
    [
        (403, "Forbidden", "exceeded quota: compute, requested: pods=1", "QuotaExceeded"),
        (
            403,
            "Forbidden",
            "unable to create new content in namespace x because it is being terminated",
            "NamespaceTerminating",
        ),
        (403, "Forbidden", 'admission webhook "policy.example.com" denied the request: no', "WebhookDenied"),
        (500, "InternalError", 'failed calling webhook "policy.example.com": connection refused', "WebhookDenied"),
        (422, "Invalid", "spec.hostname: Invalid value", "PodInvalid"),
        (404, "NotFound", 'namespaces "x" not found', "NamespaceTerminating"),
        (400, "BadRequest", "strange", "PodRefused"),
    ],
)
def test_a_refused_pod_has_a_word_and_the_servers_words(status: int, reason: str, message: str, word: str) -> None:
    body = {"reason": reason, "message": message, "details": {"name": "x"}}
    error = of_status(status, body, "cannot create Pod default/train")
    end = failures.of_creation(error, "the target pod")
    assert (end.outcome, end.reason) == ("rolled-back", word)
    assert message in end.message


@pytest.mark.parametrize(
    ("change", "owner", "reason"),
    [
        (None, None, "PodDeleted"),
        ({"metadata": {"uid": "another"}}, None, "PodDeleted"),
        ({"metadata": {"uid": "s1", "deletionTimestamp": "x"}}, None, "PodDeleted"),
        ({"metadata": {"uid": "s1"}, "status": {"phase": "Succeeded"}}, None, "PodEnded"),
        (
            {"metadata": {"uid": "s1"}, "status": {"phase": "Running"}},
            {"metadata": {"name": "j"}, "spec": {"suspend": True}},
            "JobSuspended",
        ),
        ({"metadata": {"uid": "s1"}, "status": {"phase": "Running"}}, {"metadata": {"name": "j"}, "spec": {}}, None),
    ],
)
def test_the_sources_wishes(change: Json | None, owner: Json | None, reason: str | None) -> None:
    under_way = migration()
    under_way = Migration.from_json({**under_way.to_json(), "status": {"sourcePod": {"name": "train", "uid": "s1"}}})
    end = failures.of_source(change, owner, under_way)
    assert (end and end.reason) == reason


def test_a_pod_that_is_not_placed_is_waited_for_so_long() -> None:
    waiting = {
        "metadata": {"creationTimestamp": "2026-01-01T00:09:00Z"},
        "spec": {},
        "status": {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/2 nodes are available"}]},
    }
    assert failures.of_waiting(waiting, "the pod", 61.0, NOW) is None
    end = failures.of_waiting(waiting, "the pod", 59.0, NOW)
    assert end is not None
    assert (end.reason, "0/2 nodes" in end.message) == ("Unschedulable", True)
    waiting["status"]["conditions"][0]["message"] = 'persistentvolumeclaim "data" not found'
    missing = failures.of_waiting(waiting, "the pod", 59.0, NOW)
    assert missing is not None
    assert missing.reason == "VolumeMissing"
    assert failures.of_waiting({**waiting, "spec": {"nodeName": "b"}}, "the pod", 0.0, NOW) is None


def waiting(reason: str) -> Json:
    return {"name": "main", "state": {"waiting": {"reason": reason, "message": "in the kubelet's words"}}}


MOUNT = {
    "type": "Warning",
    "reason": "FailedMount",
    "note": "no such volume",
    "deprecatedLastTimestamp": "2026-11-28T02:00:00Z",
}
LATER = {
    "type": "Warning",
    "reason": "FailedCreatePodSandBox",
    "note": "no room",
    "eventTime": "2026-11-28T02:00:01.000000Z",
}
SANDBOX = {"type": "PodReadyToStartContainers", "status": "True"}


@pytest.mark.parametrize(
    ("status", "warnings", "reason"),
    [
        ({}, [], None),
        ({}, [MOUNT], "VolumeMissing"),
        ({}, [LATER, MOUNT], "TargetPodStuck"),
        ({}, [{**MOUNT, "type": "Normal"}], None),
        ({"conditions": [{**SANDBOX, "status": "False"}]}, [MOUNT], "VolumeMissing"),
        ({"conditions": [SANDBOX]}, [MOUNT], None),
        ({"containerStatuses": [waiting("ContainerCreating")]}, [], None),
        ({"conditions": [SANDBOX], "containerStatuses": [waiting("ImagePullBackOff")]}, [], "TargetPodStuck"),
        ({"initContainerStatuses": [waiting("CreateContainerConfigError")]}, [], "TargetPodStuck"),
        ({"containerStatuses": [{"name": "main", "state": {"running": {}}}]}, [], None),
    ],
)
def test_what_keeps_the_target_pod_from_starting(status: Json, warnings: list[Json], reason: str | None) -> None:
    found = failures.of_start({"metadata": {}, "status": status}, warnings)
    assert (found.reason if found else None) == reason


def test_the_timeout_counts_from_the_start() -> None:
    late = Migration.from_json(
        {"metadata": {}, "spec": {"podName": "p", "timeout": "5m"}, "status": {"startTime": "2026-01-01T00:04:00Z"}}
    )
    assert failures.of_time(late, NOW, slack=61.0) is None
    end = failures.of_time(late, NOW, slack=30.0)
    assert end is not None
    assert end.reason == "TimedOut"


def test_only_a_node_that_is_gone_or_fenced_runs_nothing_for_certain() -> None:
    ready = {"spec": {}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    silent = {"spec": {}, "status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}
    fenced = {"spec": {"taints": [{"key": failures.OUT_OF_SERVICE}]}, "status": silent["status"]}
    assert [failures.gone_or_fenced(one) for one in (ready, silent, fenced, None)] == [False, False, True, True]


def test_an_error_that_is_none_of_the_api_servers_is_a_refusal_too() -> None:
    assert failures.of_creation(Failed("x", why="y"), "the pod").reason == "PodRefused"
