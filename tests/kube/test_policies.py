"""deploy/'s admission policies on the real API server: who writes which field of a status, whose pods are the controller's to
touch, and who is said to have asked.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from podferry.kube.api_errors import ApiFailed, Forbidden
from podferry.kube.client import MIGRATIONS, NODE_DRAINS, NODES, PODS, Api, Json
from podferry.kube.migration import ROLE_LABEL, UID_LABEL
from podferry.kube.writers import BY_CONTROLLER, MIGRATION_CONDITIONS, MIGRATION_STATUS, Writer

from .rights import DEPLOY, KINDS, apply, as_account
from .world import World

pytestmark = [pytest.mark.cluster, pytest.mark.anyio]

THEN, LATER = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
END = {"outcome": "failed", "reason": "Forged"}
BEFORE: Json = {
    "settings": {"policy": "mine", "mode": "live"},
    "phase": "Running",
    "observedGeneration": 1,
    "sourcePod": {"name": "train", "uid": "s"},
    "targetPod": {"name": "train-x", "uid": "t"},
    "containers": [{"name": "main"}],
    "owner": {"kind": "Job", "name": "train"},
    "keepsName": True,
    "keptPlace": "{}",
    "engine": {"source": "pre-copy", "target": "receive"},
    "progress": {"bytes": 1},
    "sourceAddress": "10.0.0.1",
    "targetAddress": "10.0.0.2",
    "downtime": "1ms",
    "forecast": "1ms",
    "warnings": ["mind"],
    "connections": [
        {
            "protocol": "tcp",
            "local": "10.0.0.1:1",
            "remote": "10.0.0.2:2",
            "peer": "another",
            "fate": "closed",
            "why": "so",
        }
    ],
    "sourcePodAddresses": ["10.0.0.1"],
    "peers": [{"address": "10.0.0.2", "kind": "Node"}],
    "closedConnections": ["a -> b"],
    "abort": {"outcome": "failed", "reason": "Asked"},
    "engineEnding": {"outcome": "failed", "reason": "Broken"},
    "ending": {"outcome": "failed", "reason": "Broken"},
    "arbiter": "target",
    "message": "copying",
    "startTime": THEN,
    "completionTime": THEN,
}
FORGED: Json = {
    "phase": "Completed",
    "observedGeneration": 9,
    "sourceNode": "another",
    "targetNode": "another",
    "sourcePod": {"name": "train", "uid": "another"},
    "targetPod": {"name": "train", "uid": "another"},
    "containers": [{"name": "main"}, {"name": "more"}],
    "owner": {"kind": "Job", "name": "another"},
    "keepsName": False,
    "keptPlace": "[]",
    "settings": {"policy": "another", "mode": "stop"},
    "engine.source": "commit",
    "engine.target": "fill",
    "progress": {"bytes": 2},
    "sourceAddress": "10.0.0.66",
    "targetAddress": "10.0.0.66",
    "downtime": "2ms",
    "forecast": "2ms",
    "warnings": ["all is well"],
    "connections": [
        {
            "protocol": "tcp",
            "local": "10.0.0.1:1",
            "remote": "10.0.0.2:2",
            "peer": "another",
            "fate": "lives",
            "why": "it does",
        }
    ],
    "sourcePodAddresses": ["10.0.0.66"],
    "peers": [{"address": "10.0.0.2", "kind": "Outside"}],
    "closedConnections": [],
    "abort": END,
    "engineEnding": END,
    "ending": END,
    "arbiter": "source",
    "message": "done",
    "startTime": LATER,
    "completionTime": LATER,
}


@dataclass
class Accounts:
    """The API server as each program sees it, by its own token."""

    by: dict[Writer, Api]
    stranger: Api


@pytest.fixture
async def world(real_world: World) -> World:
    """With deploy/'s rights in the cluster."""
    await apply(real_world.api)
    return real_world


