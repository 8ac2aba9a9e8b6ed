"""The client of a cluster's API server, the only one in podferry.

Objects are plain JSON here. A pod that is cloned must lose nothing, and typed classes of one release would drop the
fields of the next; so lightkube is used for what it knows best, finding and reading a cluster's configuration and
authenticating to it, and the five verbs are spoken directly. They also carry what its typed client does not: a delete
with a uid, so that the pod that goes is the one that was meant.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx2
from lightkube.config.client_adapter import ConnectionParams
from lightkube.config.kubeconfig import KubeConfig, SingleConfig
from lightkube.core.exceptions import ConfigError

from podferry import __version__
from podferry.kube.api_errors import ApiUnreachable, Forbidden, NoCluster, NotServed, ObjectNotFound, of_status
from podferry.kube.paths import of_fields, of_labels, segment

Json = dict[str, Any]
Labels = Mapping[str, str | None]
"""What a label selector demands; None: that the label is there."""
Fields = Mapping[str, str]
"""What a field selector demands."""

PATIENCE = 10.0
WATCH_SECONDS = 290
WATCH_SILENCE = WATCH_SECONDS + 30.0
"""The server ends a watch after the first; a connection that is silent for longer than the second is dead."""

MERGE = "application/merge-patch+json"


@dataclass(frozen=True)
class ResourceKind:
    """A kind of object and where the API server keeps it."""

    api: str
    kind: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str = "", name: str | None = None, part: str = "") -> str:
        """The path of the collection (of all namespaces where none is named), of an object, or of a part of it such as `status`.

        Raises `NameRefused` where a name would lead elsewhere, or an object is named without its namespace.
        """
        root = f"/apis/{self.api}" if "/" in self.api else f"/api/{self.api}"
        if self.namespaced and (namespace or name is not None):
            root += f"/namespaces/{segment(namespace)}"
        object_path = [] if name is None else [segment(name), *([part] if part else [])]
        return "/".join([root, self.plural, *object_path])


PODS = ResourceKind("v1", "Pod", "pods")
NODES = ResourceKind("v1", "Node", "nodes", namespaced=False)
NAMESPACES = ResourceKind("v1", "Namespace", "namespaces", namespaced=False)
SECRETS = ResourceKind("v1", "Secret", "secrets")
CONFIGMAPS = ResourceKind("v1", "ConfigMap", "configmaps")
RUNTIME_CLASSES = ResourceKind("node.k8s.io/v1", "RuntimeClass", "runtimeclasses", namespaced=False)
CLAIMS = ResourceKind("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
VOLUMES = ResourceKind("v1", "PersistentVolume", "persistentvolumes", namespaced=False)
EVENTS = ResourceKind("events.k8s.io/v1", "Event", "events")
JOBS = ResourceKind("batch/v1", "Job", "jobs")
REPLICASETS = ResourceKind("apps/v1", "ReplicaSet", "replicasets")
STATEFULSETS = ResourceKind("apps/v1", "StatefulSet", "statefulsets")
DEPLOYMENTS = ResourceKind("apps/v1", "Deployment", "deployments")
LEASES = ResourceKind("coordination.k8s.io/v1", "Lease", "leases")
SIGNING_REQUESTS = ResourceKind(
    "certificates.k8s.io/v1", "CertificateSigningRequest", "certificatesigningrequests", namespaced=False
)
SELF_REVIEWS = ResourceKind("authentication.k8s.io/v1", "SelfSubjectReview", "selfsubjectreviews", namespaced=False)
ACCESS_REVIEWS = ResourceKind(
    "authorization.k8s.io/v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews", namespaced=False
)
MIGRATIONS = ResourceKind("podferry.dev/v1alpha1", "Migration", "migrations")
MIGRATION_POLICIES = ResourceKind("podferry.dev/v1alpha1", "MigrationPolicy", "migrationpolicies", namespaced=False)
NODE_DRAINS = ResourceKind("podferry.dev/v1alpha1", "NodeDrain", "nodedrains", namespaced=False)


PAGE = 500
"""Objects that are asked for at once."""


class Api:
    """A cluster's API server. Calls raise the errors of `kube.errors`."""

    def __init__(self, http: httpx2.AsyncClient, namespace: str = "default", server: str = "") -> None:
        self._http, self.namespace, self.server = http, namespace, server

    @classmethod
    @asynccontextmanager
    async def open(cls, kubeconfig: Path | None = None, context: str | None = None) -> AsyncIterator[Self]:
        """The cluster of `kubeconfig`; without one that of the pod this runs in, of $KUBECONFIG or of ~/.kube/config."""
        config = configuration(kubeconfig, context)
        try:
            settings = ConnectionParams(timeout=httpx2.Timeout(PATIENCE), trust_env=True).httpx_params(config)
            # Many clusters' certificates lack the key identifiers that Python 3.13 has begun to insist on.
            settings["verify"].verify_flags &= ~ssl.VERIFY_X509_STRICT
            client = httpx2.AsyncClient(**settings)
        except (ConfigError, OSError, ValueError) as wrong:
            raise NoCluster.because("the cluster's configuration cannot be used", wrong) from wrong
        client.headers["User-Agent"] = f"podferry/{__version__}"  # the API server names the writer of each field by it
        async with client as http:
            yield cls(http, config.namespace or "default", config.cluster.server)

    async def get(self, kind: ResourceKind, name: str, namespace: str = "") -> Json:
        """One object. Raises `ObjectNotFound`."""
        return await self._call("GET", kind.path(namespace, name), what=f"cannot read {_named(kind, name, namespace)}")

    async def find(self, kind: ResourceKind, name: str, namespace: str = "") -> Json | None:
        """One object, or None where there is none."""
        try:
            return await self.get(kind, name, namespace)
        except ObjectNotFound:
            return None

    async def pages(
        self, kind: ResourceKind, namespace: str = "", *, labels: Labels | None = None, fields: Fields | None = None
    ) -> AsyncIterator[tuple[list[Json], str]]:
        """As `list`, some hundred at a time: for those who do not want all of a large cluster in memory."""
        query = _selectors(labels, fields) | {"limit": str(PAGE)}
        what = f"cannot list {kind.plural}"
        while True:
            page = await self._call("GET", kind.path(namespace), query, what=what)
            if not isinstance(page.get("metadata"), dict):
                raise ApiUnreachable(what, why="the answer is not an API server's: it holds no list")
            yield page.get("items") or [], str(page["metadata"].get("resourceVersion", ""))
            if not page["metadata"].get("continue"):
                return
            query["continue"] = page["metadata"]["continue"]

    async def list(
        self, kind: ResourceKind, namespace: str = "", *, labels: Labels | None = None, fields: Fields | None = None
    ) -> tuple[list[Json], str]:
        """The objects of a kind, of one namespace or of all, and the version that a watch may begin at."""
        items: list[Json] = []
        version = ""
        async for page, version in self.pages(kind, namespace, labels=labels, fields=fields):  # noqa: B007 - the last one counts
            items += page
        return items, version

    async def create(self, kind: ResourceKind, body: Json, namespace: str = "", *, dry: bool = False) -> Json:
        """Make an object. Raises `AlreadyExists`. Where it is `dry`, the API server says what it would do, and does nothing."""
        whole = {"apiVersion": kind.api, "kind": kind.kind, **body}
        name = body["metadata"].get("name") or body["metadata"].get("generateName", "")
        return await self._call(
            "POST",
            kind.path(namespace),
            {"dryRun": "All"} if dry else None,
            body=whole,
            what=f"cannot create {_named(kind, name, namespace)}",
        )

    async def replace(self, kind: ResourceKind, body: Json, part: str = "") -> Json:
        """Put an object, or its `part`, in the place of the one it was read from. Raises `Conflict` where that has changed."""
        about = body["metadata"]
        name, namespace = about["name"], about.get("namespace", "")
        whole = {"apiVersion": kind.api, "kind": kind.kind, **body}
        return await self._call(
            "PUT", kind.path(namespace, name, part), body=whole, what=f"cannot change {_named(kind, name, namespace)}"
        )

    async def patch(
        self, kind: ResourceKind, name: str, patch: Json, namespace: str = "", *, uid: str | None, part: str = ""
    ) -> Json:
        """Change the object with this `uid` (None: whichever has the name), or its `part`, by a merge patch; None in it removes a
        field. A `resourceVersion` in it makes it a compare-and-swap. Raises `Conflict` where the name is another object's by now.
        """
        headers = {"Content-Type": MERGE}
        what = f"cannot change {_named(kind, name, namespace)}"
        if uid is not None:
            patch = {**patch, "metadata": {**(patch.get("metadata") or {}), "uid": uid}}
        return await self._call("PATCH", kind.path(namespace, name, part), body=patch, headers=headers, what=what)

    async def delete(
        self,
        kind: ResourceKind,
        name: str,
        namespace: str = "",
        *,
        uid: str | None = None,
        version: str | None = None,
        grace: int | None = None,
    ) -> bool:
        """Delete an object, only if it still has the `uid` and the resource `version`. False where it is gone already.
        `grace` is in seconds. Raises `Conflict`.
        """
        options: Json = {"apiVersion": "v1", "kind": "DeleteOptions"}
        demanded = {name: value for name, value in (("uid", uid), ("resourceVersion", version)) if value is not None}
        if demanded:
            options["preconditions"] = demanded
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        try:
            what = f"cannot delete {_named(kind, name, namespace)}"
            await self._call("DELETE", kind.path(namespace, name), body=options, what=what)
        except ObjectNotFound:
            return False
        return True

    async def whoami(self) -> str | None:
        """The name that the API server knows the caller by; None where it does not say."""
        try:
            answer = await self.create(SELF_REVIEWS, {"metadata": {}})
        except (NotServed, Forbidden):
            return None
        name = ((answer.get("status") or {}).get("userInfo") or {}).get("username")
        return str(name) if name else None

    async def evict(self, name: str, namespace: str, *, uid: str) -> None:
        """Evict the pod with this `uid`. Raises `ObjectNotFound`, `Conflict` where the uid is another, and `ApiFailed`
        with status 429
        where a PodDisruptionBudget does not allow it now.
        """
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": namespace},
            "deleteOptions": {"preconditions": {"uid": uid}},
        }
        what = f"cannot evict {_named(PODS, name, namespace)}"
        await self._call("POST", PODS.path(namespace, name, "eviction"), body=body, what=what)

    async def watch(
        self,
        kind: ResourceKind,
        version: str,
        namespace: str = "",
        *,
        labels: Labels | None = None,
        fields: Fields | None = None,
    ) -> AsyncGenerator[tuple[str, Json], None]:
        """What happens from `version` on, as (ADDED | MODIFIED | DELETED | BOOKMARK, object), until the server ends it.

        Raises `Expired` where `version` is too old: then list anew.
        """
        query = _selectors(labels, fields) | {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        timeout = httpx2.Timeout(PATIENCE, read=WATCH_SILENCE)
        what = f"cannot watch {kind.plural}"
        try:
            async with self._http.stream("GET", kind.path(namespace), params=query, timeout=timeout) as response:
                if response.is_error:
                    await response.aread()
                    raise of_status(response.status_code, _body(response), what)
                async for line in response.aiter_lines():
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise of_status(int(event["object"].get("code", 500)), event["object"], what)
                    yield event["type"], event["object"]
        except (httpx2.HTTPError, OSError, ValueError, KeyError) as broken:  # a line may be cut off, too
            raise ApiUnreachable.because(what, broken) from broken

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        body: Json | None = None,
        headers: Mapping[str, str] | None = None,
        what: str,
    ) -> Json:
        content = None if body is None else json.dumps(body).encode()
        typed = {"Content-Type": "application/json", **(headers or {})} if body is not None else {}
        try:
            response = await self._http.request(method, path, params=query, content=content, headers=typed)
        except (httpx2.HTTPError, OSError) as broken:
            raise ApiUnreachable.because(
                what, broken, remedy=f"is the API server {self.server} up and reachable from here?"
            ) from broken
        except ConfigError as broken:
            raise NoCluster.because(what, broken) from broken
        if response.is_error:
            raise of_status(response.status_code, _body(response), what)
        try:
            answer = response.json()
        except ValueError as strange:
            raise ApiUnreachable.because(f"{what}: the answer is not an API server's", strange) from strange
        if not isinstance(answer, dict):
            raise ApiUnreachable(what, why=f"the answer is not an API server's: it is a {type(answer).__name__}")
        return answer


