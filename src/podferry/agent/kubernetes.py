"""The agent's Kubernetes side: it watches the Migrations of its node, has the engine do them, and tells how far they are.

It remembers nothing either. What a Migration's status says and what the engine has journalled is enough for an agent
that was restarted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Any, TypeVar

import anyio
import structlog
from anyio.abc import TaskGroup

from podferry.agent.addresses import Addresses
from podferry.agent.claims import claim, is_decided
from podferry.agent.known import Key, Known
from podferry.agent.status_reporter import Reporter, set_resumed
from podferry.core.migration import MigrationPhase
from podferry.core.phases import SourcePhase, TargetPhase
from podferry.core.precopy import PreCopyPolicy
from podferry.engine.order import Order
from podferry.errors import Failed, PodferryError, Refused
from podferry.kube import status as store
from podferry.kube.api_errors import ApiUnreachable, NotServed, ObjectNotFound, transient
from podferry.kube.client import MIGRATIONS, Api
from podferry.kube.connection_status import AddressKind
from podferry.kube.events import Events
from podferry.kube.migration import (
    HANDED_OVER,
    RESUMED,
    SOURCE_REPLACED,
    TARGET_CREATED,
    TARGET_REQUESTED,
    Ending,
    EnginePhases,
    Migration,
)
from podferry.kube.quantities import quantity, seconds
from podferry.kube.resources import memory_limits
from podferry.kube.watch import Queues, follow
from podferry.model import Connections, Mode, Outcome
from podferry.workload.pod.cluster_port import MigrationName, MovingPod, PeerPod, PodMigration, PodName, PodOrder, Pods
from podferry.workload.pod.probes import network_probes

Json = dict[str, Any]
Result = TypeVar("Result")

RETRY = 1.0
PEERS_WITHIN = 10.0
"""Seconds that the controller has to say whose the addresses are at the other ends of connections; the job runs meanwhile."""
ADMIT_WITHIN = 10.0
"""Seconds that an offer waits for the watch to bring the Migration that it names: the source may have seen it first."""


class Kubernetes:
    """`podferry.workload.pod.cluster_port.Cluster`, and what gives the engine its orders."""

    def __init__(self, api: Api, node: str) -> None:
        self._api, self._node = api, node
        self._events = Events(api, "podferry-agent", node)
        self._log = structlog.get_logger().bind(node=node)
        self._addresses = Addresses()
        self._known = Known(api)
        self._reporters: dict[tuple[str, str], Reporter] = {}
        self._pods: Pods
        self._tasks: TaskGroup

    async def run(self, pods: Pods) -> None:
        """Work for ever: `pods` is the engine."""
        self._pods = pods
        async with anyio.create_task_group() as self._tasks:
            queue = Queues[Key](self._tasks, self._step)
            for side in ("sourceNode", "targetNode"):
                self._tasks.start_soon(self._follow, side, queue)

    async def _follow(self, side: str, queue: Queues[Key]) -> None:
        async for what, body in follow(self._api, MIGRATIONS, fields={f"status.{side}": self._node}):
            if what != "DELETED" and self._known.see(body) and (seen := self._known.newest(body["metadata"]["uid"])):
                self._addresses.see(seen)
            queue.put((body["metadata"]["namespace"], body["metadata"]["name"]))

    # What there is to do.

    async def _step(self, key: Key) -> float | None:
        migration = await self._known.read(key)
        if migration is None:
            return None
        self._addresses.see(migration)
        half = self._pods.migrations().get(migration.uid)
        if migration.status.source_node == self._node:
            return await self._source(migration, half)
        if half is not None and not migration.ended:
            self._report(migration, half)
        # The engine's half appears when the source dials; nobody tells, so look again.
        return RETRY if half is None and migration.status.phase is MigrationPhase.RUNNING else None

    async def _source(self, migration: Migration, half: PodMigration | None) -> float | None:
        status = migration.status
        if half is None and status.phase is MigrationPhase.RUNNING and status.engine_ending is None:
            half = await self._begin(migration)
        if half is None:
            return None
        if not migration.ended:
            self._report(migration, half)
        if (status.abort is not None or migration.ended) and half.cancel():
            self._log.info("taken back", migration=migration.name)
        if status.arbiter is not None and half.record()["phase"] == SourcePhase.LOST:
            # Refused in post-copy: the target still needs the original, and is asked again and again.
            with contextlib.suppress(Refused):
                half.resolve(run_on_source=status.arbiter == "source")
        return None

    async def _begin(self, migration: Migration) -> PodMigration | None:
        """Give the engine its order, unless the controller has changed its mind in the same moment."""

        def begun(now: Migration) -> bool:
            if now.status.phase is not MigrationPhase.RUNNING or now.status.abort is not None:
                return False
            now.status.engine = now.status.engine or EnginePhases()
            now.status.engine.source = now.status.engine.source or SourcePhase.CHECK
            return True

        migration = await store.change(self._api, migration, begun)
        self._addresses.see(migration)
        status = migration.status
        if status.phase is not MigrationPhase.RUNNING or status.abort is not None:
            return None
        assert status.source_pod is not None
        assert status.target_node is not None
        try:
            if not status.containers:
                raise Refused(
                    f"the Migration {migration.name} does not say which containers move",
                    why="podferry-controller is older than this node's agent",
                    remedy="upgrade podferry-controller, and migrate again",
                )
            if self._addresses.of(status.target_node) is None:
                raise Refused(
                    f"the Migration {migration.name} does not say at which address {status.target_node} is",
                    why="the node has no InternalIP, or podferry-controller is older than this node's agent",
                    remedy="see kubectl get node -o wide; or upgrade podferry-controller, and migrate again",
                )
            half = await self._pods.move(
                PodOrder(
                    id=migration.uid,
                    pod=PodName(migration.namespace, status.source_pod.name, status.source_pod.uid),
                    containers=tuple(one.name for one in status.containers),
                    target=status.target_node,
                    order=order_of(migration),
                    probes=network_probes(status.containers),
                    memory_limits=memory_limits(migration.spec.resources),
                    rehearse=migration.spec.dry_run,
                )
            )
        except PodferryError as error:
            if transient(error) or isinstance(error, NotServed):
                raise  # nothing was said about the pod: it is tried again
            await store.change(self._api, migration, _never_began(error))
            return None
        await self._events.publish(migration.to_json(), "MigrationRunning", f"copying to {status.target_node}")
        return half

    def _report(self, migration: Migration, half: PodMigration) -> None:
        """Have somebody tell the cluster how far this half is, until its end."""
        key = migration.uid, half.role
        if key not in self._reporters:
            self._reporters[key] = reporter = Reporter(
                self._api, self._events, lambda: self._known.newest(migration.uid), half
            )
            self._tasks.start_soon(reporter.run, lambda: self._reporters.pop(key, None))

    # What the engine asks (`podferry.workload.pod.cluster_port.Cluster`).

    def address(self, node: str) -> str | None:
        """HOST:PORT of the agent of `node`."""
        return self._addresses.of(node)

    def lives_at(self, host: str) -> bool:
        """Whether a node that this one has had to do with has this IP address."""
        return self._addresses.has(host)

    async def admit(self, id: str, pod: PodName, source: str, mode: Mode) -> None:
        """Hold an offer to the Migration with this uid, which must admit it now, and admits one."""
        seen = None
        with anyio.move_on_after(ADMIT_WITHIN), contextlib.suppress(ObjectNotFound):
            seen = await self._known.once(id, is_decided)
        if (seen := seen or self._known.newest(id)) is None:
            raise Refused(
                f"{source} may not offer {pod} to {self._node}", why=f"no Migration to {self._node} has the uid {id}"
            )
        change = claim(node=self._node, peer=source, pod=pod, mode=mode)
        with anyio.move_on_after(ADMIT_WITHIN):
            return self._known.learn(
                await self._patiently(partial(store.change, self._api, seen.model_copy(deep=True), change))
            )
        raise ApiUnreachable(
            f"{self._node} cannot note that it takes the offer of {pod}",
            why=f"the API server has not answered for {ADMIT_WITHIN:.0f} s",
        )

    def keeps_name(self, id: str) -> bool:
        """Whether the target pod has the source's name."""
        seen = self._known.newest(id)
        return seen is not None and bool(seen.status.keeps_name)

    async def replaced(self, id: str) -> bool:
        """Whether the controller has given the source's name away, by what the API server says now."""
        with contextlib.suppress(ObjectNotFound):  # its pods went with it
            seen = await self._known.once(id, lambda _: True)
            now = await self._patiently(partial(self._known.read, (seen.namespace, seen.name)))
            return now is not None and now.uid == id and now.status.holds(SOURCE_REPLACED)
        return False

    async def target_pod(self, id: str) -> PodName:
        """Have the controller make the target pod, and wait for its name."""

        def asked(now: Migration) -> bool:
            now.status.engine = now.status.engine or EnginePhases()
            late = bool(now.status.keeps_name)  # the right to run is here: the controller waits for this word
            now.status.engine.target = str(TargetPhase.RESUME if late else TargetPhase.RECEIVE)
            why = "RightToRunIsHere" if late else "Converged"
            now.status.set_condition(TARGET_REQUESTED, True, why, f"{self._node} is ready for the pod")
            return True

        await self._patiently(partial(self._known.change, id, asked))
        made = await self._known.once(id, lambda one: _is_made(one) or bool(one.status.abort) or one.ended)
        if made.status.target_pod is None:
            end = made.status.abort or made.status.ending
            raise Failed(
                "the target pod was not made",
                why=end.message if end else f"the Migration is {made.status.phase}",
                remedy=end.remedy if end else "",
            )
        return PodName(made.namespace, made.status.target_pod.name, made.status.target_pod.uid)

    async def give_back(self, id: str) -> None:
        """The controller deletes what it made as soon as the source's agent has said how it ended."""

        def given(now: Migration) -> bool:
            now.status.engine = now.status.engine or EnginePhases()
            now.status.engine.target = str(TargetPhase.GAVE_UP)
            if now.status.condition(TARGET_REQUESTED) is not None:
                now.status.set_condition(TARGET_REQUESTED, False, "GaveUp", "the job will not run here")
            return not now.ended

        with contextlib.suppress(ObjectNotFound):  # its pods went with it
            await self._patiently(partial(self._known.change, id, given))

    async def hand_over(self, id: str) -> None:
        """Tell the controller that the job runs on the target, and wait until the owner has its pod."""
        while True:
            try:
                await self._known.change(id, lambda now: set_resumed(now, committing=True))
                await self._known.once(id, lambda one: one.status.holds(HANDED_OVER) or _is_over(one))
                return
            except ObjectNotFound:
                return  # somebody removed the Migration by force: there is nobody to wait for
            except PodferryError as error:
                self._log.warning("the hand-over waits", migration=id, error=str(error))
                await anyio.sleep(RETRY)

    async def peers(self, id: str, wanted: Collection[str] = ()) -> tuple[MigrationName, Mapping[str, PeerPod]]:
        """The Migration, and the pods at the other ends of connections, once the controller has said whose the addresses are."""
        with anyio.move_on_after(PEERS_WITHIN):
            await self._known.once(id, lambda one: set(wanted) <= {peer.address for peer in one.status.peers})
        if (seen := self._known.newest(id)) is None:
            raise ObjectNotFound(f"there is no Migration with uid {id}", why="it was removed by force")
        self._addresses.see(seen)
        found = (one for one in seen.status.peers if one.kind is AddressKind.POD and one.agent and one.uid and one.node)
        name = MigrationName(seen.namespace, seen.name, seen.uid)
        return name, {one.address: PeerPod(one.uid, one.node) for one in found}

    async def moving(self, migration: MigrationName, target: str) -> MovingPod:
        """Ask the API server for a Migration that is another node's."""
        seen = await self._ask(migration)
        status = seen.status if seen is not None else None
        if (
            status is None
            or status.target_node != target
            or status.phase is not MigrationPhase.RUNNING
            or status.abort is not None
            or status.settings is None
            or status.settings.connections is not Connections.PRESERVE
        ):
            raise Refused(
                f"{target} may not have connections go on to a pod that moves there",
                why=f"no Migration {migration.namespace}/{migration.name} with that target, which preserves connections, runs now",
            )
        peers = frozenset(one.uid for one in status.peers if one.node == self._node and one.uid)
        return MovingPod(frozenset(status.source_pod_addresses), peers)

    async def moved(self, migration: MigrationName) -> bool | None:
        """Ask the API server how it has ended. One that is gone had its end: whoever removed it by force has seen to that."""
        seen = await self._ask(migration)
        if seen is None:
            return True
        if (ending := seen.status.engine_ending) is not None:
            return ending.outcome == Outcome.COMPLETED
        return seen.status.holds(RESUMED) if seen.ended else None

    async def _ask(self, migration: MigrationName) -> Migration | None:
        body = await self._api.find(MIGRATIONS, migration.name, migration.namespace)
        return Migration.from_json(body) if body is not None and body["metadata"]["uid"] == migration.uid else None

    async def _patiently(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """What `call` returns, once the API server answers: that it is away says nothing of the migration, which has deadlines of
        its own."""
        while True:
            try:
                return await call()
            except PodferryError as error:
                if not (transient(error) or isinstance(error, NotServed)):
                    raise
                self._log.warning("the API server does not answer", error=str(error))
                await anyio.sleep(RETRY)


def _is_made(migration: Migration) -> bool:
    """The target pod is there, with all that it has to have before the job runs in it."""
    return migration.status.target_pod is not None and migration.status.holds(TARGET_CREATED)


def _is_over(migration: Migration) -> bool:
    return migration.ended or migration.status.phase is MigrationPhase.UNDOING


def _never_began(error: PodferryError) -> store.Change:
    def told(now: Migration) -> bool:
        now.status.engine_ending = Ending(
            outcome=str(Outcome.REFUSED if isinstance(error, Refused) else Outcome.ROLLED_BACK),
            reason=type(error).__name__,
            message=str(error),
            code=error.code,
            remedy=error.remedy,
        )
        return True

    return told


def order_of(migration: Migration) -> Order:
    """The order to the engine, from the settings that the controller has written into the Migration."""
    spec = migration.settings
    policy = PreCopyPolicy(
        max_downtime=seconds(spec.max_downtime) if spec.max_downtime else PreCopyPolicy.max_downtime,
        throttle=spec.allow_auto_converge,
        postcopy=spec.allow_post_copy,
    )
    bandwidth = quantity(spec.bandwidth) if spec.bandwidth else None
    max_freeze = seconds(spec.max_freeze) if spec.max_freeze else None
    return Order(
        spec.mode,
        timeout=seconds(spec.timeout),
        bandwidth=bandwidth,
        policy=policy,
        max_freeze=max_freeze,
        connections=spec.connections,
    )