@pytest.fixture
async def accounts(world: World, control_plane: Path) -> AsyncIterator[Accounts]:
    other = f"{world.namespace}-c"
    await world.api.create(NODES, {"metadata": {"name": other}})
    world.also.append((NODES, other))
    async with AsyncExitStack() as stack:

        async def account(name: str, node: str | None) -> Api:
            return await stack.enter_async_context(as_account(world, control_plane, name, node))

        here, there = world.nodes
        by = {
            Writer.SOURCE: await account("podferry-agent", here),
            Writer.TARGET: await account("podferry-agent", there),
            Writer.CONTROLLER: await account("podferry-controller", None),
        }
        yield Accounts(by, await account("podferry-agent", other))


async def allowed(does: Callable[[], Awaitable[Any]]) -> bool:
    """Whether the API server lets it pass. Only its refusal by right or policy counts as one."""
    try:
        await does()
    except Forbidden:
        return False
    return True


async def dry(api: Api, verb: str, path: str, body: Json) -> Json:
    """What the API server would answer; nothing is changed."""
    return await api._call(verb, path, {"dryRun": "All"}, body=body, what=f"{verb} {path}")


def changed(status: Json, path: str, value: Any) -> Json:
    new = copy.deepcopy(status)
    *groups, last = path.split(".")
    here = new
    for one in groups:
        here = here[one]
    here.pop(last) if value is None else here.__setitem__(last, value)
    return new


async def running(world: World) -> Json:
    """A Migration in whose status every field is set."""
    made = await world.migrate()
    nodes = {"sourceNode": world.nodes[0], "targetNode": world.nodes[1]}
    said = [condition(type, "True") for type in (*MIGRATION_CONDITIONS, "TargetCreated")]
    return await world.patch(
        MIGRATIONS, made.name, {"status": {**BEFORE, **nodes, "conditions": said}}, world.namespace, part="status"
    )


def condition(type: str, status: str) -> Json:
    return {"type": type, "status": status, "reason": "Said", "lastTransitionTime": THEN}


async def who_may(accounts: Accounts, path: str, body: Json) -> set[Writer]:
    """Who may put this in the place of what is there. A stranger never may."""
    assert not await allowed(partial(dry, accounts.stranger, "PUT", path, body))
    return {one for one, api in accounts.by.items() if await allowed(partial(dry, api, "PUT", path, body))}


async def test_each_field_of_a_status_is_written_by_its_writers_and_nobody_else(
    world: World, accounts: Accounts
) -> None:
    before = await running(world)
    path = MIGRATIONS.path(world.namespace, "move", "status")

    def with_status(status: Json) -> Json:
        return {**before, "status": status}

    async def in_effect() -> bool:
        return not await who_may_or_none(with_status({**before["status"], "phase": "Completed"})) & {Writer.SOURCE}

    async def who_may_or_none(body: Json) -> set[Writer]:
        return {one for one, api in accounts.by.items() if await allowed(partial(dry, api, "PUT", path, body))}

    await world.until(in_effect)  # a policy takes effect a moment after it was made
    assert await who_may(accounts, path, with_status(before["status"])) == set(Writer), "nothing is changed"
    assert set(FORGED) == set(MIGRATION_STATUS)
    found, wanted = {}, {}
    for field, writers in MIGRATION_STATUS.items():
        for value in (FORGED[field], None):
            if (value is None and field == "sourceNode") or field == "targetNode":
                continue
            forged = changed(before["status"], field, value)
            found[field, str(value)] = await who_may(accounts, path, with_status(forged))
            wanted[field, str(value)] = set(writers)
    for type in (*MIGRATION_CONDITIONS, "TargetCreated", "Completed", "Mine"):
        others = [one for one in before["status"]["conditions"] if one["type"] != type]
        for conditions in ([*others, condition(type, "False")], *([others] if type in MIGRATION_CONDITIONS else [])):
            forged = {**before["status"], "conditions": conditions}
            found[type, str(len(conditions))] = await who_may(accounts, path, with_status(forged))
            wanted[type, str(len(conditions))] = set(MIGRATION_CONDITIONS.get(type, BY_CONTROLLER))
    assert found == wanted


