"""A small API server in memory, spoken to over HTTP like the real one: verbs, versions, selectors, watches,
finalizers, graceful deletion.

What it leaves out: validation, admission, defaulting, garbage collection, controllers.
"""

from __future__ import annotations

import copy
import datetime
import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx2

from podferry.kube import client

Json = dict[str, Any]
Path = tuple[str, ...]
SERVED = {one.api for one in vars(client).values() if isinstance(one, client.ResourceKind)} | {"policy/v1"}


class FakeApiServer(httpx2.AsyncBaseTransport):
    """Give it to an httpx client as its transport."""

    def __init__(self) -> None:
        self.objects: dict[Path, Json] = {}
        self.history: list[tuple[int, str, Path, Json]] = []
        self.version = 1
        self.oldest = 0
        self.refuse: list[tuple[str, str, int, Json]] = []
        """(verb, part of the path, status, body): what to refuse, once each."""
        self.keeps_names = True
        self._news = anyio.Event()
        self._away = False

    def go(self, *, away: bool) -> None:
        """Answer nobody any more, and break off what is under way; or come back."""
        self._away = away
        self._news.set()
        self._news = anyio.Event()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await anyio.lowlevel.checkpoint()
        if self._away:
            raise httpx2.ConnectError("the server is away", request=request)
        verb, query = request.method, dict(request.url.params)
        parts = tuple(request.url.path.strip("/").split("/"))
        body = json.loads(request.content) if request.content else None
        for number, (on, part, status, answer) in enumerate(self.refuse):
            if on == verb and part in request.url.path:
                del self.refuse[number]
                return httpx2.Response(status, json=answer, request=request)
        if "/".join(parts[1:2] if parts[0] == "api" else parts[1:3]) not in SERVED:
            return httpx2.Response(404, text="404 page not found", request=request)
        if verb == "GET" and query.get("watch") == "true":
            return self._watch(request, parts, query)
        try:
            status, answer = self._answer(verb, parts, query, body)
        except _Wrong as wrong:
            status, answer = wrong.status, {"kind": "Status", "reason": wrong.reason, "message": wrong.message}
            if wrong.field:
                answer["details"] = {"causes": [{"field": wrong.field}]}
            if wrong.status == 404:  # the real one names the object, unless it serves no such kind
                answer["details"] = {"name": _split(parts)[1]}
        return httpx2.Response(status, json=answer, request=request)

    def _answer(self, verb: str, parts: Path, query: dict[str, str], body: Json | None) -> tuple[int, Json]:
        collection, name, part = _split(parts)
        key = (*collection, name)
        match verb:
            case "GET" if not name:
                items = [copy.deepcopy(one) for _, one in self._select(collection, query)]
                return 200, {"metadata": {"resourceVersion": str(self.version)}, "items": items}
            case "GET":
                return 200, copy.deepcopy(self._get(key))
            case "POST" if part == "eviction":
                assert body is not None
                return 201, self._delete(key, body.get("deleteOptions") or {})
            case "POST":
                assert body is not None
                return 201, self._create(collection, body, dry="dryRun" in query)
            case "PUT":
                assert body is not None
                old = self._get(key)
                _guard(old, body)
                new = {**old, "status": body.get("status")} if part in ("status", "approval") else {**body}
                if not part:
                    new = {**new, "status": old.get("status")}
                return 200, self._put(key, old, new)
            case "PATCH":
                assert body is not None
                old = self._get(key)
                _guard(old, body)
                merged = _merge(copy.deepcopy(old), body)
                new = (
                    {**old, "status": merged.get("status")}
                    if part == "status"
                    else {**merged, "status": old.get("status")}
                )
                return 200, self._put(key, old, new)
            case "DELETE":
                return 200, self._delete(key, body or {})
        raise _Wrong(405, "MethodNotAllowed", verb)

    def _get(self, key: Path) -> Json:
        if key not in self.objects:
            raise _Wrong(404, "NotFound", f"{key[-1]} not found")
        return self.objects[key]

    def _keep_names(self, collection: Path, about: Json) -> None:
        """deploy/policies.yaml's `podferry-kept-names`."""
        for key, one in self.objects.items():
            status = one.get("status") or {}
            if (
                self.keeps_names
                and collection[-1] == "pods"
                and key[-2] == "migrations"
                and one["metadata"]["namespace"] == collection[-2]
                and status.get("keepsName")
                and status["phase"] in ("Running", "HandingOver")
                and status["sourcePod"]["name"] == about["name"]
                and (about.get("labels") or {}).get("podferry.dev/migration-uid") != one["metadata"]["uid"]
            ):
                raise _Wrong(403, "Forbidden", "ValidatingAdmissionPolicy 'podferry-kept-names' denied request")

    def _create(self, collection: Path, body: Json, *, dry: bool = False) -> Json:
        about = body["metadata"]
        if "name" not in about:
            about["name"] = about["generateName"] + secrets.token_hex(3)[:5]
        key = (*collection, about["name"])
        self._keep_names(collection, about)
        if key in self.objects:
            raise _Wrong(409, "AlreadyExists", f"{about['name']} already exists")
        if "namespaces" in collection[:-1]:
            about["namespace"] = collection[collection.index("namespaces") + 1]
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        new = copy.deepcopy(body)
        if collection[-1] in ("pods", "migrations", "nodedrains"):
            new.pop("status", None)
        new["metadata"] |= {"uid": secrets.token_hex(8), "creationTimestamp": now, "generation": 1}
        if collection[-1] == "pods":
            new["status"] = {"phase": "Pending"}
        if dry:
            return new
        return self._store(key, new, "ADDED")

    def _put(self, key: Path, old: Json, new: Json) -> Json:
        about = {name: value for name, value in new["metadata"].items() if value is not None}
        new = {name: value for name, value in {**new, "metadata": about}.items() if value is not None}
        for name in ("uid", "creationTimestamp", "deletionTimestamp"):
            if name in old["metadata"]:
                new["metadata"][name] = old["metadata"][name]
        if _apart_from_version(new) == _apart_from_version(old):
            return copy.deepcopy(old)
        if new.get("spec") != old.get("spec"):
            new["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
        if "deletionTimestamp" in new["metadata"] and not new["metadata"].get("finalizers") and key[-2] != "pods":
            return self._drop(key, new)
        return self._store(key, new, "MODIFIED")

    def _delete(self, key: Path, options: Json) -> Json:
        old = self._get(key)
        for name, value in (options.get("preconditions") or {}).items():
            if value != old["metadata"][name]:
                raise _Wrong(409, "Conflict", f"the {name} is another")
        grace = options.get("gracePeriodSeconds", 30 if key[-2] == "pods" else 0)
        waits = key[-2] == "pods" and grace > 0 and old["spec"].get("nodeName")
        if old["metadata"].get("finalizers") or waits:
            new = copy.deepcopy(old)
            new["metadata"].setdefault("deletionTimestamp", datetime.datetime.now(datetime.UTC).isoformat())
            if key[-2] == "pods":
                new["metadata"]["deletionGracePeriodSeconds"] = grace
            return self._store(key, new, "MODIFIED")
        return self._drop(key, old)

    def _drop(self, key: Path, last: Json) -> Json:
        self.objects.pop(key, None)
        self._tell("DELETED", key, last)
        return copy.deepcopy(last)

    def _store(self, key: Path, new: Json, what: str) -> Json:
        self.objects[key] = new
        self._tell(what, key, new)
        return copy.deepcopy(new)

    def _tell(self, what: str, key: Path, one: Json) -> None:
        self.version += 1
        one["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, what, key, copy.deepcopy(one)))
        self._news.set()
        self._news = anyio.Event()

    def _select(self, collection: Path, query: dict[str, str]) -> list[tuple[Path, Json]]:
        return [(key, one) for key, one in self.objects.items() if _within(key, collection) and _selected(one, query)]

    def _watch(self, request: httpx2.Request, parts: Path, query: dict[str, str]) -> httpx2.Response:
        collection, _, _ = _split(parts)
        since = int(query.get("resourceVersion") or 0)

        async def lines() -> AsyncIterator[bytes]:
            at = since
            if since < self.oldest:
                gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
                yield json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n"
                return
            matched = {key for version, what, key, one in self.history if version <= since and _selected(one, query)}
            while True:
                news = self._news
                for version, what, key, one in [entry for entry in self.history if entry[0] > at]:
                    at = version
                    if not _within(key, collection):
                        continue
                    selected = _selected(one, query)
                    if selected or key in matched:
                        told = what if selected else "DELETED"
                        if told == "MODIFIED" and key not in matched:
                            told = "ADDED"
                        (matched.add if selected and what != "DELETED" else matched.discard)(key)
                        yield json.dumps({"type": told, "object": one}).encode() + b"\n"
                await news.wait()
                if self._away:
                    raise httpx2.ReadError("the server is away", request=request)

        return httpx2.Response(200, content=lines(), request=request)


class _Wrong(Exception):
    def __init__(self, status: int, reason: str, message: str, field: str = "") -> None:
        self.status, self.reason, self.message, self.field = status, reason, message, field


def _split(parts: Path) -> tuple[Path, str, str]:
    """The collection, the object's name and its part, of a path."""
    root = 2 if parts[0] == "api" else 3
    rest = parts[root:]
    if rest[0] == "namespaces" and len(rest) > 2:
        root, rest = root + 2, rest[2:]
    return parts[: root + 1], rest[1] if len(rest) > 1 else "", rest[2] if len(rest) > 2 else ""


def _within(key: Path, collection: Path) -> bool:
    """Whether the object is of the collection, which may be one of all namespaces."""
    if key[:-1] == collection:
        return True
    return "namespaces" in key[:-2] and (*key[: key.index("namespaces")], key[-2]) == collection


def _selected(one: Json, query: dict[str, str]) -> bool:
    labels = one["metadata"].get("labels") or {}
    for term in filter(None, query.get("labelSelector", "").split(",")):
        name, equals, value = term.partition("=")
        if name not in labels or (equals and labels[name] != value):
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        path, _, value = term.partition("=")
        found: Any = one
        for step in path.split("."):
            found = (found or {}).get(step)
        if (found or "") != value:
            return False
    return True


def _apart_from_version(one: Json) -> Json:
    about = {name: value for name, value in one["metadata"].items() if name != "resourceVersion"}
    return {**{name: value for name, value in one.items() if value is not None}, "metadata": about}


def _guard(old: Json, new: Json) -> None:
    about = new.get("metadata") or {}
    if about.get("resourceVersion") not in (None, old["metadata"]["resourceVersion"]):
        raise _Wrong(409, "Conflict", "the object has been modified")
    if about.get("uid") not in (None, old["metadata"]["uid"]):
        raise _Wrong(422, "Invalid", "metadata.uid: field is immutable", "metadata.uid")


def _merge(old: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merge(merged.get(name), value)
    return merged
