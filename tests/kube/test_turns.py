"""The queue of Migrations and the controller's memory, on a fake API server and on the real one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import httpx2
import pytest

from podferry.controller.metrics import ControllerMetrics
from podferry.controller.program import Controller
from podferry.core.turns import Limits
from podferry.kube.cache import Cache, Store
from podferry.kube.client import MIGRATIONS, NODE_DRAINS, NODES, PODS, Api, Json
from podferry.kube.migration import QUEUED, SCHEDULED, UID_LABEL, Migration, MigrationProgress

from .world import QUICK, World

pytestmark = pytest.mark.anyio


async def migrations(world: World) -> dict[str, Migration]:
    found = (await world.api.list(MIGRATIONS, world.namespace))[0]
    return {one["metadata"]["name"]: Migration.from_json(one) for one in found}


async def asked(world: World, count: int) -> None:
    """So many Migrations, each of a pod of its own, in this order."""
    for number in range(count):
        await world.pod(f"train-{number}")
    for number in range(count):
        await world.migrate(f"train-{number}", f"move-{number}")


def begun(all_of_them: dict[str, Migration]) -> set[str]:
    return {name for name, one in all_of_them.items() if one.status.phase != "Pending" and not one.ended}


async def test_no_more_move_at_once_than_allowed_and_the_others_say_what_they_wait_for(world: World) -> None:
    await asked(world, 5)
    world.controller(replace(QUICK, limits=Limits(outbound=2)))
    most, done, reasons = 0, set[str](), set[str]()

    async def all_moved() -> bool:
        nonlocal most
        now = await migrations(world)
        most = max(most, len(begun(now)))
        for name in begun(now) - done:
            done.add(name)
            world.tasks.start_soon(world.agents_move, name)
        for one in now.values():
            if one.status.phase == "Pending" and one.status.holds(QUEUED):
                said = one.status.condition(QUEUED)
                assert said is not None
                reasons.add(said.reason)
                assert one.status.message
                assert said.message in one.status.message
        return all(one.status.phase == "Completed" for one in now.values())

    await world.until(all_moved)
    assert most == 2
    assert reasons == {"SourceNodeBusy"}
    assert not any(one.status.holds(QUEUED) for one in (await migrations(world)).values())


async def test_a_place_that_is_given_back_goes_to_who_asked_next(world: World) -> None:
    """However the one before it ended: cancelled while it ran, or deleted while it waited."""
    await asked(world, 4)
    world.controller(replace(QUICK, limits=Limits(cluster=1)))

    async def queued() -> bool:
        now = await migrations(world)
        return sum(one.status.holds(QUEUED) for one in now.values()) == 3

    await world.until(queued)
    (first,) = begun(await migrations(world))
    waiting = sorted(set(await migrations(world)) - {first})
    await world.api.delete(MIGRATIONS, waiting[0], world.namespace)
    await world.patch(MIGRATIONS, first, {"spec": {"cancel": True}}, world.namespace)

    async def next_one() -> bool:
        return len(begun(await migrations(world))) == 1 and first not in begun(await migrations(world))

    await world.until(next_one)
    assert begun(await migrations(world)) <= set(waiting[1:])


async def test_a_killed_controller_keeps_the_limits(world: World) -> None:
    await asked(world, 4)
    settings = replace(QUICK, limits=Limits(cluster=2))
    scope = world.controller(settings)

    async def two() -> bool:
        return len(begun(await migrations(world))) == 2

    await world.until(two)
    before = begun(await migrations(world))
    scope.cancel()
    world.controller(settings)

    async def looked_at() -> bool:
        now = await migrations(world)
        return sum(one.status.holds(QUEUED) for one in now.values()) == 2

    await world.until(looked_at)
    assert begun(await migrations(world)) == before


async def test_into_one_node_no_more_move_at_once_than_allowed(world: World) -> None:
    """The scheduler has chosen; the placeholder keeps the room, and the move waits for the node."""
    await asked(world, 2)
    world.controller(replace(QUICK, limits=Limits(inbound=1)))

    async def one_runs_and_one_waits() -> bool:
        now = (await migrations(world)).values()
        said = [one.status.condition(SCHEDULED) for one in now if one.status.phase == "Scheduling"]
        return {one.reason for one in said if one is not None} == {"TargetNodeBusy"} and any(
            one.status.phase == "Running" for one in now
        )

    await world.until(one_runs_and_one_waits)
    (runs,) = [name for name, one in (await migrations(world)).items() if one.status.phase == "Running"]
    await world.agents_move(runs)
    (other,) = set(await migrations(world)) - {runs}
    await world.reached(lambda one: one.status.phase == "Running", other)


async def test_a_drain_says_how_many_leave_its_node_and_keeps_the_clusters_limit(world: World) -> None:
    for number in range(5):
        await world.pod(f"train-{number}")
    node = world.nodes[0]
    world.also.append((NODE_DRAINS, node))
    world.controller(replace(QUICK, limits=Limits(cluster=3, outbound=1)))
    await world.api.create(NODE_DRAINS, {"metadata": {"name": node}, "spec": {"parallel": 4}})

    async def three_run_and_one_waits() -> bool:
        now = await migrations(world)
        waiting = [one for one in now.values() if one.status.holds(QUEUED)]
        return len(begun(now)) == 3 and len(waiting) == 1 and len(now) == 4

    await world.until(three_run_and_one_waits)


class Counting(httpx2.AsyncBaseTransport):
    """Counts what passes, but for watches."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self.inner, self.seen = inner, list[str]()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.params.get("watch") != "true":
            self.seen.append(f"{request.method} {request.url.path}")
        return await self.inner.handle_async_request(request)