async def test_a_drains_status_is_the_controllers(world: World, accounts: Accounts) -> None:
    world.also.append((NODE_DRAINS, world.nodes[0]))
    made = await world.api.create(NODE_DRAINS, {"metadata": {"name": world.nodes[0]}, "spec": {}})
    body = {**made, "status": {"phase": "Completed"}}
    assert await who_may(accounts, NODE_DRAINS.path("", world.nodes[0], "status"), body) == {Writer.CONTROLLER}


async def test_agents_read_no_pods(world: World, accounts: Accounts) -> None:
    await world.pod()
    for api in (accounts.by[Writer.SOURCE], accounts.stranger):
        with pytest.raises(Forbidden):
            await api.get(PODS, "train", world.namespace)
        with pytest.raises(Forbidden):
            await api.list(PODS)


async def test_the_policies_hold_in_whatever_namespace_podferry_is_installed(world: World, control_plane: Path) -> None:
    elsewhere = f"{world.namespace}-system"
    await apply(world.api, ("rbac.yaml",), elsewhere)
    for name in ("podferry-agent", "podferry-controller"):
        binding = {
            "metadata": {"name": f"{name}-{elsewhere}"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": elsewhere}],
        }
        await world.api.create(KINDS["ClusterRoleBinding"], binding)
        world.also.append((KINDS["ClusterRoleBinding"], f"{name}-{elsewhere}"))
    before = await running(world)
    path = MIGRATIONS.path(world.namespace, "move", "status")
    body = {**before, "status": {**before["status"], "phase": "Completed"}}
    async with (
        as_account(world, control_plane, "podferry-agent", world.nodes[0], elsewhere) as agent,
        as_account(world, control_plane, "podferry-controller", None, elsewhere) as controller,
    ):

        async def may_read() -> bool:
            return await allowed(partial(agent.get, MIGRATIONS, "move", world.namespace))

        await world.until(may_read)
        with pytest.raises(Forbidden, match="the controller's to write"):
            await dry(agent, "PUT", path, body)
        await dry(controller, "PUT", path, body)


# The controller's own bounds.


def made_for(world: World, **spec: Any) -> Json:
    """A pod as the controller makes one."""
    about = {
        "name": "made",
        "labels": {UID_LABEL: "u", ROLE_LABEL: "target"},
        "ownerReferences": [
            {"apiVersion": MIGRATIONS.api, "kind": "Migration", "name": "move", "uid": "u", "controller": True}
        ],
    }
    containers = [{"name": "main", "image": "train"}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": about,
        "spec": {"runtimeClassName": "podferry", "containers": containers, **spec},
    }


async def test_the_controller_makes_no_pod_that_could_take_a_node(world: World, accounts: Accounts) -> None:
    api, path = accounts.by[Writer.CONTROLLER], PODS.path(world.namespace)
    privileged = [{"name": "main", "image": "x", "securityContext": {"privileged": True}}]
    host = [{"name": "root", "hostPath": {"path": "/"}}]

    async def in_effect() -> bool:
        return not await allowed(partial(dry, api, "POST", path, made_for(world, hostPID=True)))

    await world.until(in_effect)
    await dry(api, "POST", path, made_for(world))
    unowned = made_for(world)
    del unowned["metadata"]["ownerReferences"]
    unlabelled = made_for(world)
    unlabelled["metadata"]["labels"] = {}
    for body in (
        made_for(world, hostNetwork=True),
        made_for(world, hostIPC=True),
        made_for(world, containers=privileged),
        made_for(world, initContainers=[{**privileged[0], "name": "first"}]),
        made_for(world, volumes=host),
        made_for(world, nodeName=world.nodes[0]),
        made_for(world, runtimeClassName=None),
        unowned,
        unlabelled,
    ):
        with pytest.raises(Forbidden, match="the controller"):
            await dry(api, "POST", path, body)


async def test_the_controller_touches_no_pod_but_those_that_a_migration_has_taken_up(
    world: World, accounts: Accounts
) -> None:
    api = accounts.by[Writer.CONTROLLER]
    await world.pod("plain", runtimeClassName=None)
    stranger = await world.pod("stranger", labels={"app": "x"})
    label = {"metadata": {"labels": {UID_LABEL: "u"}}}

    async def change(name: str, patch: Json, part: str = "") -> None:
        await api.patch(PODS, name, patch, world.namespace, uid=None, part=part)

    async def in_effect() -> bool:
        return not await allowed(partial(change, "plain", label))

    await world.until(in_effect)
    for name in ("plain", "stranger"):
        with pytest.raises(Forbidden, match="the controller"):
            await api.delete(PODS, name, world.namespace)
    conditions = {"status": {"conditions": [{"type": "Ready", "status": "False"}]}}
    for patch, part in (
        ({"metadata": {"annotations": {"x": "y"}}}, ""),
        ({"metadata": {"labels": {"app": None}}}, ""),
        ({"metadata": {"labels": {"app": None, UID_LABEL: "u"}}}, ""),
        ({"metadata": {"labels": {UID_LABEL: "u"}, "finalizers": ["x/y"]}}, ""),
        (conditions, "status"),
    ):
        with pytest.raises(Forbidden, match=r"the controller|by its label alone"):
            await change("stranger", patch, part)
    await change("stranger", label)
    main = stranger["spec"]["containers"][0]
    for patch, part in (
        ({"spec": {"containers": [{**main, "image": "mine"}]}}, ""),
        ({"status": {"phase": "Succeeded"}}, "status"),
        ({"status": {"podIP": "10.9.9.9", "podIPs": [{"ip": "10.9.9.9"}]}}, "status"),
    ):
        with pytest.raises(Forbidden, match="the controller changes"):
            await change("stranger", patch, part)
    await change("stranger", {"metadata": {"labels": {"app": None}}})
    await api.delete(PODS, "stranger", world.namespace, grace=0)


# Who asked.


async def test_nobody_asks_in_anothers_name_and_the_api_server_says_who_asked(
    world: World, control_plane: Path, accounts: Accounts
) -> None:
    role = {
        "metadata": {"name": "user"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "podferry-edit"},
        "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": world.namespace}],
    }
    await world.api.create(KINDS["RoleBinding"], role, world.namespace)
    path, me = MIGRATIONS.path(world.namespace), f"system:serviceaccount:{world.namespace}:default"

    def asking(**spec: str) -> Json:
        return {
            "apiVersion": MIGRATIONS.api,
            "kind": "Migration",
            "metadata": {"name": "x"},
            "spec": {"podName": "x", **spec},
        }

    async with as_account(world, control_plane, "default", None, world.namespace) as user:
        assert await user.whoami() == me

        async def in_effect() -> bool:
            mine = await allowed(partial(dry, user, "POST", path, asking(requestedBy=me)))
            return mine and not await allowed(partial(dry, user, "POST", path, asking(requestedBy="root")))

        await world.until(in_effect)
        with pytest.raises(Forbidden, match=f"that is {me}"):
            await dry(user, "POST", path, asking(requestedBy="root"))
        assert "requestedBy" not in (await dry(user, "POST", path, asking()))["spec"]
        for body in yaml.safe_load_all((DEPLOY / "requested-by" / "requested-by.yaml").read_text()):
            await world.api.create(KINDS[body["kind"]], body)
            world.also.append((KINDS[body["kind"]], body["metadata"]["name"]))

        async def filled_in() -> bool:
            return (await dry(user, "POST", path, asking()))["spec"].get("requestedBy") == me

        await world.until(filled_in)
        made = await user.create(MIGRATIONS, {"metadata": {"name": "x"}, "spec": {"podName": "x"}}, world.namespace)
        for name in ("root", None):
            with pytest.raises(ApiFailed, match="requestedBy cannot be changed"):
                patch = {"spec": {"requestedBy": name}}
                await user.patch(MIGRATIONS, "x", patch, world.namespace, uid=made["metadata"]["uid"])
        controller = accounts.by[Writer.CONTROLLER]
        other = {**asking(requestedBy="root"), "metadata": {"name": "y"}}
        assert (await dry(controller, "POST", path, other))["spec"]["requestedBy"] == "root"
    drain = {"apiVersion": NODE_DRAINS.api, "kind": "NodeDrain", "metadata": {"name": "x"}}
    answer = await dry(world.api, "POST", NODE_DRAINS.path(), drain)
    assert answer["spec"]["requestedBy"] == "admin"


