"""What deploy/ allows an agent, on the real API server: its certificate, its own Migrations, and nothing of another node's."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path

import anyio
import pytest

from podferry.agent import certificate
from podferry.controller import pods
from podferry.errors import Failed
from podferry.kube.api_errors import Forbidden
from podferry.kube.client import (
    CONFIGMAPS,
    JOBS,
    MIGRATIONS,
    NODE_DRAINS,
    NODES,
    PODS,
    REPLICASETS,
    Json,
    ResourceKind,
)
from podferry.kube.drain import BY_ANNOTATION, NodeDrain
from podferry.kube.migration import UID_LABEL
from podferry.kube.quantities import timestamp
from podferry.wire.pki import AGENT_LIFE
from podferry.wire.tls import Credentials

from .rights import KINDS, SYSTEM, apply, as_account, the_controller
from .world import World

pytestmark = [pytest.mark.cluster, pytest.mark.anyio]


@pytest.fixture
async def world(real_world: World) -> World:
    """With deploy/'s rights in the cluster."""
    await apply(real_world.api)
    return real_world


async def test_an_agent_gets_a_certificate_for_its_own_node_and_no_other(
    world: World, control_plane: Path, tmp_path: Path
) -> None:
    here, there = world.nodes
    async with the_controller(world, control_plane) as controller:
        async with as_account(world, control_plane, "podferry-agent", here) as agent:
            assert certificate.usable(tmp_path, here) == "there is none"
            await certificate.ensure(agent, SYSTEM, here, tmp_path)
            assert certificate.usable(tmp_path, here, await certificate.bundle(agent, SYSTEM)) is None
            assert Credentials.load(tmp_path).node == here
            assert (tmp_path / "node.key").stat().st_mode & 0o77 == 0
            before = (tmp_path / "node.crt").read_bytes()
            await certificate.ensure(agent, SYSTEM, here, tmp_path)
            assert (tmp_path / "node.crt").read_bytes() == before, "one that will do is kept"
            assert certificate.usable(tmp_path, there) == "it is another node's"
            with pytest.raises(Failed, match="denied"):
                await certificate.obtain(agent, SYSTEM, there, tmp_path / "stolen")
        async with as_account(world, control_plane, "podferry-agent", None) as unbound:
            with pytest.raises(Failed, match="denied"):
                await certificate.obtain(unbound, SYSTEM, here, tmp_path / "unbound")
        with pytest.raises(Forbidden):
            await controller.get(ResourceKind("v1", "Secret", "secrets"), "another", SYSTEM)


async def test_a_certificate_is_renewed_before_it_ends_and_when_the_authority_is_another(
    world: World, control_plane: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "CHECK_EVERY", 0.2)
    here, crt = world.nodes[0], tmp_path / "node.crt"
    async with as_account(world, control_plane, "podferry-agent", here) as agent, anyio.create_task_group() as tasks:
        async with the_controller(world, control_plane):
            await certificate.ensure(agent, SYSTEM, here, tmp_path)
            first = crt.read_bytes()
            tasks.start_soon(certificate.keep, agent, SYSTEM, here, tmp_path)
            await anyio.sleep(1.0)
            assert crt.read_bytes() == first, "one that will do is kept"

            async def renewed() -> bool:
                return crt.read_bytes() != first

            with monkeypatch.context() as patch:
                patch.setattr(certificate, "RENEW", AGENT_LIFE + timedelta(minutes=1))
                await world.until(renewed)
        old = await certificate.bundle(agent, SYSTEM)
        await world.api.delete(ResourceKind("v1", "Secret", "secrets"), certificate.BUNDLE, SYSTEM)
        async with the_controller(world, control_plane):
            ca = tmp_path / "ca.crt"

            async def both_are_trusted() -> bool:
                return ca.read_bytes() == await certificate.bundle(agent, SYSTEM) != old

            await world.until(both_are_trusted)
            assert ca.read_bytes().endswith(old)
            before = crt.read_bytes()
            await anyio.sleep(1.0)
            assert crt.read_bytes() == before, "until all trust the new authority, the old one's certificate is shown"
            monkeypatch.setattr(certificate, "OVERLAP", timedelta(hours=-2))

            async def of_the_new_authority() -> bool:
                return crt.read_bytes() != before

            await world.until(of_the_new_authority)
            assert certificate.usable(tmp_path, here, ca.read_bytes()) is None
            assert Credentials.load(tmp_path).node == here
        tasks.cancel_scope.cancel()


def template(restart: str) -> Json:
    spec = {
        "runtimeClassName": "podferry",
        "containers": [{"name": "main", "image": "train"}],
        "restartPolicy": restart,
    }
    return {"metadata": {"labels": {"app": "train"}}, "spec": spec}


