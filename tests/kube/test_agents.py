"""The agents' Kubernetes side with the controller, on both API servers; the engine is played."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import httpx2
import pytest

from podferry.agent import known
from podferry.agent.kubernetes import Kubernetes
from podferry.core.phases import SourcePhase, TargetPhase
from podferry.errors import Failed, PeerLost, Refused
from podferry.kube.api_errors import NotServed
from podferry.kube.client import EVENTS, MIGRATIONS, NODES, PODS, Api
from podferry.kube.migration import HANDED_OVER, TARGET_REQUESTED, Migration
from podferry.model import Connections

from .engine import Engine, Half
from .world import QUICK, World

pytestmark = pytest.mark.anyio


@dataclass
class Agents:
    """The agents of both nodes; any can be killed and started again, its engine stays (it is journalled)."""

    world: World
    engines: tuple[Engine, Engine]
    clusters: list[Kubernetes]
    scopes: list[anyio.CancelScope]

    @classmethod
    def of(cls, world: World) -> Agents:
        agents = cls(world, (Engine(), Engine()), [], [])
        for number in (0, 1):
            agents.start(number)
        return agents

    def start(self, number: int, api: Api | None = None) -> None:
        cluster, scope = Kubernetes(api or self.world.api, self.world.nodes[number]), anyio.CancelScope()

        async def run() -> None:
            with scope:
                await cluster.run(self.engines[number])

        self.world.tasks.start_soon(run)
        self.clusters[number : number + 1], self.scopes[number : number + 1] = [cluster], [scope]

    def kill(self, number: int) -> None:
        self.scopes[number].cancel()

    async def begun(self, migration: Migration) -> Half:
        async def there() -> bool:
            return migration.uid in self.engines[0].halves

        await self.world.until(there)
        return self.engines[0].halves[migration.uid]

    def arriving(self, migration: Migration) -> Half:
        """The target's half appears, as it does when the source dials."""
        half = self.engines[1].halves[migration.uid] = Half(
            migration.uid, "target", self.engines[0].halves[migration.uid].pod
        )
        half.enter(TargetPhase.RECEIVE)
        return half

    async def resume(self, name: str = "move") -> None:
        """The kubelet of the target sees the container run."""
        migration = await self.world.get(name)
        assert migration.status.target_pod is not None
        self.world.resumed.add(migration.status.target_pod.uid)
        await self.world._play(await self.world.api.get(PODS, migration.status.target_pod.name, self.world.namespace))


async def test_a_pod_moves_and_the_migration_tells_how(world: World) -> None:
    await world.pod(labels={"app": "train"})
    world.controller()
    agents = Agents.of(world)
    migration = await world.migrate(
        mode="live",
        maxDowntime="250ms",
        timeout="10m",
        bandwidth="5Mi",
        allowPostCopy=True,
        resources=[{"name": "main", "limits": {"memory": "1Gi"}}],
        connections="Require",
    )
    await agents.begun(migration)
    (order,) = agents.engines[0].orders
    assert (order.containers, order.target) == (("main",), world.nodes[1])
    assert (order.order.timeout, order.order.bandwidth) == (600.0, 5 << 20)
    assert order.memory_limits == {"main": 1 << 30}
    assert (order.order.policy.max_downtime, order.order.policy.postcopy) == (0.25, True)
    assert order.order.connections is Connections.REQUIRE
    assert agents.clusters[0].address(world.nodes[1]) == f"10.1.0.{ord('b')}:7400"
    here, there = agents.clusters
    await agents.engines[0].move_whole(migration.uid, here, agents.engines[1], there, agents.resume)
    ended = await world.ended()
    assert ended.status.phase == "Completed"
    assert ended.status.downtime == "321ms"
    assert ended.status.progress is not None
    assert (ended.status.progress.bytes, ended.status.progress.rounds) == (500, 2)
    assert ended.status.engine_ending is not None
    assert ended.status.engine_ending.outcome == "completed"
    assert ended.status.holds("TargetReady")