async def test_who_may_not_get_into_a_pod_has_no_kubelet_get_in(
    world: World, control_plane: Path, accounts: Accounts
) -> None:
    """`spec.verify` takes the rights that exec and port-forward take."""
    moves = {"apiGroups": ["podferry.dev"], "resources": ["migrations"], "verbs": ["create"]}
    await world.api.create(KINDS["Role"], {"metadata": {"name": "mover"}, "rules": [moves]}, world.namespace)
    binding = {
        "metadata": {"name": "mover"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "mover"},
        "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": world.namespace}],
    }
    await world.api.create(KINDS["RoleBinding"], binding, world.namespace)
    path = MIGRATIONS.path(world.namespace)

    def asking(**spec: Json) -> Json:
        about = {"apiVersion": MIGRATIONS.api, "kind": "Migration", "metadata": {"name": "x"}}
        return {**about, "spec": {"podName": "x", **spec}}

    enters, connects = {"exec": {"command": ["true"]}}, {"tcp": {"port": 1}}
    async with as_account(world, control_plane, "default", None, world.namespace) as user:

        async def refused() -> bool:
            mine = await allowed(partial(dry, user, "POST", path, asking()))
            return mine and not await allowed(partial(dry, user, "POST", path, asking(verify=enters)))

        await world.until(refused)
        with pytest.raises(Forbidden, match="pods/exec"):
            await dry(user, "POST", path, asking(verify=enters))
        for way in (connects, {"http": {"port": 1}}):
            with pytest.raises(Forbidden, match="pods/portforward"):
                await dry(user, "POST", path, asking(verify=way))
        also = {"apiGroups": [""], "resources": ["pods/exec", "pods/portforward"], "verbs": ["create"]}
        await world.patch(KINDS["Role"], "mover", {"rules": [moves, also]}, world.namespace)

        async def lets_in() -> bool:
            return await allowed(partial(dry, user, "POST", path, asking(verify=enters)))

        await world.until(lets_in)
        await dry(user, "POST", path, asking(verify=connects))


async def test_the_controller_prefers_the_control_plane(world: World) -> None:
    """By the real scheduler."""
    deployment = next(
        one for one in yaml.safe_load_all((DEPLOY / "controller.yaml").read_text()) if one["kind"] == "Deployment"
    )
    spec = deployment["spec"]["template"]["spec"]
    plane = world.nodes[1]
    about = {"labels": {"node-role.kubernetes.io/control-plane": "", "kubernetes.io/os": "linux"}}
    taint = {"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}
    await world.patch(NODES, plane, {"metadata": about, "spec": {"taints": [taint]}})
    await world.patch(NODES, world.nodes[0], {"metadata": {"labels": {"kubernetes.io/os": "linux"}}})
    chosen = {one: spec[one] for one in ("nodeSelector", "tolerations", "affinity")}
    for number in range(2):
        await world.api.create(
            PODS,
            {
                "metadata": {"name": f"c-{number}", "labels": deployment["spec"]["template"]["metadata"]["labels"]},
                "spec": {**chosen, "containers": [{"name": "x", "image": "x"}]},
            },
            world.namespace,
        )
        assert (await world.running(f"c-{number}"))["spec"]["nodeName"] in (plane, *world.nodes[:number])
