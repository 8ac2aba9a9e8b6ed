"""Following objects: what there is, what changes, and one queue for each object (kopf's habit).

A handler is told *that* an object has changed, never what: it reads what it needs and acts on that. So nothing is lost when events
are merged, repeated or missed, and a restart is no special case.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable
from contextlib import aclosing
from typing import Generic, TypeVar

import anyio
import structlog
from anyio.abc import TaskGroup

from podferry.errors import PodferryError
from podferry.kube.api_errors import Expired
from podferry.kube.client import Api, Fields, Json, Labels, ResourceKind

RETRY_FIRST, RETRY_LAST = 0.5, 30.0

K = TypeVar("K", bound=Hashable)
Change = tuple[str, Json]


async def follow(
    api: Api,
    kind: ResourceKind,
    namespace: str = "",
    *,
    labels: Labels | None = None,
    fields: Fields | None = None,
    since: Json | None = None,
    learned: Callable[[], Iterable[Json]] = tuple,
) -> AsyncIterator[Change]:
    """Every object that there is (as ADDED) and then every change, for ever; what was missed is made good by listing anew.

    `since`: the one object that there was, as it was; only what changed after that comes.
    An object that went while nobody looked comes as DELETED, as it was last seen; `learned` says of which the caller knows in
    other ways, by what it has made itself.
    """
    log = structlog.get_logger().bind(kind=kind.kind)
    known: dict[str, Json] = {}
    delay, version = RETRY_FIRST, ""
    if since is not None:
        known, version = {since["metadata"]["uid"]: since}, since["metadata"]["resourceVersion"]
    while True:
        try:
            if not version:
                items, version = await api.list(kind, namespace, labels=labels, fields=fields)
                there = {one["metadata"]["uid"]: one for one in items}
                known = {one["metadata"]["uid"]: one for one in learned() if older(one, version)} | known
                gone = [known[uid] for uid in known if uid not in there]
                known = there
                for one in gone:
                    yield "DELETED", one
                for one in items:
                    yield "ADDED", one
            async with aclosing(api.watch(kind, version, namespace, labels=labels, fields=fields)) as changes:
                async for what, thing in changes:
                    delay, version = RETRY_FIRST, thing["metadata"]["resourceVersion"]
                    if what == "BOOKMARK":
                        continue
                    if what == "DELETED":
                        known.pop(thing["metadata"]["uid"], None)
                    else:
                        known[thing["metadata"]["uid"]] = thing
                    yield what, thing
            await anyio.sleep(0.05)
        except Expired:
            version = ""
        except PodferryError as error:
            log.warning("a watch broke", error=str(error), again_in_s=delay)
            await anyio.sleep(delay)
            delay, version = min(delay * 2, RETRY_LAST), ""


def older(body: Json, version: str) -> bool:
    """Whether an object is of a version before that. Versions are compared as numbers (Kubernetes 1.35 promises that they can be);
    of others nothing is older."""
    own = str(body["metadata"].get("resourceVersion", ""))
    return own.isdigit() and version.isdigit() and int(own) < int(version)


class Queues(Generic[K]):
    """One task for each key that has work: a key is never handled twice at once, and never forgotten."""

    def __init__(
        self, tasks: TaskGroup, handle: Callable[[K], Awaitable[float | None]], workers: float = math.inf
    ) -> None:
        """`handle` returns in how many seconds it wants to look again, or None to wait for the next change. At most `workers` keys
        are handled at once; the others wait in the order in which they came."""
        self._tasks, self._handle = tasks, handle
        self._workers = anyio.CapacityLimiter(workers)
        self._waiting: dict[K, anyio.Event] = {}
        self._log = structlog.get_logger()

    def put(self, key: K) -> None:
        """`key` has changed."""
        if key in self._waiting:
            self._waiting[key].set()
        else:
            self._waiting[key] = anyio.Event()
            self._waiting[key].set()
            self._tasks.start_soon(self._work, key)

    async def _work(self, key: K) -> None:
        delay = RETRY_FIRST
        while True:
            self._waiting[key] = anyio.Event()
            try:
                async with self._workers:
                    again = await self._handle(key)
                delay = RETRY_FIRST
            except PodferryError as error:
                self._log.warning("will be tried again", key=str(key), error=str(error), again_in_s=delay)
                again, delay = delay, min(delay * 2, RETRY_LAST)
            except Exception:  # noqa: BLE001 - one object's bug must not stop the others
                self._log.exception("bug", key=str(key))
                again, delay = delay, min(delay * 2, RETRY_LAST)
            if again is None and not self._waiting[key].is_set():
                del self._waiting[key]
                return
            with anyio.move_on_after(again):
                await self._waiting[key].wait()