async def test_what_is_worth_knowing_of_a_move_is_in_its_status_and_its_events(world: World) -> None:
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    migration = await world.migrate()
    half = await agents.begun(migration)
    warning, closed = (
        "the move closes TCP connections to others: a -> b",
        [f"a:{port} -> b:1" for port in range(99)],
    )
    half.enter(SourcePhase.PRECOPY, warnings=[warning, "w" * 5000])
    seen = await world.reached(lambda one: bool(one.status.warnings))
    assert seen.status.warnings == [warning, "w" * 1000], "within what the API server takes"
    half.enter(SourcePhase.CUTOVER, closed_connections=closed)
    here, there = agents.clusters
    await agents.engines[0].move_whole(migration.uid, here, agents.engines[1], there, agents.resume)
    ended = await world.ended()
    assert (ended.status.phase, ended.status.closed_connections) == ("Completed", closed[:64])

    async def told() -> bool:
        events = (await world.api.list(EVENTS, world.namespace))[0]
        said = {
            one["reason"]: one
            for one in events
            if one["regarding"]["uid"] == migration.uid and one["type"] == "Warning"
        }
        return (
            {"MigrationWarning", "ConnectionsClosed"} <= set(said)
            and warning in said["MigrationWarning"]["note"]
            and "a:0 -> b:1" in said["ConnectionsClosed"]["note"]
        )

    await world.until(told)


async def test_a_move_that_is_taken_back_has_closed_no_connection(world: World) -> None:
    """They are closed in the images alone, and the job on the source has them."""
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    half = await agents.begun(await world.migrate())
    half.enter(SourcePhase.CUTOVER, closed_connections=["a:1 -> b:1"])
    half.end("rolled-back", Failed("the link broke"))
    ended = await world.ended()
    assert (ended.status.phase, ended.status.closed_connections) == ("RolledBack", [])


async def test_progress_is_seen_while_it_runs(world: World) -> None:
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    half = await agents.begun(await world.migrate())
    await world.reached(lambda one: one.status.progress is not None)
    half.enter(SourcePhase.PRECOPY, wire_bytes=250)
    seen = await world.reached(lambda one: one.status.progress is not None and one.status.progress.bytes == 250)
    assert seen.status.progress is not None
    assert seen.status.progress.summary == "pre-copy 25%"
    assert (seen.status.progress.bytes_per_second, seen.status.progress.remaining) == (100, "3s")
    assert seen.status.engine is not None
    assert seen.status.engine.source == "pre-copy"


async def test_cancel_reaches_the_engine(world: World) -> None:
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    half = await agents.begun(await world.migrate())
    await world.patch(MIGRATIONS, "move", {"spec": {"cancel": True}}, world.namespace)
    assert (await world.ended()).status.phase == "Cancelled"
    assert half.cancelled


async def test_a_rehearsal_leaves_the_pod_and_forecasts_its_move(world: World) -> None:
    pod = await world.pod(labels={"app": "train"})
    world.controller()
    agents = Agents.of(world)
    half = await agents.begun(await world.migrate(dryRun=True))
    (order,) = agents.engines[0].orders
    assert order.rehearse
    half.enter(SourcePhase.CUTOVER, rehearsal={"stood_still_ms": 104.0, "forecast_ms": 222.0})
    half.end("rehearsed")
    ended = await world.ended()
    assert ended.status.phase == "Rehearsed"
    assert ended.status.forecast == "222ms"
    assert (ended.status.holds("Rehearsed"), ended.status.holds("Failed"), ended.status.holds("Completed")) == (
        *(True, False, False),
    )
    assert ended.status.target_pod is None
    left, _ = await world.api.list(PODS, world.namespace)
    assert [one["metadata"]["uid"] for one in left] == [pod["metadata"]["uid"]]


async def test_a_rehearsal_that_fails_says_what_a_move_would_fail_of(world: World) -> None:
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    half = await agents.begun(await world.migrate(dryRun=True))
    half.end("rolled-back", Failed("cannot dump train", why="a packet pipe", remedy="close it"))
    ended = await world.ended()
    assert ended.status.phase == "RolledBack"
    assert not ended.status.holds("Rehearsed")
    assert ended.status.ending is not None
    assert ended.status.ending.remedy == "close it"


async def test_what_the_engine_refuses_is_in_the_condition(world: World) -> None:
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    agents.engines[0].refuses = Refused("the pod is moving already", remedy="wait")
    await world.migrate()
    ended = await world.ended()
    assert ended.status.phase == "Refused"
    assert ended.status.ending is not None
    assert (ended.status.ending.message, ended.status.ending.code) == ("the pod is moving already", "PF100")


async def test_a_failure_of_the_engine_is_told_with_its_code(world: World) -> None:
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    half = await agents.begun(await world.migrate())
    half.end("rolled-back", PeerLost("the target went away", remedy="see its log"))
    ended = await world.ended()
    condition = ended.status.condition("Failed")
    assert condition is not None
    assert (ended.status.phase, condition.reason) == ("RolledBack", "PeerLost")
    assert ended.status.ending is not None
    assert ended.status.ending.code == PeerLost.code