def configuration(kubeconfig: Path | None = None, context: str | None = None) -> SingleConfig:
    """Which cluster, and as whom. Raises `NoCluster` saying where it was looked for."""
    try:
        found = KubeConfig.from_file(kubeconfig) if kubeconfig else KubeConfig.from_env()
        chosen = found.get(context)
    except (ConfigError, OSError, KeyError, ValueError) as wrong:
        raise NoCluster.because(
            "no cluster is configured", wrong, remedy="set KUBECONFIG, or name a file with --kubeconfig"
        ) from wrong
    if chosen is None:
        raise NoCluster("the kubeconfig names no current context", remedy="kubectl config use-context NAME")
    return chosen


def _body(response: httpx2.Response) -> Json:
    try:
        body = response.json()
    except ValueError:
        return {"message": response.text[:500]}
    return body if isinstance(body, dict) else {}


def _selectors(labels: Labels | None, fields: Fields | None) -> dict[str, str]:
    chosen = {"labelSelector": of_labels(labels or {}), "fieldSelector": of_fields(fields or {})}
    return {name: value for name, value in chosen.items() if value}


def _named(kind: ResourceKind, name: str, namespace: str) -> str:
    return f"{kind.kind} {namespace}/{name}" if namespace else f"{kind.kind} {name}"