@pytest.mark.parametrize("kind", [JOBS, REPLICASETS, None], ids=["job", "replicaset", "nobody"])
async def test_a_whole_migration_is_within_the_controllers_rights(
    world: World, control_plane: Path, kind: ResourceKind | None
) -> None:
    """Under OwnerReferencesPermissionEnforcement: whoever blocks an owner's deletion needs a right on the owner."""
    if kind is None:
        await world.pod("train", labels={"app": "train"})
    else:
        of_kind: Json = {"selector": {"matchLabels": {"app": "train"}}, "template": template("Always")}
        spec = {"template": template("Never")} if kind is JOBS else of_kind
        await world.api.create(kind, {"metadata": {"name": "train"}, "spec": spec}, world.namespace)
    source = await only_trainer(world)
    async with the_controller(world, control_plane):
        await world.migrate(source["metadata"]["name"], ttlSecondsAfterFinished=1)
        await world.agents_move()

        async def gone() -> bool:
            return await world.api.find(MIGRATIONS, "move", world.namespace) is None

        await world.until(gone)
    left = await only_trainer(world)
    assert left["metadata"]["uid"] != source["metadata"]["uid"]
    assert left["metadata"].get("ownerReferences") == source["metadata"].get("ownerReferences")
    if kind is not None:
        assert left["metadata"]["ownerReferences"][0]["blockOwnerDeletion"]
        await world.api.delete(kind, "train", world.namespace)


async def test_the_controller_may_drain_a_node_that_goes_away_again_and_again(
    world: World, control_plane: Path
) -> None:
    """It makes, hurries and replaces NodeDrains."""
    node = world.nodes[0]
    world.also.append((NODE_DRAINS, node))

    async def drained(by: str) -> bool:
        found = await world.api.find(NODE_DRAINS, node)
        return found is not None and NodeDrain.from_json(found).spec.deadline == by and NodeDrain.from_json(found).ended

    async with the_controller(world, control_plane):
        for by in ("2030-01-01T00:00:00Z", "2031-01-01T00:00:00Z"):
            await world.patch(NODES, node, {"metadata": {"annotations": {BY_ANNOTATION: by}}})
            await world.until(partial(drained, by))
        await world.patch(NODES, node, {"metadata": {"annotations": {BY_ANNOTATION: None}}})

        async def over() -> bool:
            return not NodeDrain.from_json(await world.api.get(NODE_DRAINS, node)).about

        await world.until(over)


async def test_a_drain_is_within_the_controllers_rights_and_of_a_node_it_changes_nothing_else(
    world: World, control_plane: Path
) -> None:
    node = world.nodes[0]
    world.also.append((NODE_DRAINS, node))
    await world.pod("tied", volumes=[{"name": "h", "hostPath": {"path": "/srv"}}])
    await world.pod()
    async with the_controller(world, control_plane) as controller:
        await world.api.create(NODE_DRAINS, {"metadata": {"name": node}, "spec": {"evictOthers": True}})

        async def begun() -> bool:
            return bool((await world.api.list(MIGRATIONS, world.namespace))[0])

        await world.until(begun)
        (made,) = (await world.api.list(MIGRATIONS, world.namespace))[0]
        await world.agents_move(made["metadata"]["name"])

        async def ended() -> bool:
            return NodeDrain.from_json(await world.api.get(NODE_DRAINS, node)).ended

        await world.until(ended)
        drain = NodeDrain.from_json(await world.api.get(NODE_DRAINS, node))
        assert (drain.status.phase, {one.name: str(one.state) for one in drain.status.pods}) == (
            "Completed",
            {"train": "Moved", "tied": "Gone"},
        )
        for change in (
            {"metadata": {"labels": {"x": "y"}}},
            {"metadata": {"annotations": {"x": "y"}}},
            {"spec": {"taints": [{"key": "x", "effect": "NoExecute"}]}},
            {"spec": {"unschedulable": None}},
        ):
            with pytest.raises(Forbidden, match="the controller"):
                await controller.patch(NODES, node, change, uid=None)


async def only_trainer(world: World) -> Json:
    """The one pod, once it runs."""

    async def runs() -> bool:
        found, _ = await world.api.list(PODS, world.namespace, labels={"app": "train"})
        here = [one for one in found if one["spec"].get("nodeName") and one["status"]["phase"] == "Running"]
        return len(found) == len(here) == 1

    await world.until(runs)
    (pod,) = (await world.api.list(PODS, world.namespace, labels={"app": "train"}))[0]
    return pod


async def test_an_owner_that_podferry_does_not_know_keeps_the_pod_but_its_deletion_does_not_wait(
    world: World, control_plane: Path
) -> None:
    made = await world.api.create(CONFIGMAPS, {"metadata": {"name": "group"}}, world.namespace)
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "group", "uid": made["metadata"]["uid"]}
    await world.pod(labels={"app": "train"})
    await world.patch(
        PODS, "train", {"metadata": {"ownerReferences": [{**owner, "blockOwnerDeletion": True}]}}, world.namespace
    )
    async with the_controller(world, control_plane):
        await world.migrate()
        await world.agents_move()
        assert (await world.ended()).status.phase == "Completed"
    assert (await only_trainer(world))["metadata"]["ownerReferences"] == [owner]


