"""deploy/'s rights and policies on the real API server, and who is held to them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import httpx2
import yaml

import podferry
from podferry.controller.program import Controller
from podferry.kube.api_errors import ObjectAlreadyExists
from podferry.kube.client import NAMESPACES, NODES, Api, Json, ResourceKind, configuration

from .world import QUICK, World

DEPLOY = Path(podferry.__file__).parents[2] / "deploy"
SYSTEM = "podferry-system"
KINDS = {
    "ServiceAccount": ResourceKind("v1", "ServiceAccount", "serviceaccounts"),
    "Role": ResourceKind("rbac.authorization.k8s.io/v1", "Role", "roles"),
    "RoleBinding": ResourceKind("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings"),
    "ClusterRole": ResourceKind("rbac.authorization.k8s.io/v1", "ClusterRole", "clusterroles", namespaced=False),
    "ClusterRoleBinding": ResourceKind(
        "rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "clusterrolebindings", namespaced=False
    ),
    "MutatingAdmissionPolicy": ResourceKind(
        "admissionregistration.k8s.io/v1", "MutatingAdmissionPolicy", "mutatingadmissionpolicies", namespaced=False
    ),
    "MutatingAdmissionPolicyBinding": ResourceKind(
        "admissionregistration.k8s.io/v1",
        "MutatingAdmissionPolicyBinding",
        "mutatingadmissionpolicybindings",
        namespaced=False,
    ),
    "ValidatingAdmissionPolicy": ResourceKind(
        "admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy", "validatingadmissionpolicies", namespaced=False
    ),
    "ValidatingAdmissionPolicyBinding": ResourceKind(
        "admissionregistration.k8s.io/v1",
        "ValidatingAdmissionPolicyBinding",
        "validatingadmissionpolicybindings",
        namespaced=False,
    ),
}


async def make(api: Api, kind: ResourceKind, body: Json, namespace: str = "") -> None:
    with suppress(ObjectAlreadyExists):
        await api.create(kind, body, namespace)


FILES = (
    "rbac.yaml",
    "status-policy.yaml",
    "policies.yaml",
    "drain-policy.yaml",
    "controller-policy.yaml",
    "requests-policy.yaml",
)


async def apply(api: Api, files: Sequence[str] = FILES, namespace: str = SYSTEM) -> None:
    """Make what is in these files of deploy/, installed in this namespace."""
    await make(api, NAMESPACES, {"metadata": {"name": namespace}})
    for file in files:
        for body in yaml.safe_load_all((DEPLOY / file).read_text().replace(SYSTEM, namespace)):
            of = body["metadata"].pop("namespace", "")
            await make(api, KINDS[body["kind"]], body, of)


@asynccontextmanager
async def as_account(
    world: World, kubeconfig: Path, name: str, node: str | None, namespace: str = SYSTEM
) -> AsyncIterator[Api]:
    """The API server as a service account of podferry's sees it, its token bound to a node as the kubelet binds that of a pod."""
    ask: dict[str, Any] = {"spec": {"expirationSeconds": 600}}
    if node is not None:
        uid = (await world.api.get(NODES, node))["metadata"]["uid"]
        ask["spec"]["boundObjectRef"] = {"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid}
    path = ResourceKind("v1", "ServiceAccount", "serviceaccounts").path(namespace, name, "token")
    made = await world.api._call("POST", path, body=ask, what="no token")
    token = made["status"]["token"]
    server = configuration(kubeconfig).cluster.server
    async with httpx2.AsyncClient(base_url=server, verify=False, headers={"Authorization": f"Bearer {token}"}) as http:
        yield Api(http)


@asynccontextmanager
async def the_controller(world: World, kubeconfig: Path) -> AsyncIterator[Api]:
    """It runs, with its own rights and no more."""
    async with as_account(world, kubeconfig, "podferry-controller", None) as api, anyio.create_task_group() as tasks:
        tasks.start_soon(Controller(api, SYSTEM, QUICK).run)
        yield api
        tasks.cancel_scope.cancel()