async def test_a_target_pod_that_is_refused_is_the_engines_trouble(world: World) -> None:
    if world.fake is None:
        pytest.skip("a quota that is just too small, on the real one: test_owners")
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    migration = await world.migrate()
    half = await agents.begun(migration)
    agents.arriving(migration)
    quota = {"kind": "Status", "reason": "Forbidden", "message": "exceeded quota: pods, requested: pods=1"}
    world.fake.refuse.append(("POST", "/pods", 403, quota))
    with pytest.raises(Failed, match="exceeded quota"):
        await agents.clusters[1].target_pod(migration.uid)
    await agents.clusters[1].give_back(migration.uid)
    ended = await world.ended()
    condition = ended.status.condition("Failed")
    assert condition is not None
    assert (ended.status.phase, condition.reason) == ("RolledBack", "QuotaExceeded")
    assert half.cancelled


async def test_give_back_takes_the_wish_back_and_the_pod_goes(world: World) -> None:
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    migration = await world.migrate()
    half = await agents.begun(migration)
    agents.arriving(migration)
    await agents.clusters[1].target_pod(migration.uid)
    for _ in range(2):
        await agents.clusters[1].give_back(migration.uid)
    given = await world.get()
    assert not given.status.holds(TARGET_REQUESTED)
    half.end("rolled-back", Failed("the dump failed"))
    assert (await world.ended()).status.phase == "RolledBack"

    async def alone() -> bool:
        return len((await world.api.list(PODS, world.namespace))[0]) == 1

    await world.until(alone)


@pytest.mark.parametrize("when", ["before the order", "while it copies", "before the hand-over"])
async def test_agents_that_are_killed_and_started_again_go_on(world: World, when: str) -> None:
    await world.pod()
    world.controller()
    agents = Agents.of(world)

    def restart(moment: str) -> None:
        if moment == when:
            for number in (0, 1):
                agents.kill(number)
                agents.start(number)

    migration = await world.migrate()
    restart("before the order")
    source = await agents.begun(migration)
    target = agents.arriving(migration)
    source.enter(SourcePhase.PRECOPY, wire_bytes=500)
    restart("while it copies")
    await agents.clusters[1].target_pod(migration.uid)
    target.enter(TargetPhase.PREPARED)
    await agents.resume()
    source.enter(SourcePhase.COMMIT, downtime_ms=100.0)
    restart("before the hand-over")
    target.enter(TargetPhase.FILL)
    await agents.clusters[0].hand_over(migration.uid)
    source.end("completed")
    target.ended.set()
    ended = await world.ended()
    assert (ended.status.phase, ended.status.downtime) == ("Completed", "100ms")
    assert len(agents.engines[0].orders) == 1, "the order was given once"


async def test_the_arbiters_verdict_reaches_the_engine(world: World) -> None:
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    migration = await world.migrate()
    source = await agents.begun(migration)
    agents.arriving(migration)
    await agents.clusters[1].target_pod(migration.uid)
    agents.kill(1)
    source.enter(SourcePhase.LOST)
    fence = [{"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute", "value": "nodeshutdown"}]
    await world.patch(NODES, world.nodes[1], {"spec": {"taints": fence}})
    ended = await world.ended()
    assert (source.resolved, ended.status.arbiter, ended.status.phase) == ("source", "source", "RolledBack")


async def test_a_source_that_owes_memory_is_neither_resolved_nor_dismissed_before_the_target_has_it(
    world: World,
) -> None:
    """The nodes lose each other in post-copy, for longer than a source is given to say farewell."""
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    migration = await world.migrate()
    source = await agents.begun(migration)
    target = agents.arriving(migration)
    await agents.clusters[1].target_pod(migration.uid)
    source.owes = True
    source.enter(SourcePhase.SERVE, downtime_ms=100.0)
    await agents.resume()
    target.enter(TargetPhase.FILL)
    await world.reached(lambda one: one.status.holds(HANDED_OVER))
    source.enter(SourcePhase.LOST)
    await anyio.sleep(QUICK.farewell + 2)
    kept = await world.api.get(PODS, "train", world.namespace)
    assert "deletionTimestamp" not in kept["metadata"]
    assert source.resolved == ""
    source.enter(SourcePhase.SERVE)
    source.end("completed")
    target.ended.set()
    ended = await world.ended()
    assert ended.status.phase == "Completed"


