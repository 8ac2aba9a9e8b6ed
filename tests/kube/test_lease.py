"""Two candidates for one lease: one leads at a time, also where it dies, and where it can no longer renew what it has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from podferry.kube import lease
from podferry.kube.api_errors import ApiUnreachable
from podferry.kube.client import LEASES, Api, Json, ResourceKind
from podferry.kube.lease import Leader

from .world import World

pytestmark = pytest.mark.anyio
NAME = "podferry-controller"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seconds instead of tens of them, in the same proportions; the lease itself counts whole ones."""
    for name, seconds in (("DURATION", 3.0), ("RENEW_WITHIN", 2.0), ("RETRY", 0.2)):
        monkeypatch.setattr(lease, name, seconds)
    yield


class Candidate:
    """A controller that does nothing but lead. `since` and `until` say when."""

    def __init__(self, world: World, name: str, api: Any = None) -> None:
        self.leader = Leader(api or world.api, world.namespace, NAME, name)
        self.scope, self.done = anyio.CancelScope(), anyio.Event()
        self.since = self.until = 0.0
        world.tasks.start_soon(self._run)

    async def _run(self) -> None:
        with self.scope:
            await self.leader.lead(self._work)

    async def _work(self) -> None:
        self.since = time.monotonic()
        try:
            await self.done.wait()
        finally:
            self.until = time.monotonic()

    @property
    def leads(self) -> bool:
        return bool(self.since) and not self.until


async def leading(world: World, one: Candidate) -> None:
    async def so() -> bool:
        return one.leads

    await world.until(so, 15.0)


class Cut:
    """The API server, as somebody sees it whose line may be cut."""

    def __init__(self, api: Api) -> None:
        self._api, self.is_cut = api, False

    async def find(self, kind: ResourceKind, name: str, namespace: str) -> Json | None:
        if self.is_cut:
            raise ApiUnreachable("the API server does not answer")
        return await self._api.find(kind, name, namespace)

    async def create(self, kind: ResourceKind, body: Json, namespace: str) -> Json:
        return await self._api.create(kind, body, namespace)

    async def replace(self, kind: ResourceKind, body: Json) -> Json:
        return await self._api.replace(kind, body)


async def test_one_leads_and_gives_the_lease_back_at_its_end(world: World) -> None:
    first = Candidate(world, "first")
    await leading(world, first)
    second = Candidate(world, "second")
    await anyio.sleep(2 * lease.DURATION)
    assert first.leads
    assert not second.leads, "the lease was renewed all the time"
    first.done.set()
    await leading(world, second)
    assert second.since - first.until < lease.DURATION / 2, "it need not wait for a lease to end"
    held = (await world.api.get(LEASES, NAME, world.namespace))["spec"]
    assert (held["holderIdentity"], held["leaseTransitions"]) == ("second", 1)


async def test_after_one_that_died_the_other_waits_for_its_lease(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def dead(self: Leader) -> None:
        """What was killed gives nothing back."""

    first = Candidate(world, "first")
    await leading(world, first)
    second = Candidate(world, "second")
    await anyio.sleep(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Leader, "_give_back", dead)
        first.scope.cancel()
        await anyio.sleep(0.1)
    await leading(world, second)
    assert second.since - first.until > lease.DURATION - 3 * lease.RETRY


async def test_who_cannot_renew_stops_before_another_begins(world: World) -> None:
    line = Cut(world.api)
    first = Candidate(world, "first", line)
    await leading(world, first)
    second = Candidate(world, "second")
    line.is_cut = True
    await leading(world, second)
    assert first.until, "two of them act"
    assert first.until < second.since
