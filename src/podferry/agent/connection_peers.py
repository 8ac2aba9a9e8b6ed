"""Connections that go on although a pod at one of their ends moves: the agents of both ends' nodes, and what they tell each other.

The target's agent tells the agents of the nodes on which the other ends' pods are, before the right to run passes. Each asks the
Migration's status whether that is so (`Cluster.moving`), and takes only what is about a connection that its pod has open, with an
address that the moving pod has. What becomes of the Migration it asks itself: so nobody need tell it that a move was taken back.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager

import anyio
import structlog

from podferry.core.connections import TCP, Address, End, end_of
from podferry.core.translation import Translation
from podferry.errors import Failed, PeerMisbehaved, PeerUntrusted, PodferryError, Refused, TimedOut, leaves
from podferry.wire.channel import Channel
from podferry.wire.messages import MovedConnection, Translate, Translated
from podferry.workload.pod.cluster_port import Cluster, MigrationName, MovingPod, PeerPod
from podferry.workload.pod.translations import PodTranslations, settle_ended
from podferry.workload.threads import run

LOOK_AGAIN = 1.0
TELL_WITHIN = 5.0
"""Seconds; the job stands still while other nodes are told."""

Ends = tuple[End, End]
Dial = Callable[[str], AbstractAsyncContextManager[Channel]]


class Translator:
    """The agent of `node`. `leaves` says of a pod of this node, by its uid, that it stands still to leave."""

    def __init__(
        self, node: str, cluster: Cluster, here: PodTranslations, dial: Dial, leaves: Callable[[str], bool]
    ) -> None:
        self._node, self._cluster, self._here, self._dial, self._leaves = node, cluster, here, dial, leaves
        self._log = structlog.get_logger().bind(node=node)

    async def run(self) -> None:
        """For ever: see to it that rules are there as long as their connections, and no longer."""
        await run(self._here.establish)
        while True:
            for uid in await run(self._here.pods):
                try:
                    await self._look_after(uid)
                except (PodferryError, OSError, ValueError) as error:
                    self._log.warning("a pod's connections are looked at again", pod=uid, error=str(error))
            await anyio.sleep(LOOK_AGAIN)

    async def _look_after(self, uid: str) -> None:
        await settle_ended(uid, self._cluster, self._here)
        await run(self._here.prune, uid)

    # On the target of a move.

    async def tell(self, migration: MigrationName, found: Sequence[tuple[PeerPod, Translation]]) -> frozenset[Ends]:
        """`podferry.workload.pod.cluster_port.ConnectionPeers`."""
        missing: set[Ends] = set()
        by_node: dict[str, list[MovedConnection]] = {}
        for pod, one in found:
            moved = MovedConnection(pod.uid, str(one.local), str(one.remote), str(one.remote_now))
            by_node.setdefault(pod.node, []).append(moved)

        async def tell_one(node: str, connections: list[MovedConnection]) -> None:
            absent = await self._tell(node, migration, tuple(connections))
            missing.update(_ends(connections[number]) for number in absent)

        try:
            with anyio.fail_after(TELL_WITHIN):
                async with anyio.create_task_group() as tasks:
                    for node, connections in by_node.items():
                        tasks.start_soon(tell_one, node, connections)
        except (TimeoutError, BaseExceptionGroup) as error:
            raise _cannot_tell(by_node, error) from error
        return frozenset(missing)

    async def _tell(
        self, node: str, migration: MigrationName, connections: tuple[MovedConnection, ...]
    ) -> Sequence[int]:
        if node == self._node:
            return await self._taken(migration, await self._cluster.moving(migration, self._node), connections)
        async with self._dial(node) as channel:
            await channel.send(Translate(migration.uid, migration.namespace, migration.name, connections))
            answer = await channel.receive()
            if not isinstance(answer, Translated) or any(one >= len(connections) for one in answer.missing):
                raise PeerMisbehaved(f"{node} answered with a {type(answer).__name__}")
            return answer.missing

    # On the node of another end.

    async def answer(self, channel: Channel, asked: Translate) -> None:
        """A conversation that the target of a move begins. Raises what is against it."""
        migration = MigrationName(asked.namespace, asked.name, asked.migration)
        moving = await self._cluster.moving(migration, channel.peer)
        if strangers := {one.pod for one in asked.connections} - moving.peers:
            raise PeerUntrusted(
                f"{channel.peer} names pods that the Migration {asked.namespace}/{asked.name} does not",
                why=", ".join(sorted(strangers)[:4]),
            )
        missing = await self._taken(migration, moving, asked.connections)
        await channel.send(Translated(asked.migration, tuple(missing)))

    async def _taken(
        self, migration: MigrationName, moving: MovingPod, connections: Sequence[MovedConnection]
    ) -> list[int]:
        for uid in {one.pod for one in connections}:
            await settle_ended(uid, self._cluster, self._here)
        return await run(self._take, migration, moving.addresses, connections)

    def _take(
        self, migration: MigrationName, moving: Collection[str], connections: Sequence[MovedConnection]
    ) -> list[int]:
        """Have these go on; the numbers of those that are not there."""
        pods: dict[str, list[int]] = {}
        for number, one in enumerate(connections):
            pods.setdefault(one.pod, []).append(number)
        missing: list[int] = []
        for uid, numbers in pods.items():
            missing += self._take_of(uid, migration, moving, {number: connections[number] for number in numbers})
        return sorted(missing)

    def _take_of(
        self, uid: str, migration: MigrationName, moving: Collection[str], connections: dict[int, MovedConnection]
    ) -> list[int]:
        try:
            network = self._here.network(uid)
        except Failed:  # it is gone, and its connections with it
            return list(connections)
        known, there = self._here.of(uid), self._here.open_in(network)
        found, missing = [], []
        for number, one in connections.items():
            ends, now = _ends(one), _address(one.remote_now)
            if ends not in there:
                missing.append(number)
                continue
            held = known.get(ends)
            if held is not None and held.pending not in (None, migration):
                raise Refused(f"the connection {ends[0]} -> {ends[1]} is about to change already", remedy="try again")
            before = held.before if held is not None and held.pending else held and held.now
            if str(before.remote_now if before else ends[1].address) not in moving:
                raise PeerUntrusted(
                    f"the connection {ends[0]} -> {ends[1]} is with another pod than the one that moves",
                    why=f"that one has {', '.join(sorted(moving)) or 'no address'}",
                )
            found.append(Translation(TCP, *ends, before.local_now if before else ends[0].address, now))
        self._demand_stays(uid)
        self._here.take(uid, network, found, migration)
        try:
            self._demand_stays(uid)  # it may have begun to stand still meanwhile, and not have seen this
        except Refused:
            self._here.settle(uid, migration, moved=False)
            raise
        return missing

    def _demand_stays(self, uid: str) -> None:
        if self._leaves(uid):
            raise Refused(
                "a pod at the other end of a connection moves at the same time",
                why=f"the pod with the uid {uid} is about to leave {self._node}",
                remedy="migrate when it has",
            )


def _ends(one: MovedConnection) -> Ends:
    try:
        return end_of(one.local), end_of(one.remote)
    except ValueError as error:
        raise PeerMisbehaved.because("no connection", error) from error


def _address(text: str) -> Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise PeerMisbehaved.because("no address", error) from error


def _cannot_tell(nodes: Collection[str], error: BaseException) -> PodferryError:
    cause = next(leaves(error))
    if isinstance(cause, PodferryError):
        return Failed.because("the other end of a connection of the pod cannot be told where it is going to be", cause)
    if not isinstance(cause, TimeoutError):
        raise error
    what = f"the other ends of the pod's connections were not told within {TELL_WITHIN:.0f} s where it is going to be"
    return TimedOut(what, why=f"they are on {', '.join(sorted(nodes))}")