async def test_hand_over_and_give_back_end_where_the_migration_is_gone(world: World) -> None:
    await world.pod()
    agents = Agents.of(world)
    scope = world.controller()
    migration = await world.migrate()
    await agents.begun(migration)
    scope.cancel()
    done: list[str] = []

    async def ask(what: Callable[[str], object], word: str) -> None:
        await what(migration.uid)  # type: ignore[misc]
        done.append(word)

    world.tasks.start_soon(ask, agents.clusters[0].hand_over, "over")
    await world.reached(lambda one: one.status.holds("Resumed"))
    await world.patch(MIGRATIONS, "move", {"metadata": {"finalizers": None}}, world.namespace)
    await world.api.delete(MIGRATIONS, "move", world.namespace)

    async def over() -> bool:
        return done == ["over"]

    await world.until(over)


@dataclass
class Path(httpx2.AsyncBaseTransport):
    """The way to the fake API server, which may be `away` in several manners: these are what an agent then gets to see."""

    server: httpx2.AsyncBaseTransport
    away: Callable[[httpx2.Request], httpx2.Response] | None = None
    turned_away: int = 0

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if self.away is None:
            return await self.server.handle_async_request(request)
        await anyio.lowlevel.checkpoint()
        self.turned_away += 1
        return self.away(request)

    @asynccontextmanager
    async def api(self) -> AsyncIterator[Api]:
        async with httpx2.AsyncClient(transport=self, base_url="http://fake") as http:
            yield Api(http)


def no_connection(request: httpx2.Request) -> httpx2.Response:
    raise httpx2.ConnectError("connection refused", request=request)


def starting(request: httpx2.Request) -> httpx2.Response:
    """An API server that does not serve our kind yet."""
    return httpx2.Response(404, text="404 page not found\n", request=request)


def not_served(request: httpx2.Request) -> httpx2.Response:
    words = "the server could not find the requested resource"
    body = {"kind": "Status", "status": "Failure", "message": words, "reason": "NotFound", "details": {}, "code": 404}
    return httpx2.Response(404, content=json.dumps(body), request=request)


