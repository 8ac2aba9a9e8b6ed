"""What a user who may write pods and Migrations in one namespace tries, on the fake and on the real API server.

The API server's own checks and the admission policies are not relied on here: objects are written as a cluster without them would
have taken them. tests/kube/test_rights.py shows the policies.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import AsyncIterator

import anyio
import pytest

from podferry.cli import kubectl_drain, kubectl_moves
from podferry.controller import pods
from podferry.controller.program import Controller
from podferry.controller.surroundings import Surveyor
from podferry.errors import UsageError
from podferry.kube.api_errors import ApiFailed
from podferry.kube.client import EVENTS, JOBS, MIGRATIONS, NAMESPACES, NODE_DRAINS, PODS, Json, ResourceKind
from podferry.kube.connection_status import ListedConnection
from podferry.kube.migration import (
    HANDED_OVER_ANNOTATION,
    ORIGIN_ANNOTATION,
    ROLE_LABEL,
    TARGET_CREATED,
    TARGET_REQUESTED,
    UID_LABEL,
    EnginePhases,
    Migration,
)

from .world import QUICK, World

pytestmark = pytest.mark.anyio
VICTIM = "db-0"
POLICIES = "admissionregistration.k8s.io/v1"
MUTATING_POLICIES = ResourceKind(POLICIES, "MutatingAdmissionPolicy", "mutatingadmissionpolicies", namespaced=False)
MUTATING_BINDINGS = ResourceKind(
    POLICIES, "MutatingAdmissionPolicyBinding", "mutatingadmissionpolicybindings", namespaced=False
)


@pytest.fixture
async def victim(world: World) -> AsyncIterator[tuple[str, Json]]:
    """Another namespace with a pod in it, which must stay as it is."""
    namespace = f"v-{secrets.token_hex(3)}"
    await world.api.create(NAMESPACES, {"metadata": {"name": namespace}})
    if world.fake is None:
        await world.until(lambda: _has_account(world, namespace))
    body = {"metadata": {"name": VICTIM}, "spec": {"containers": [{"name": "main", "image": "db"}]}}
    body["spec"]["nodeSelector"] = {"no": "node"}  # type: ignore[index]
    made = await world.api.create(PODS, body, namespace)
    yield namespace, made
    await world.api.delete(PODS, VICTIM, namespace, grace=0)
    await world.api.delete(NAMESPACES, namespace)


async def _has_account(world: World, namespace: str) -> bool:
    from .world import ACCOUNTS

    return await world.api.find(ACCOUNTS, "default", namespace) is not None


async def unharmed(world: World, victim: tuple[str, Json]) -> None:
    namespace, before = victim
    now = await world.api.get(PODS, VICTIM, namespace)
    assert "deletionTimestamp" not in now["metadata"]
    for part in ("uid", "labels", "annotations", "ownerReferences"):
        assert now["metadata"].get(part) == before["metadata"].get(part), part
    said = [one for one in (await world.api.list(EVENTS, namespace))[0] if "podferry" in str(one)]
    assert said == []


@pytest.mark.parametrize("tail", ["?x=", "#", ";", "/", ""])
async def test_an_origin_that_names_another_namespaces_pod_deletes_nothing(
    world: World, victim: tuple[str, Json], tail: str
) -> None:
    await world.pod()
    origin = f"../../{victim[0]}/pods/{VICTIM}{tail}"
    await world.patch(PODS, "train", {"metadata": {"annotations": {ORIGIN_ANNOTATION: origin}}}, world.namespace)
    world.controller()
    await world.migrate()
    await world.agents_move()
    assert (await world.ended()).status.phase == "Completed"
    (left,) = (await world.api.list(PODS, world.namespace))[0]
    assert left["metadata"]["name"].startswith("train-")
    await unharmed(world, victim)


@pytest.mark.parametrize("field", ["podName", "targetNode"])
async def test_a_name_that_is_a_path_is_refused(world: World, victim: tuple[str, Json], field: str) -> None:
    await world.pod()
    name = f"../../{victim[0]}/pods/{VICTIM}"
    if world.fake is None:
        with pytest.raises(ApiFailed, match=f"spec.{field}"):
            await world.migrate(**{"pod": name} if field == "podName" else {field: name})
        return
    world.controller()
    await world.migrate(**{"pod": name} if field == "podName" else {field: name})
    ended = await world.ended()
    assert (ended.status.phase, ended.status.ending and ended.status.ending.reason) == ("Refused", "NameInvalid")
    await unharmed(world, victim)


async def scheduled(world: World) -> tuple[Json, Migration]:
    """A Migration of a pod, before the target pod is made."""
    source = await world.pod()
    world.controller()
    await world.migrate()
    return source, await world.reached(lambda one: one.status.phase == "Running")


async def request_target(world: World) -> None:
    def asked(now: Migration) -> bool:
        now.status.engine = EnginePhases(source="prepare-target", target="receive")
        now.status.set_condition(TARGET_REQUESTED, True, "Converged")
        return True

    await world.set(asked)


@pytest.mark.parametrize("forged", ["labels", "owner"])
async def test_a_pod_under_the_foreseen_name_is_not_taken_for_the_target(world: World, forged: str) -> None:
    source, migration = await scheduled(world)
    body = pods.target_pod(source, migration, world.nodes[1], _now())
    if forged == "labels":
        body["metadata"] = {"name": body["metadata"]["name"], "labels": body["metadata"]["labels"]}
    else:
        about = source["metadata"]
        owner = {"apiVersion": "v1", "kind": "Pod", "name": about["name"], "uid": about["uid"], "controller": True}
        body["metadata"]["ownerReferences"] = [owner]
    await world.api.create(PODS, copy.deepcopy(body), world.namespace)
    await request_target(world)
    stopped = await world.reached(lambda one: one.status.abort is not None)
    assert stopped.status.abort is not None
    assert stopped.status.abort.reason == "NameTaken"
    assert stopped.status.target_pod is None
    if world.fake is not None:
        await world.agents_end("rolled-back")
        await world.ended()
        assert await world.api.find(PODS, body["metadata"]["name"], world.namespace) is not None, (
            "it is not ours to delete"
        )


@pytest.mark.parametrize("forged", ["another image", "a sidecar", "running"])
async def test_a_pod_that_names_the_migration_as_its_owner_is_removed_and_never_adopted(
    world: World, forged: str
) -> None:
    """Its maker cannot have made it as the controller would, without its containers running by then."""
    source, migration = await scheduled(world)
    body = pods.target_pod(source, migration, world.nodes[1], _now())
    if forged == "another image":
        body["spec"]["containers"] = [{"name": "main", "image": "mine", "command": ["sh"]}]
    elif forged == "a sidecar":
        body["spec"]["containers"].append({"name": "proxy", "image": "proxy"})
    elif world.fake is None:
        pytest.skip("the real kubelet is played here: a pod that runs is shown on the fake")
    made = await world.api.create(PODS, copy.deepcopy(body), world.namespace)
    if forged == "running":
        made = await world.patch(
            PODS, made["metadata"]["name"], {"spec": {"nodeName": world.nodes[1]}}, world.namespace
        )
        await world.report(made, "Running", {"running": {}}, ready=True)
    await request_target(world)
    dressed = await world.reached(lambda one: one.status.holds(TARGET_CREATED) or one.ended)
    assert dressed.status.target_pod is not None
    assert dressed.status.target_pod.uid != made["metadata"]["uid"]
    target = await world.api.get(PODS, dressed.status.target_pod.name, world.namespace)
    assert [one["image"] for one in target["spec"]["containers"]] == ["train"]


async def test_a_target_that_admission_has_added_to_is_known_again_after_a_restart(world: World) -> None:
    """The controller is killed as soon as the pod is there; the next one finds containers that it did not ask for."""
    if world.fake is not None:
        pytest.skip("admission is the real API server's")
    await world.pod()
    policy = {
        "metadata": {"name": world.namespace},
        "spec": {
            "matchConstraints": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": world.namespace}},
                "resourceRules": [
                    {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
                ],
            },
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "mutations": [
                {
                    "patchType": "JSONPatch",
                    "jsonPatch": {
                        "expression": '[JSONPatch{op: "add", path: "/spec/containers/-", '
                        'value: Object.spec.containers{name: "proxy", image: "proxy"}}]'
                    },
                }
            ],
        },
    }
    binding = {"metadata": {"name": world.namespace}, "spec": {"policyName": world.namespace}}
    await world.api.create(MUTATING_POLICIES, policy)
    await world.api.create(MUTATING_BINDINGS, binding)
    world.also += [(MUTATING_POLICIES, world.namespace), (MUTATING_BINDINGS, world.namespace)]

    async def injects() -> bool:
        body = {"metadata": {"name": "probe"}, "spec": {"containers": [{"name": "x", "image": "x"}]}}
        made = await world.api.create(PODS, body, world.namespace)
        await world.api.delete(PODS, "probe", world.namespace, uid=made["metadata"]["uid"], grace=0)
        return len(made["spec"]["containers"]) == 2

    await world.until(injects)
    scope = world.controller()
    await world.migrate()
    running = await world.reached(lambda one: one.status.phase == "Running")
    scope.cancel()
    source = await world.api.get(PODS, "train", world.namespace)
    body = pods.target_pod(source, running, world.nodes[1], _now())
    made = await world.api.create(PODS, body, world.namespace)  # and nothing more, as if killed just then
    assert len(made["spec"]["containers"]) == 2
    world.controller()
    await world.agents_move()
    assert (await world.ended()).status.phase == "Completed"


@pytest.mark.parametrize("kind", ["Job", "ReplicaSet"])
async def test_an_owner_with_a_name_that_is_a_path_ends_the_migration(
    world: World, victim: tuple[str, Json], kind: str
) -> None:
    """The API server does not check the names of owners. The real one's garbage collector soon deletes such a pod."""
    if world.fake is None:
        pytest.skip("the garbage collector deletes the pod first")
    await world.pod()
    group = "batch/v1" if kind == "Job" else "apps/v1"
    name = f"../../{victim[0]}/pods/{VICTIM}"
    owner = {"apiVersion": group, "kind": kind, "name": name, "uid": "u", "controller": True}
    await world.patch(PODS, "train", {"metadata": {"ownerReferences": [owner]}}, world.namespace)
    world.controller()
    await world.migrate()
    ended = await world.reached(lambda one: one.ended or one.status.phase == "Running")
    if kind == "Job":
        assert (ended.status.phase, ended.status.ending and ended.status.ending.reason) == ("Refused", "OwnerGone")
    else:
        assert ended.status.phase == "Running", "a ReplicaSet is not asked for its wishes"
    await unharmed(world, victim)