@asynccontextmanager
async def counted_requests(world: World) -> AsyncIterator[list[str]]:
    """What a controller asks of the API server, while a Migration of a pod is under way."""
    if world.fake is None:
        pytest.skip("requests are counted where the API server is ours")
    await world.pod()
    counting = Counting(world.fake)
    async with httpx2.AsyncClient(transport=counting, base_url="http://fake") as http, anyio.create_task_group() as own:
        own.start_soon(Controller(Api(http), world.namespace, QUICK).run)
        await world.migrate()
        yield counting.seen
        own.cancel_scope.cancel()


async def test_progress_makes_no_requests(world: World) -> None:
    """Agents tell several times a second how far they are."""
    async with counted_requests(world) as requests:
        await world.agents_prepare_target()
        await anyio.wait_all_tasks_blocked()
        requests.clear()
        ticks = 60
        for number in range(ticks):

            def tick(now: Migration, number: int = number) -> bool:
                now.status.progress = MigrationProgress(bytes=number + 1)
                return True

            await world.set(tick)
            await anyio.wait_all_tasks_blocked()  # until the controller has heard of it
        seen = list(requests)
    assert len(seen) < ticks / 10, seen


async def test_steps_read_from_memory(world: World) -> None:
    """A whole move: what is read from the API server is what the watches do not bring."""
    async with counted_requests(world) as requests:
        await world.agents_move()
        await world.ended()
        seen = list(requests)
    nodes = [one for one in seen if one.startswith("GET /api/v1/nodes/")]
    assert nodes == [], "nodes are followed"
    of_move = [one for one in seen if one.startswith("GET") and one.endswith("/migrations/move")]
    assert len(of_move) <= 6, of_move  # after a write that lost against an agent's


async def test_a_memory_never_says_that_something_is_gone(world: World) -> None:
    cache = Cache(world.api, (Store(NODES), Store(PODS, labels={UID_LABEL: None})))
    await cache.prime()
    pod = await world.pod()
    assert cache.store(PODS).get(world.namespace, "train") is None
    found = await cache.find(PODS, "train", world.namespace)
    assert found is not None
    assert found["metadata"]["uid"] == pod["metadata"]["uid"]
    label = {"metadata": {"labels": {UID_LABEL: "u"}}}
    uid = pod["metadata"]["uid"]
    labelled = await cache.patch(PODS, "train", label, world.namespace, uid=uid)
    assert cache.store(PODS).get(world.namespace, "train") is not None, "what was written is known at once"
    cache.store(PODS).learn(pod)
    known = cache.store(PODS).get(world.namespace, "train")
    assert known is not None
    assert known["metadata"]["resourceVersion"] == labelled["metadata"]["resourceVersion"], "older news changes nothing"
    found = await cache.find(PODS, "train", world.namespace)
    assert found is not None
    found["metadata"]["labels"].clear()
    again: Json | None = await cache.find(PODS, "train", world.namespace)
    assert again is not None
    assert again["metadata"]["labels"] == {UID_LABEL: "u"}, "what is handed out is the reader's own"
    off = {"metadata": {"labels": {UID_LABEL: None}}}
    await cache.patch(PODS, "train", off, world.namespace, uid=uid)
    assert cache.store(PODS).get(world.namespace, "train") is None
    assert await cache.find(PODS, "train", world.namespace) is not None


async def test_the_controllers_metrics_tell_what_waits_and_how_moves_ended(world: World) -> None:
    await asked(world, 2)
    metrics = ControllerMetrics()
    settings = replace(QUICK, limits=Limits(cluster=1))

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    async with anyio.create_task_group() as own:
        own.start_soon(Controller(world.api, world.namespace, settings, metrics).run)

        async def one_waits() -> bool:
            return (value("podferry_migrations_waiting"), value("podferry_migrations_under_way")) == (1, 1)

        await world.until(one_waits)
        (first,) = begun(await migrations(world))
        await world.agents_move(first)

        async def next_one() -> bool:
            return len(begun(await migrations(world)) - {first}) == 1

        await world.until(next_one)
        (second,) = begun(await migrations(world)) - {first}
        await world.patch(MIGRATIONS, second, {"spec": {"cancel": True}}, world.namespace)
        await world.ended(second)

        async def both_are_counted() -> bool:  # after they are written
            return value("podferry_migrations_ended_total", phase="Cancelled", reason="CancelRequested") == 1

        await world.until(both_are_counted)
        own.cancel_scope.cancel()
    assert value("podferry_controller_leading") == 1
    assert value("podferry_migrations_ended_total", phase="Completed", reason="Moved") == 1
    assert value("podferry_migrations_ended_total", phase="Cancelled", reason="CancelRequested") == 1
    assert value("podferry_migration_downtime_seconds_count") == 1
    assert value("podferry_migration_downtime_seconds_sum") == 0.042
    assert value("podferry_migration_duration_seconds_count") == 1
