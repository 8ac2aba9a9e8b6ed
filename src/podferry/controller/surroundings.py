"""Reads what stands around a pod: its owner, its claims, its RuntimeClass, its namespace and the nodes."""

from __future__ import annotations

from typing import Any, Protocol

from podferry.controller import failures, placement
from podferry.controller.eligibility import PodUnfit, Surroundings, controller_of, kind_of_owner
from podferry.kube.api_errors import Forbidden
from podferry.kube.client import (
    CLAIMS,
    EVENTS,
    JOBS,
    MIGRATIONS,
    NAMESPACES,
    NODES,
    REPLICASETS,
    RUNTIME_CLASSES,
    STATEFULSETS,
    VOLUMES,
    Fields,
    Labels,
    ResourceKind,
)
from podferry.kube.migration import Ending, Migration
from podferry.kube.paths import NameRefused
from podferry.model import Outcome

Json = dict[str, Any]

OWNERS = {one.kind: one for one in (JOBS, REPLICASETS, STATEFULSETS)}


class Readable(Protocol):
    """What a survey needs of an API server: `Api`, or something that remembers its answers."""

    async def find(self, kind: ResourceKind, name: str, namespace: str = "") -> Json | None:
        """One object, or None where there is none."""

    async def list(
        self, kind: ResourceKind, namespace: str = "", *, labels: Labels | None = None, fields: Fields | None = None
    ) -> tuple[list[Json], str]:
        """The objects of a kind, and their version."""


class Surveyor:
    """Asks the API server; decides nothing."""

    def __init__(self, api: Readable) -> None:
        self._api = api

    async def around(self, pod: Json, migration: Migration | None = None) -> Surroundings:
        """What `eligibility.obstacles` wants to know. `migration` is the one that asks, if any."""
        namespace, spec = pod["metadata"]["namespace"], pod["spec"]
        wanted = [
            volume["persistentVolumeClaim"]["claimName"]
            for volume in spec.get("volumes") or []
            if "persistentVolumeClaim" in volume
        ]
        claims = {name: claim for name in wanted if (claim := await self._find(CLAIMS, name, namespace))}
        bound = {name: of for name, one in claims.items() if (of := one["spec"].get("volumeName"))}
        name = spec.get("runtimeClassName")
        others, _ = await self._api.list(MIGRATIONS, namespace)
        return Surroundings(
            owner=await self.owner(pod),
            claims=claims,
            volumes={name: one for name, of in bound.items() if (one := await self._of_cluster(VOLUMES, of))},
            runtime_class=await self._of_cluster(RUNTIME_CLASSES, name) if name else None,
            node=await self._of_cluster(NODES, spec["nodeName"]) if spec.get("nodeName") else None,
            under_way=failures.under_way(others, migration.uid if migration else ""),
        )

    async def _of_cluster(self, kind: ResourceKind, name: str) -> Json | None:
        """What belongs to no namespace; who may read one namespace alone does without."""
        try:
            return await self._find(kind, name)
        except Forbidden:
            return None

    async def _find(self, kind: ResourceKind, name: str, namespace: str = "") -> Json | None:
        """An object that the pod names. The API server does not check all names in a pod (an owner's, a claim's): one that no
        object can have is that of an object which is not there.
        """
        try:
            return await self._api.find(kind, name, namespace)
        except NameRefused:
            return None

    async def owner(self, pod: Json) -> Json | None:
        """The pod's controller, where it is of a kind whose wishes matter to a move and it is still the same one."""
        reference = controller_of(pod)
        kind = OWNERS.get(kind_of_owner(reference) or "") if reference is not None else None
        if reference is None or kind is None:
            return None
        found = await self._find(kind, reference["name"], pod["metadata"]["namespace"])
        return found if found is not None and found["metadata"]["uid"] == reference["uid"] else None

    async def target_node(self, pod: Json, migration: Migration) -> PodUnfit | None:
        """What is wrong with the node that the user named, if one was named."""
        name = migration.spec.target_node
        if name is None:
            return None
        node = await self._api.find(NODES, name)
        if name == pod["spec"]["nodeName"]:
            return _unfit("AlreadyThere", f"the pod is on {name} already", "name another node, or none")
        if node is None:
            return _unfit("NodeNotFound", f"there is no node {name}", "kubectl get nodes")
        if not failures.ready(node):
            return _unfit("NodeNotReady", f"node {name} is not ready", "name another node, or none")
        return _not_allowed(pod, migration, node)

    async def warnings(self, pod: Json) -> list[Json]:
        """What the kubelet and others have warned of about a pod; nothing where that may not be read."""
        about = pod["metadata"]
        fields = {"regarding.uid": about["uid"], "type": "Warning"}
        try:
            return (await self._api.list(EVENTS, about["namespace"], fields=fields))[0]
        except Forbidden:
            return []

    async def namespace_failure(self, migration: Migration) -> Ending | None:
        """The namespace is going, and everything in it."""
        found = await self._api.find(NAMESPACES, migration.namespace)
        if found is not None and "deletionTimestamp" not in found["metadata"]:
            return None
        return failures.ending(
            Outcome.FAILED, failures.NAMESPACE_TERMINATING, f"namespace {migration.namespace} is being deleted"
        )


def _not_allowed(pod: Json, migration: Migration, node: Json) -> PodUnfit | None:
    """Whether the pod's rules or the Migration's exclude the node that the Migration names: the scheduler would never choose it."""
    name, labels = node["metadata"]["name"], node["metadata"].get("labels") or {}
    if not placement.allows(pod, labels):
        rules = "the pod's nodeSelector or required node affinity"
        return _unfit("NodeNotAllowed", f"{rules} does not allow node {name}", "name one that they allow, or none")
    wanted = migration.spec.node_selector or {}
    if missing := sorted(f"{key}={value}" for key, value in wanted.items() if labels.get(key) != value):
        what = f"node {name} lacks labels that the Migration's nodeSelector asks for: {', '.join(missing)}"
        return _unfit("NodeNotAllowed", what, "name another node, or leave targetNode or nodeSelector out")
    return None


def _unfit(reason: str, what: str, remedy: str) -> PodUnfit:
    error = PodUnfit(what, remedy=remedy)
    error.reason = reason
    return error