def a_proxys_page(request: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(200, text="<html>please log in</html>", request=request)


def overloaded(request: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(503, text="etcd has no leader", request=request)


def unauthorized(request: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(401, json={"kind": "Status", "reason": "Unauthorized", "code": 401}, request=request)


@pytest.mark.parametrize("away", [no_connection, starting, not_served, a_proxys_page, overloaded, unauthorized])
async def test_an_api_server_that_is_away_does_not_say_that_a_migration_is_gone(
    world: World, away: Callable[[httpx2.Request], httpx2.Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's agent is started anew when the job runs on the target, and the API server does not answer for long."""
    if world.fake is None:
        pytest.skip("the real API server does not go away here")
    monkeypatch.setattr(known, "UNSEEN", 0.05)
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    migration = await world.migrate()
    source = await agents.begun(migration)
    target = agents.arriving(migration)
    await agents.clusters[1].target_pod(migration.uid)
    target.enter(TargetPhase.PREPARED)
    await agents.resume()
    target.enter(TargetPhase.FILL)
    agents.kill(0)
    source.enter(SourcePhase.COMMIT)
    path, killed = Path(world.fake, away), []

    async def commit() -> None:
        await agents.clusters[0].hand_over(migration.uid)
        killed.append("the original")
        source.end("completed")

    async with path.api() as api:
        agents.start(0, api)
        world.tasks.start_soon(commit)

        async def asked_often() -> bool:
            return path.turned_away > 20

        await world.until(asked_often)
        assert not killed, "nobody has said that the Migration is gone"
        path.away = None
        ended = await world.ended()
        agents.kill(0)
    assert (killed, ended.status.phase) == (["the original"], "Completed")


@pytest.mark.parametrize("away", [starting, not_served])
async def test_only_the_api_servers_own_not_found_of_the_object_is_one(
    world: World, away: Callable[[httpx2.Request], httpx2.Response]
) -> None:
    if world.fake is None:
        pytest.skip("the real API server does not go away here")
    migration = await world.migrate()
    path = Path(world.fake)
    async with path.api() as api:
        one, key = known.Known(api), (world.namespace, "move")
        assert await one.read(key) is not None
        path.away = away
        with pytest.raises(NotServed):
            await one.read(key)
        assert one.newest(migration.uid) is not None
        path.away = None
        await api.delete(MIGRATIONS, "move", world.namespace)
        assert await one.read(key) is None
        assert one.newest(migration.uid) is None


async def test_an_order_without_the_containers_is_refused_and_not_begun(world: World) -> None:
    """An older controller has not said which ones move; the agent may not read the pod to see."""
    await world.pod()
    scope = world.controller()
    await world.migrate()
    await world.reached(lambda one: one.status.phase == "Running")
    scope.cancel()

    def as_of_old(now: Migration) -> bool:
        now.status.containers = []
        return True

    await world.set(as_of_old)
    agents = Agents.of(world)
    over = await world.reached(lambda one: one.status.engine_ending is not None)
    assert over.status.engine_ending is not None
    assert over.status.engine_ending.outcome == "refused"
    assert "podferry-controller" in over.status.engine_ending.message
    assert not agents.engines[0].orders


async def test_an_api_server_that_is_away_does_not_refuse_an_order(world: World) -> None:
    """It goes away between the agent's reading of the Migration and its taking the order up."""
    if world.fake is None:
        pytest.skip("the real API server does not go away here")
    await world.pod()
    path = Path(world.fake)
    failed: list[str] = []

    def away(request: httpx2.Request) -> httpx2.Response:
        path.away = None
        failed.append(request.url.path)
        return overloaded(request)

    async with path.api() as api:
        agents = Agents(world, (Engine(), Engine()), [], [])
        agents.start(0, api)
        replace = api.replace

        async def cannot_be_written(*arguments: object) -> object:
            if not failed:
                path.away = away
            return await replace(*arguments)  # type: ignore[arg-type]

        api.replace = cannot_be_written  # type: ignore[method-assign, assignment]
        world.controller()
        await agents.begun(await world.migrate())
        assert len(failed) == 1
        assert (await world.get()).status.engine_ending is None
        agents.kill(0)


async def test_a_migration_that_leaves_the_selector_of_a_watch_is_not_gone(world: World) -> None:
    await world.pod()
    scope = world.controller()
    agents = Agents.of(world)
    migration = await world.migrate()
    await agents.begun(migration)
    scope.cancel()
    over: list[str] = []

    async def hand_over() -> None:
        await agents.clusters[0].hand_over(migration.uid)
        over.append("over")

    world.tasks.start_soon(hand_over)
    await world.reached(lambda one: one.status.holds("Resumed"))

    def elsewhere(now: Migration) -> bool:
        now.status.source_node = "somewhere-else"
        return True

    def here_again(now: Migration) -> bool:
        now.status.source_node = world.nodes[0]
        now.status.message = "back"
        return True

    await world.set(elsewhere)
    await world.set(here_again)
    source = agents.clusters[0]

    async def seen() -> bool:
        newest = source._known.newest(migration.uid)
        return newest is not None and newest.status.message == "back"

    await world.until(seen)
    assert not over


async def test_a_migration_of_a_newer_version_is_left_alone_and_others_move(world: World) -> None:
    if world.fake is None:
        pytest.skip("the real API server keeps the schema of this version")
    await world.pod()
    body = {"metadata": {"name": "newer"}, "spec": {"podName": "other", "mode": "teleport"}}
    await world.api.create(MIGRATIONS, body, world.namespace)
    status = {"phase": "Beaming", "sourceNode": world.nodes[0], "targetNode": world.nodes[1]}
    await world.patch(MIGRATIONS, "newer", {"status": status}, world.namespace, part="status")
    world.controller()
    agents = Agents.of(world)
    migration = await world.migrate()
    await agents.begun(migration)
    here, there = agents.clusters
    await agents.engines[0].move_whole(migration.uid, here, agents.engines[1], there, agents.resume)
    assert (await world.ended()).status.phase == "Completed"

    async def said() -> bool:
        newer = await world.api.get(MIGRATIONS, "newer", world.namespace)
        return [one["reason"] for one in newer["status"].get("conditions", [])] == ["NewerVersion"]

    await world.until(said)
    newer = await world.api.get(MIGRATIONS, "newer", world.namespace)
    assert (newer["status"]["phase"], newer["status"]["conditions"][0]["status"]) == ("Beaming", "False")


async def test_a_node_that_is_replaced_under_its_name_is_found(world: World) -> None:
    await world.pod()
    world.controller()
    agents = Agents.of(world)
    await agents.begun(await world.migrate())
    here, other = agents.clusters[0], world.nodes[1]
    assert here.address(other) == f"10.1.0.{ord('b')}:7400"
    new = {"status": {"addresses": [{"type": "InternalIP", "address": "10.1.0.77"}]}}
    await world.patch(NODES, other, new, part="status")

    async def found() -> bool:
        return here.address(other) == "10.1.0.77:7400"

    await world.until(found)