async def test_a_name_that_no_object_can_have_ends_a_migration_that_runs(
    world: World, victim: tuple[str, Json]
) -> None:
    """Who may write the status could write one. It is not tried for ever."""
    if world.fake is None:
        pytest.skip("the real API server refuses such a name in the status")
    await scheduled(world)

    def forged(now: Migration) -> bool:
        now.status.target_node = f"../../{victim[0]}/pods/{VICTIM}"
        return True

    await world.set(forged)
    ended = await world.ended()
    assert ended.status.ending is not None
    assert (ended.status.phase, ended.status.ending.reason) == ("Failed", "NameInvalid")
    await unharmed(world, victim)


async def test_another_groups_job_is_no_job_of_kubernetes(world: World) -> None:
    """Volcano's Job has a Job of Kubernetes of its name beside it, suspended: that is none of the pod's."""
    job = {
        "metadata": {"name": "train"},
        "spec": {
            "suspend": True,
            "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "x", "image": "x"}]}},
        },
    }
    made = await world.api.create(JOBS, job, world.namespace)
    uid = made["metadata"]["uid"]
    owner = {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "name": "train", "uid": uid, "controller": True}
    await world.pod()
    await world.patch(PODS, "train", {"metadata": {"ownerReferences": [owner]}}, world.namespace)
    pod = await world.api.get(PODS, "train", world.namespace)
    assert await Surveyor(world.api).owner(pod) is None
    world.controller()
    await world.migrate()
    ended = await world.ended()
    assert (ended.status.phase, ended.status.ending and ended.status.ending.reason) == ("Refused", "UnknownOwner")
    await world.api.delete(JOBS, "train", world.namespace)


