"""The API server is away for a while, in each phase of a move: agents and controllers wait, and it ends as it would have.

The engine is played; it goes on meanwhile, since nodes need no API server to copy memory. tests/cluster/test_disasters.py has the
same with real pods.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from podferry.core.phases import SourcePhase, TargetPhase
from podferry.errors import Failed
from podferry.kube import watch
from podferry.kube.client import PODS, Api
from podferry.kube.migration import Migration

from .conftest import fake_line, real_line
from .test_agents import Agents
from .world import QUICK, World

pytestmark = pytest.mark.anyio
AWAY = max(QUICK.farewell, QUICK.removal) + 1.0
"""Seconds: longer than the controller waits for anything that a node may fail to do meanwhile."""
SHORT = ("as the target is asked for", "once it runs")
LONG = ("before the order", "while it copies", "at the hand-over", "at the end")
WHEN = [*SHORT, *(pytest.param(one, marks=pytest.mark.slow) for one in LONG)]


@dataclass
class Outage:
    """Agents, controller, kubelets and the test reach the API server by a line, which is cut `when` the test comes there."""

    world: World
    cut: Callable[[], None]
    mend: Callable[[], None]
    when: str = ""
    over: anyio.Event = field(default_factory=anyio.Event)

    def at(self, moment: str) -> None:
        if moment == self.when:
            self.cut()
            self.world.tasks.start_soon(self._end)

    async def _end(self) -> None:
        await anyio.sleep(AWAY)
        self.mend()
        self.over.set()


@pytest.fixture(params=[pytest.param("fake", marks=pytest.mark.unit), pytest.param("real", marks=pytest.mark.cluster)])
async def outage(
    request: pytest.FixtureRequest, tmp_path: Path, anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Outage]:
    monkeypatch.setattr(watch, "RETRY_LAST", 1.0)
    if request.param == "fake":
        async with (
            fake_line() as (api, server, cut, mend),
            World.open(api, f"t-{secrets.token_hex(3)}", fake=server) as world,
        ):
            yield Outage(world, cut, mend)
        return
    control_plane = request.getfixturevalue("control_plane")
    async with (
        real_line(control_plane, tmp_path) as (api, cut, mend),
        World.open(api, f"t-{secrets.token_hex(3)}") as world,
    ):
        try:
            yield Outage(world, cut, mend)
        finally:
            mend()


async def ended(outage: Outage) -> Migration:
    await outage.over.wait()
    return await outage.world.ended()


async def pods(api: Api, world: World) -> list[str]:
    listed, _ = await api.list(PODS, world.namespace)
    return sorted(one["metadata"]["uid"] for one in listed)


async def left(world: World, *uids: str) -> None:
    """These pods are all that there is in the end."""

    async def alone() -> bool:
        return await pods(world.api, world) == sorted(uids)

    await world.until(alone)


@pytest.mark.parametrize("when", WHEN)
async def test_a_move_goes_on_and_ends_once(outage: Outage, when: str) -> None:
    world, outage.when = outage.world, when
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    migration = await world.migrate()
    await world.reached(lambda one: bool(one.metadata.get("finalizers")))
    outage.at("before the order")
    source = await agents.begun(migration)
    target = agents.arriving(migration)
    outage.at("while it copies")
    source.enter(SourcePhase.PRECOPY, wire_bytes=500)
    outage.at("as the target is asked for")
    source.enter(SourcePhase.PREPARE_TARGET)
    made = await agents.clusters[1].target_pod(migration.uid)
    target.enter(TargetPhase.PREPARED)
    await agents.resume()
    outage.at("once it runs")
    target.enter(TargetPhase.FILL)
    source.enter(SourcePhase.COMMIT, downtime_ms=100.0)
    outage.at("at the hand-over")
    await agents.clusters[0].hand_over(migration.uid)
    outage.at("at the end")
    source.end("completed")
    target.ended.set()
    found = await ended(outage)
    assert (found.status.phase, found.status.downtime) == ("Completed", "100ms")
    assert len(agents.engines[0].orders) == 1, "the order was given once"
    await left(world, made.uid)


@pytest.mark.parametrize("when", ["while it copies", pytest.param("at the end", marks=pytest.mark.slow)])
async def test_a_move_that_is_taken_back_leaves_the_pod_where_it_was(outage: Outage, when: str) -> None:
    world, outage.when = outage.world, when
    pod = await world.pod()
    world.controller()
    agents = Agents.of(world)
    migration = await world.migrate()
    source = await agents.begun(migration)
    target = agents.arriving(migration)
    await agents.clusters[1].target_pod(migration.uid)
    outage.at("while it copies")
    source.enter(SourcePhase.UNDO)
    target.enter(TargetPhase.GIVING_UP)
    outage.at("at the end")
    await agents.clusters[1].give_back(migration.uid)
    target.ended.set()
    source.end("rolled-back", Failed("the dump failed"))
    found = await ended(outage)
    assert (found.status.phase, found.status.ending and found.status.ending.message[:15]) == (
        "RolledBack",
        "the dump failed",
    )
    await left(world, pod["metadata"]["uid"])
