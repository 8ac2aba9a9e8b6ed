"""The agents' Kubernetes side with the controller, on both API servers; the engine is played."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import anyio
import pytest

from podferry.agent.kubernetes import Kubernetes
from podferry.core.phases import SourcePhase, TargetPhase
from podferry.errors import Failed, PeerLost, Refused
from podferry.kube.client import MIGRATIONS, NODES, PODS
from podferry.kube.migration import HANDED_OVER, TARGET_REQUESTED, Migration

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

    def start(self, number: int) -> None:
        cluster, scope = Kubernetes(self.world.api, self.world.nodes[number]), anyio.CancelScope()

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
        mode="live", maxDowntime="250ms", timeout="10m", bandwidth="5Mi", allowPostCopy=True
    )
    await agents.begun(migration)
    (order,) = agents.engines[0].orders
    assert (order.containers, order.target) == (("main",), world.nodes[1])
    assert (order.order.timeout, order.order.bandwidth) == (600.0, 5 << 20)
    assert (order.order.policy.max_downtime, order.order.policy.postcopy) == (0.25, True)
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
    assert ended.status.holds("Poised")


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
    await world.api.patch(MIGRATIONS, "move", {"spec": {"cancel": True}}, world.namespace)
    assert (await world.ended()).status.phase == "Cancelled"
    assert half.cancelled


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
    target.enter(TargetPhase.POISED)
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
    await world.api.patch(NODES, world.nodes[1], {"spec": {"taints": fence}})
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
    await world.api.patch(MIGRATIONS, "move", {"metadata": {"finalizers": None}}, world.namespace)
    await world.api.delete(MIGRATIONS, "move", world.namespace)

    async def over() -> bool:
        return done == ["over"]

    await world.until(over)
