"""What the API server has told by watches, so that it need not be asked again and again.

A `Cache` is an `Api` that answers from memory where it knows: kinds that it follows, and for some seconds what it was told a
moment ago. It learns from its own writes at once, so that nobody reads what he has changed himself as it was before. What it does
not find it asks the API server for: of an object that is gone only the server's own word counts. What it finds may be older than
what is there; so writes are compare-and-swaps or name the uid that they mean, here as everywhere.
"""

from __future__ import annotations

import copy
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable

from podferry.kube.client import Api, Fields, Json, Labels, ResourceKind
from podferry.kube.watch import Change, follow, older

Key = tuple[str, str]
Prune = Callable[[Json], Json]
REMEMBERED = 10_000
"""Objects of one kind of which it is known that they are gone: an answer that is under way is newer than that."""


class Store:
    """The objects of one kind, as they were last seen. `prune` leaves of each what is needed of it; `labels` are those that all of
    them have."""

    def __init__(self, kind: ResourceKind, labels: Labels | None = None, prune: Prune | None = None) -> None:
        self.kind, self.labels = kind, labels
        self._prune = prune or (lambda body: body)
        self._objects: dict[Key, Json] = {}
        self._gone: dict[str, None] = {}

    def get(self, namespace: str, name: str) -> Json | None:
        """The object of this name."""
        return self._objects.get((namespace, name))

    def all(self, namespace: str = "") -> Iterable[Json]:
        """Every object, of one namespace or of all."""
        return [one for (of, _), one in self._objects.items() if namespace in ("", of)]

    def learn(self, body: Json, *, by_watch: bool = False) -> None:
        """It is like this now, unless something newer is known. An answer to a request may arrive after a watch has told that the
        object is gone: only a watch brings one back, which has got labels that it had lost."""
        key, uid = _key(body), body["metadata"]["uid"]
        if by_watch:
            self._gone.pop(uid, None)
        elif uid in self._gone:
            return
        known = self._objects.get(key)
        if known is not None and _older(body, known):
            return
        if all(label in (body["metadata"].get("labels") or {}) for label in self.labels or {}):
            self._objects[key] = self._prune(body)
        else:
            self._objects.pop(key, None)

    def forget(self, body: Json) -> None:
        """It is not there any more, or has no such labels."""
        uid = body["metadata"]["uid"]
        self._gone[uid] = None
        while len(self._gone) > REMEMBERED:
            del self._gone[next(iter(self._gone))]
        known = self._objects.get(_key(body))
        if known is not None and known["metadata"]["uid"] == uid:
            del self._objects[_key(body)]


def _key(body: Json) -> Key:
    return body["metadata"].get("namespace", ""), body["metadata"]["name"]


def _older(body: Json, known: Json) -> bool:
    return older(body, str(known["metadata"].get("resourceVersion", "")))


class Cache(Api):
    """`api`, with a memory."""

    def __init__(
        self, api: Api, stores: Iterable[Store], *, briefly: Collection[ResourceKind] = (), seconds: float = 5.0
    ) -> None:
        """Kinds in `briefly` are asked for, and what was answered is used again for so many `seconds`."""
        super().__init__(api._http, api.namespace, api.server)
        self._api = api
        self._stores = {one.kind: one for one in stores}
        self._briefly, self._seconds = frozenset(briefly), seconds
        self._told: dict[tuple[ResourceKind, Key], tuple[float, Json | None]] = {}

    async def prime(self) -> None:
        """Learn all that there is. To be called before anything is read."""
        for store in self._stores.values():
            for body in (await self._api.list(store.kind, labels=store.labels))[0]:
                store.learn(body)

    def store(self, kind: ResourceKind) -> Store:
        """What is known of a kind that is followed."""
        return self._stores[kind]

    async def follow(self, kind: ResourceKind) -> AsyncIterator[Change]:
        """As `podferry.kube.watch.follow`; who reads it keeps the memory of this kind up to date."""
        store = self._stores[kind]
        async for what, body in follow(self._api, kind, labels=store.labels, learned=store.all):
            if what == "DELETED":
                store.forget(body)
            else:
                store.learn(body, by_watch=True)
            yield what, body

    async def find(self, kind: ResourceKind, name: str, namespace: str = "") -> Json | None:
        """One object, or None where the API server says that there is none."""
        if kind in self._stores and (known := self._stores[kind].get(namespace, name)) is not None:
            return copy.deepcopy(known)
        if kind not in self._briefly:
            return await self._api.find(kind, name, namespace)
        key, now = (kind, (namespace, name)), time.monotonic()
        if key not in self._told or now - self._told[key][0] > self._seconds:
            self._told = {one: told for one, told in self._told.items() if now - told[0] <= self._seconds}
            self._told[key] = now, await self._api.find(kind, name, namespace)
        return copy.deepcopy(self._told[key][1])

    async def get(self, kind: ResourceKind, name: str, namespace: str = "") -> Json:
        """One object, as it is: never from memory."""
        return self._learn(kind, await self._api.get(kind, name, namespace))

    async def list(
        self, kind: ResourceKind, namespace: str = "", *, labels: Labels | None = None, fields: Fields | None = None
    ) -> tuple[list[Json], str]:
        """From memory where all objects of a kind are known and all are wanted; there is no version to watch from then."""
        store = self._stores.get(kind)
        if store is not None and not store.labels and not labels and not fields:
            return [copy.deepcopy(one) for one in store.all(namespace)], ""
        return await self._api.list(kind, namespace, labels=labels, fields=fields)

    async def create(self, kind: ResourceKind, body: Json, namespace: str = "", *, dry: bool = False) -> Json:
        """As `Api.create`."""
        made = await self._api.create(kind, body, namespace, dry=dry)
        return made if dry else self._learn(kind, made)

    async def replace(self, kind: ResourceKind, body: Json, part: str = "") -> Json:
        """As `Api.replace`."""
        return self._learn(kind, await self._api.replace(kind, body, part))

    async def patch(
        self, kind: ResourceKind, name: str, patch: Json, namespace: str = "", *, uid: str | None, part: str = ""
    ) -> Json:
        """As `Api.patch`."""
        return self._learn(kind, await self._api.patch(kind, name, patch, namespace, uid=uid, part=part))

    def _learn(self, kind: ResourceKind, body: Json) -> Json:
        if kind in self._stores:
            self._stores[kind].learn(copy.deepcopy(body))
        return body