REVIEWS = ResourceKind("authorization.k8s.io/v1", "SubjectAccessReview", "subjectaccessreviews", namespaced=False)


@pytest.mark.parametrize(
    ("role", "verb", "allowed"),
    [("view", "list", True), ("view", "create", False), ("edit", "create", True), ("admin", "delete", True)],
)
async def test_what_people_may_do_with_migrations(world: World, role: str, verb: str, allowed: bool) -> None:
    user = f"{role}-of-{world.namespace}"
    binding = {
        "metadata": {"name": role},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
    }
    await world.api.create(KINDS["RoleBinding"], binding, world.namespace)

    async def may(what: str) -> bool:
        asked = {
            "namespace": world.namespace,
            "verb": what,
            "group": MIGRATIONS.api.split("/")[0],
            "resource": "migrations",
        }
        body = {"metadata": {}, "spec": {"user": user, "resourceAttributes": asked}}
        return bool((await world.api.create(REVIEWS, body))["status"]["allowed"])

    await world.until(partial(may, "list"))  # the roles are put together by a controller
    if allowed:
        await world.until(partial(may, verb))
    else:
        assert not await may(verb)


async def test_nobody_but_the_controller_writes_podferrys_words_on_pods(world: World, control_plane: Path) -> None:
    """Wherever podferry is installed: the policy knows the controller by what it may do, not by its name."""
    role = {
        "metadata": {"name": "tenant"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "admin"},
        "subjects": [{"kind": "ServiceAccount", "name": "podferry-controller", "namespace": world.namespace}],
    }
    await world.api.create(KINDS["ServiceAccount"], {"metadata": {"name": "podferry-controller"}}, world.namespace)
    await world.api.create(KINDS["RoleBinding"], role, world.namespace)
    await world.pod("mine")
    async with as_account(world, control_plane, "podferry-controller", None, world.namespace) as tenant:

        async def may_write() -> bool:
            try:
                change = {"metadata": {"annotations": {"x": "y"}}}
                await tenant.patch(PODS, "mine", change, world.namespace, uid=None)
            except Forbidden:
                return False
            return True

        await world.until(may_write)
        wish = {"metadata": {"annotations": {"podferry.dev/priority": "3"}}}
        await tenant.patch(PODS, "mine", wish, world.namespace, uid=None)
        for about in (
            {"annotations": {"podferry.dev/origin": "../../victim/pods/db-0?x="}},
            {"annotations": {"podferry.dev/handed-over": "uid"}},
            {"labels": {"podferry.dev/migration-uid": "uid"}},
            {"labels": {"podferry.dev/role": "target"}},
        ):

            async def refused(about: Json = about) -> bool:
                try:
                    await tenant.patch(PODS, "mine", {"metadata": about}, world.namespace, uid=None)
                except Forbidden as error:
                    return "podferry's controller's to write" in str(error)
                return False

            await world.until(refused)  # a policy takes effect a moment after it was made
            body = {"metadata": {"name": "made", **about}, "spec": {"containers": [{"name": "x", "image": "x"}]}}
            with pytest.raises(Forbidden, match="podferry's controller's to write"):
                await tenant.create(PODS, body, world.namespace)


async def test_no_kubelet_calls_a_pod_ready_again_whose_job_has_moved(world: World) -> None:
    """A Job would remove the pod that the job runs in, which has been ready for less time."""
    made = await world.pod("train", labels={UID_LABEL: "of-a-migration"})

    async def status(pod: Json, ready: str, reason: str = "") -> Json:
        condition = {"type": "Ready", "status": ready, "reason": reason, "lastTransitionTime": timestamp()}
        change = {"status": {"conditions": [condition]}}
        about = pod["metadata"]
        return await world.api.patch(PODS, about["name"], change, about["namespace"], uid=about["uid"], part="status")

    async def refused() -> bool:
        marked = pods.not_ready(await status(made, "True"), timestamp())
        await world.api.patch(PODS, "train", marked, world.namespace, uid=made["metadata"]["uid"], part="status")
        try:
            await status(made, "True")
        except Forbidden as error:
            return "has moved to another node" in str(error)
        return False

    await world.until(refused)  # a policy takes effect a moment after it was made
    await status(made, "False", "Migrated")
    released = pods.unclaim(await world.api.get(PODS, "train", world.namespace))
    await world.api.patch(PODS, "train", released, world.namespace, uid=made["metadata"]["uid"])
    await status(made, "True")


async def test_an_agent_reads_neither_nodes_nor_pods(world: World, control_plane: Path) -> None:
    """What it needs of them the controller writes into Migrations."""
    async with as_account(world, control_plane, "podferry-agent", world.nodes[0]) as agent:
        await agent.list(MIGRATIONS)
        for kind, name, namespace in ((NODES, world.nodes[0], ""), (PODS, "train", world.namespace)):
            with pytest.raises(Forbidden):
                await agent.find(kind, name, namespace)
            with pytest.raises(Forbidden):
                await agent.list(kind)