async def test_what_is_meant_for_one_object_does_not_change_the_next_of_its_name(world: World) -> None:
    await world.pod()
    first = await world.migrate()
    await world.api.delete(MIGRATIONS, "move", world.namespace)
    second = await world.migrate()
    assert second.uid != first.uid
    with pytest.raises(UsageError, match="was deleted"):
        await kubectl_moves._cancel(world.api, first)
    assert (await world.get()).spec.cancel is False
    await kubectl_moves._cancel(world.api, second)
    assert (await world.get()).spec.cancel is True


async def test_a_drain_that_was_replaced_is_not_stopped_for_the_other(world: World) -> None:
    node = world.nodes[0]
    first = await world.api.create(NODE_DRAINS, {"metadata": {"name": node}, "spec": {}})
    await world.api.delete(NODE_DRAINS, node)
    world.also.append((NODE_DRAINS, node))
    await world.api.create(NODE_DRAINS, {"metadata": {"name": node}, "spec": {}})
    with pytest.raises(UsageError, match="was deleted"):
        await kubectl_drain._change(world.api, first, {"stop": True})
    assert not (await world.api.get(NODE_DRAINS, node))["spec"].get("stop")


async def test_a_migration_that_names_a_drain_as_its_owner_is_its_only_by_the_uid(world: World) -> None:
    """Its end has the drain looked at: nothing else than that drain, and nothing for a name that leads elsewhere."""
    node = world.nodes[0]
    drain = await world.api.create(NODE_DRAINS, {"metadata": {"name": node}, "spec": {"stop": True}})
    world.also.append((NODE_DRAINS, node))
    controller = Controller(world.api, world.namespace, QUICK)
    controller._drain_of_uid[drain["metadata"]["uid"]] = node
    for name, uid, found in (
        ("../../x", "u", None),
        (node, "u", None),
        (node, drain["metadata"]["uid"], node),
        ("../../x", drain["metadata"]["uid"], node),
    ):
        owner = {"apiVersion": "podferry.dev/v1alpha1", "kind": "NodeDrain", "name": name, "uid": uid}
        assert controller._drain_of({"metadata": {"ownerReferences": [owner]}}) == found


