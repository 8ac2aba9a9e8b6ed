"""An agent's cache of the cluster's Migrations, and when the agent may conclude that one of them is gone.

A watch that is silent, an API server that does not answer and a watch's DELETED (which also means that the Migration does not match
the watch's selector any more) say nothing of it. Only the API server's own answer to the question does.
"""

from __future__ import annotations

from collections.abc import Callable

import anyio
import structlog

from podferry.errors import PodferryError
from podferry.kube import status as store
from podferry.kube.api_errors import ObjectNotFound
from podferry.kube.client import MIGRATIONS, Api, Json
from podferry.kube.migration import Migration, MigrationUnreadable

Key = tuple[str, str]

UNSEEN = 10.0
"""Seconds without news of a Migration that nothing is known of, after which the API server is asked for it."""


class Known:
    """The newest that was seen of each Migration, by its uid."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._seen: dict[str, Migration | None] = {}
        self._keys: dict[str, Key] = {}
        self._skipped: dict[str, str] = {}
        self._news = anyio.Event()
        self._log = structlog.get_logger()

    def newest(self, uid: str) -> Migration | None:
        """The newest that is known of it; None where nothing is, or where it is gone."""
        return self._seen.get(uid)

    def learn(self, migration: Migration) -> None:
        """This is the newest of it."""
        self._keys[migration.uid] = migration.namespace, migration.name
        self._notify(migration.uid, migration)

    def see(self, body: Json) -> bool:
        """Learn what the API server sent. One that a newer podferry has written, so that it cannot be read here, is left alone:
        False, and the log says so once for each state of it."""
        about = body["metadata"]
        try:
            self.learn(Migration.from_json(body))
        except MigrationUnreadable as error:
            if self._skipped.get(about["uid"]) != about["resourceVersion"]:
                self._skipped[about["uid"]] = about["resourceVersion"]
                self._log.error("a Migration is skipped", namespace=about["namespace"], error=str(error), why=error.why)
            return False
        self._skipped.pop(about["uid"], None)
        return True

    async def read(self, key: Key) -> Migration | None:
        """Ask for the Migration of this namespace and name; None where there is none, or none that can be read here. What had the
        name before is gone."""
        body = await self._api.find(MIGRATIONS, key[1], key[0])
        there = None if body is None else body["metadata"]["uid"]
        for uid in [uid for uid, known in self._keys.items() if known == key and uid != there]:
            self._gone(uid)
        return self._seen[body["metadata"]["uid"]] if body is not None and self.see(body) else None

    async def change(self, id: str, change: store.Change) -> None:
        """Change the status of the Migration with this uid, once it has been seen. Raises `ObjectNotFound` where it is gone."""
        migration = await self.once(id, lambda _: True)
        try:
            self.learn(await store.change(self._api, migration.model_copy(deep=True), change))
        except ObjectNotFound:
            self._gone(id)
            raise

    async def once(self, id: str, holds: Callable[[Migration], bool]) -> Migration:
        """The Migration once `holds`, as the watch brings it. Raises `ObjectNotFound` only where the API server says
        that it is gone."""
        while True:
            news, seen = self._news, self._seen.get(id)
            if seen is not None and holds(seen):
                return seen
            if seen is None and id in self._seen:
                raise ObjectNotFound(f"there is no Migration with uid {id}", why="it was removed by force")
            with anyio.move_on_after(UNSEEN) as silence:
                await news.wait()
            if silence.cancelled_caught and id not in self._seen:
                await self._ask(id)

    async def _ask(self, id: str) -> None:
        """Nothing was ever heard of it: look for it among all that there are."""
        try:
            everything, _ = await self._api.list(MIGRATIONS)
        except PodferryError as error:
            self._log.warning("nothing is known of a migration of ours", migration=id, error=str(error))
            return
        found = next((one for one in everything if one["metadata"]["uid"] == id), None)
        if found is None:
            self._gone(id)
        else:
            self.see(found)

    def _gone(self, uid: str) -> None:
        self._keys.pop(uid, None)
        self._skipped.pop(uid, None)
        self._notify(uid, None)

    def _notify(self, uid: str, migration: Migration | None) -> None:
        self._seen[uid] = migration
        self._news.set()
        self._news = anyio.Event()
