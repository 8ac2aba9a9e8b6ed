"""What the controller remembers of the cluster: nothing that is gone comes back by an answer that was under way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import anyio
import pytest

from podferry.kube.api_errors import Expired
from podferry.kube.cache import Cache, Store
from podferry.kube.client import PODS

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

Json = dict[str, Any]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def pod(version: int, uid: str = "u", **labels: str) -> Json:
    return {
        "metadata": {"name": "train", "namespace": "ns", "uid": uid, "resourceVersion": str(version), "labels": labels}
    }


class Server:
    """An API server whose answers are the test's."""

    def __init__(self, lists: list[tuple[list[Json], str]], changes: list[list[tuple[str, Json]]]) -> None:
        self._http = self.server = None
        self.namespace = "ns"
        self._lists, self._changes = lists, changes
        self.answer: Json = {}

    async def list(self, kind: Any, namespace: str = "", **_: Any) -> tuple[list[Json], str]:
        return self._lists.pop(0)

    async def watch(self, kind: Any, version: str, namespace: str = "", **_: Any) -> AsyncIterator[tuple[str, Json]]:
        if not self._changes:
            await anyio.sleep_forever()
        for one in self._changes.pop(0):
            yield one
        raise Expired("the version is too old")

    async def replace(self, kind: Any, body: Json, part: str = "") -> Json:
        return self.answer


def cache_of(server: Any) -> Cache:
    return Cache(server, [Store(PODS)])


async def told(cache: Cache, number: int) -> list[tuple[str, str]]:
    """The next changes: what, and the version."""
    found: list[tuple[str, str]] = []
    async with aclosing(cache.follow(PODS)) as changes:  # type: ignore[type-var]
        async for what, body in changes:
            found.append((what, body["metadata"]["resourceVersion"]))
            if len(found) == number:
                return found
    raise AssertionError("it never ends")


async def test_an_answer_that_comes_after_the_end_brings_nothing_back() -> None:
    """A write to it was under way when it went; its answer has a version from before, or one that nobody knows."""
    server = Server([([pod(5)], "6")], [[("DELETED", pod(8))]])
    cache = cache_of(server)
    assert await told(cache, 2) == [("ADDED", "5"), ("DELETED", "8")]
    for version in (7, 9):
        server.answer = pod(version)
        await cache.replace(PODS, pod(5))
        assert cache.store(PODS).get("ns", "train") is None
    server.answer = pod(12, uid="another")
    await cache.replace(PODS, pod(12))
    assert cache.store(PODS).get("ns", "train") is not None, "one of the same name is another one"


async def test_the_answer_to_a_creation_may_come_after_the_end_of_what_it_made() -> None:
    server = Server([([], "3")], [[("ADDED", pod(5)), ("DELETED", pod(8))]])
    cache = cache_of(server)
    await told(cache, 2)
    server.answer = pod(5)
    await cache.replace(PODS, pod(5))
    assert cache.store(PODS).get("ns", "train") is None


async def test_a_watch_brings_back_what_has_its_label_again() -> None:
    server = Server([([pod(5)], "6")], [[("DELETED", pod(8)), ("ADDED", pod(9))]])
    cache = cache_of(server)
    await told(cache, 3)
    assert cache.store(PODS).get("ns", "train") == pod(9)


async def test_what_was_made_and_went_while_no_watch_was_there_is_told_and_forgotten() -> None:
    server = Server([([], "3"), ([], "9")], [[]])
    cache = cache_of(server)
    server.answer = pod(5)
    async with anyio.create_task_group() as tasks:
        found: list[tuple[str, str]] = []

        async def follow() -> None:
            found.extend(await told(cache, 1))

        cache.store(PODS).learn(pod(5))
        tasks.start_soon(follow)
    assert found == [("DELETED", "5")]
    assert cache.store(PODS).get("ns", "train") is None


async def test_what_is_newer_than_a_list_is_not_taken_for_gone() -> None:
    server = Server([([], "3")], [[("MODIFIED", pod(7))]])
    cache = cache_of(server)
    cache.store(PODS).learn(pod(5))
    assert await told(cache, 1) == [("MODIFIED", "7")]
    assert cache.store(PODS).get("ns", "train") is not None