async def test_a_pod_under_the_placeholders_name_chooses_no_node(world: World) -> None:
    await world.pod()
    migration = await world.migrate()
    source = await world.api.get(PODS, "train", world.namespace)
    body = pods.placeholder_pod(source, migration, "pause")
    forged: Json = {
        "metadata": {"name": body["metadata"]["name"], "labels": {UID_LABEL: migration.uid, ROLE_LABEL: "placeholder"}},
        "spec": {"nodeName": world.nodes[1], "containers": [{"name": "x", "image": "x"}]},
    }
    await world.api.create(PODS, forged, world.namespace)
    world.controller(QUICK)
    ended = await world.ended()
    assert (ended.status.phase, ended.status.ending and ended.status.ending.reason) == ("RolledBack", "NameTaken")
    assert ended.status.target_node is None
    assert await world.api.find(PODS, body["metadata"]["name"], world.namespace) is not None


async def test_a_target_that_only_says_that_it_was_handed_over_is_not(world: World) -> None:
    await world.pod(labels={"app": "train"})
    world.controller()
    await world.migrate()
    prepared = await world.agents_prepare_target()
    assert prepared.status.target_pod is not None
    forged = {"metadata": {"annotations": {HANDED_OVER_ANNOTATION: "somebody"}}}
    await world.patch(PODS, prepared.status.target_pod.name, forged, world.namespace)
    await world.agents_resume()
    await world.agents_part()
    assert (await world.ended()).status.phase == "Completed"
    (left,) = (await world.api.list(PODS, world.namespace))[0]
    assert left["metadata"]["labels"] == {"app": "train"}, "the hand-over took place after all"


async def test_a_label_alone_has_no_pod_deleted_when_a_migration_is_undone(world: World) -> None:
    _, migration = await scheduled(world)
    bystander = await world.pod("bystander")
    forged = {"metadata": {"labels": {UID_LABEL: migration.uid, ROLE_LABEL: "target"}}}
    await world.patch(PODS, "bystander", forged, world.namespace)
    await world.patch(MIGRATIONS, "move", {"spec": {"cancel": True}}, world.namespace)
    assert (await world.ended()).status.phase == "Cancelled"
    await anyio.sleep(0.3)
    now = await world.api.get(PODS, "bystander", world.namespace)
    assert now["metadata"]["uid"] == bystander["metadata"]["uid"]
    assert "deletionTimestamp" not in now["metadata"]


def _now() -> object:
    import datetime

    return datetime.datetime.now(datetime.UTC)


async def test_no_migration_tells_the_name_of_another_namespaces_pod(world: World, victim: tuple[str, Json]) -> None:
    namespace, _ = victim
    address = "10.67.0.9"
    await world.patch(
        PODS, VICTIM, {"status": {"podIP": address, "podIPs": [{"ip": address}]}}, namespace, part="status"
    )
    await world.pod()
    world.controller()
    await world.migrate()
    await world.reached(lambda one: one.status.phase == "Running")
    end = {"protocol": "tcp", "local": "10.67.0.5:1", "remote": f"{address}:5432", "peer": "another", "fate": "closed"}

    def listed(now: Migration) -> bool:
        now.status.engine = EnginePhases(source="check")
        now.status.connections = [ListedConnection.model_validate(end)]
        return True

    await world.set(listed)
    seen = await world.reached(lambda one: bool(one.status.peers))
    assert [(one.address, str(one.kind), one.name) for one in seen.status.peers] == [(address, "Pod", "")]
    assert VICTIM not in str(seen.to_json())
