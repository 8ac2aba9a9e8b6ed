"""A running workload on the source: its containers freeze together, are dumped side by side, and end together.

A container alone is a workload of one. Whose the containers are, podferry's user's or the kubelet's, is asked of their `Owner`.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from itertools import chain

import anyio

from podferry.core.connections import BRIEF, ConnectionsLost, refusal, refused
from podferry.core.translation import Translation
from podferry.criu.connections import settle
from podferry.engine.ports import IMAGES, DirtySet, Images, RemotePages
from podferry.errors import Failed
from podferry.memory.ranges import Runs
from podferry.model import Connections, Dump
from podferry.node.cgroup import Cgroup
from podferry.wire.frames import Drop, Pages
from podferry.wire.held_pages import HeldPages
from podferry.wire.messages import AddressSpaceSum, TreeSum
from podferry.workload.frozen import FrozenContainer
from podferry.workload.helpers import gathered
from podferry.workload.numbers import container_of_directory, directory_of
from podferry.workload.pod.kept_connections import IMAGE as KEPT
from podferry.workload.pod.kept_connections import KeptConnections, encode
from podferry.workload.remote_pages import FrozenPages
from podferry.workload.source_container import SourceContainer
from podferry.workload.source_tree import SourceTree
from podferry.workload.threads import at_once

ACCEPT_PAUSES = (*(0.02,) * 12, *(0.1,) * 6, *(0.4,) * 5)
"""Seconds for which a workload goes on, each time that it was frozen while a connection within it waited to be accepted; more or
less, by chance: a job that works in step with the pauses would be frozen at the same point each time."""


class Owner:
    """Whose the workload's containers are on this node, and what it is to be told of their move: nothing, unless a kind of owner
    says otherwise. Each call may be made again."""

    async def stand_by(self, cgroups: Sequence[Cgroup]) -> None:
        """The freeze is near."""

    async def before_freeze(self) -> None:
        """The containers stand still from now on, unless the migration is undone."""

    async def completed(self, images: Images) -> Images:
        """The images, with what else of the source the target's containers need."""
        return images

    async def replaced(self) -> bool:
        """After GO: whether nothing of the workload may run here any more, because its name is its successor's."""
        return False

    async def before_commit(self) -> None:
        """The workload runs on the target: returns when the frozen containers may be killed."""

    async def after_commit(self, killed: Sequence[FrozenContainer]) -> None:
        """They were killed: see to what is left of them."""


class FrozenWorkload:
    """The frozen original, its containers by their number."""

    def __init__(self, containers: Sequence[FrozenContainer], owner: Owner) -> None:
        self._frozen, self._owner = containers, owner
        self._remote: RemotePages | None = None

    def remote_pages(self) -> RemotePages:
        """Post-copy: the memory that the target has not got."""
        if self._remote is None:
            pids: dict[int, int] = {}
            runs: dict[int, Runs] = {}
            for one in self._frozen:
                left = one.left()
                pids |= left.pids
                runs |= left.runs
            self._remote = FrozenPages(pids, runs)
        return self._remote

    async def commit(self) -> None:
        """Kill the frozen original, once its owner lets it go."""
        await self._owner.before_commit()
        for one in self._frozen:
            await one.kill()
        await self._owner.after_commit(self._frozen)

    async def replaced(self) -> bool:
        """Whether nothing of the workload may run here any more."""
        return await self._owner.replaced()

    async def abandon(self) -> None:
        """Kill the frozen original, which nobody else runs in the place of."""
        for one in self._frozen:
            await one.kill()
        await self._owner.after_commit(self._frozen)

    async def runs(self) -> bool:
        """Whether every container is there and has not ended."""
        return all([await one.runs() for one in self._frozen])

    def executing(self) -> bool:
        """Whether anything of the workload is not frozen."""
        return any(one.executing() for one in self._frozen)

    async def close(self) -> None:
        """Let go of descriptors."""
        if self._remote is not None:
            self._remote.close()
        for one in self._frozen:
            await one.close()


class SourceWorkload(FrozenWorkload):
    """A running workload. `volumes` are its file systems beside the containers' upper layers, in the offer's order."""

    def __init__(
        self,
        containers: Sequence[SourceContainer],
        owner: Owner,
        volumes: Sequence[SourceTree] = (),
        *,
        connections: Connections = Connections.CLOSE,
        keeping: KeptConnections | None = None,
    ) -> None:
        """`keeping` knows which connections to others go on, where that is asked for."""
        super().__init__(containers, owner)
        self._keeping, self._kept = keeping, tuple[Translation, ...]()
        self._containers, self._connections = containers, connections
        self._trees = [*(one.tree for one in containers), *volumes]
        self._closed: tuple[str, ...] = ()

    # Memory.

    async def scan_dirty(self) -> DirtySet:
        """What was written or dropped since the previous scan; everything at the first."""
        return union(await gathered(*(one.scan_dirty for one in self._containers)))

    async def final_scan(self) -> DirtySet:
        """The last one: the workload is frozen, and the trackers leave it."""
        return union(await gathered(*(one.final_scan for one in self._containers)))

    def read(self, dirty: DirtySet, round: int) -> Iterator[Pages | Drop]:
        """Read what `change` lists, one container after another."""
        return chain.from_iterable(one.memory.read(dirty, round) for one in self._containers)

    async def changed_shared(self, round: int) -> AsyncGenerator[Pages | Drop, None]:
        """One pass over the shared memory of one container after another."""
        for one in self._containers:
            async with aclosing(one.shared.changed(round)) as frames:
                async for frame in frames:
                    yield frame

    def held_pages(self, directory: int) -> HeldPages:
        """What the target holds of the shared memory of the container whose images are in `directory`."""
        return self._containers[container_of_directory(directory)].shared.held

    def leave_remote(self, dirty: DirtySet) -> Iterator[Drop]:
        """Post-copy: leave what `change` lists for later."""
        return chain.from_iterable(one.memory.leave(dirty) for one in self._containers)

    def memory_totals(self) -> tuple[AddressSpaceSum, ...]:
        """The number of pages of each address space that the target must hold by now."""
        return tuple(chain.from_iterable(one.memory.totals() for one in self._containers))

    # Files.

    async def trees(self, *, last: bool) -> AsyncIterator[tuple[int, bytes]]:
        """One pass over the upper layers and the volumes. The last comes after whatever CRIU puts there."""
        if last:
            await gathered(*(one.names_settled for one in self._containers))
        for number, tree in enumerate(self._trees):
            async for record in tree.changes(last=last):
                yield number, record

    def tree_totals(self) -> tuple[TreeSum, ...]:
        """The totals of the last finished pass over each tree."""
        return tuple(tree.total(number) for number, tree in enumerate(self._trees))

    async def logs(self, *, last: bool) -> AsyncIterator[tuple[int, int, bytes]]:
        """What the containers have printed since the last pass."""
        for one in self._containers:
            async for piece in one.logs(last=last):
                yield piece

    # The freeze.

    async def stand_by(self) -> None:
        """Begin what the dumps need while the containers still run."""
        if self._keeping is not None:
            await self._keeping.ask()
        await gathered(*(one.stand_by for one in self._containers))
        await self._owner.stand_by([one.cgroup for one in self._containers])

    async def lock_exec(self) -> None:
        """What `exec` started in the containers ends, and nobody comes in any more."""
        await gathered(*(one.lock_exec for one in self._containers))

    async def freeze(self) -> None:
        """Stop every task of every container, at a moment at which no connection within the workload waits to be accepted, or was
        closed with data left, and nothing in a terminal of its own waits to be read: CRIU leaves all of it out. The ends of a
        connection may be in two containers, so none stays frozen while it is waited for. Raises `ConnectionsLost` where all
        connections must live on and one would not."""
        await self._owner.before_freeze()
        waited = 0.0
        pauses, moments = iter(ACCEPT_PAUSES), iter(BRIEF)
        while True:
            await gathered(*(one.freeze for one in self._containers))
            if not (waiting := await self._unaccepted()):
                if (lost := await self._lost()) is None:
                    return await self._choose_kept()
                await gathered(*(one.thaw_again for one in self._containers))
                if (moment := next(moments, None)) is None:
                    raise lost
                await anyio.sleep(moment)
                continue
            await gathered(*(one.thaw_again for one in self._containers))
            if (longest := next(pauses, None)) is None:
                break
            pause = random.uniform(0.1, 1.0) * longest
            await anyio.sleep(pause)
            waited += pause
        raise Failed(
            "the job cannot be dumped: whenever it is frozen, a connection waits to be accepted, or something to be read",
            why=f"{', '.join(waiting[:4])}; it was frozen {len(ACCEPT_PAUSES) + 1} times, and ran for {waited:.1f} s between them",
            remedy="migrate when the job accepts and reads its connections and terminals, or have it close what it leaves waiting",
        )

    async def _unaccepted(self) -> tuple[str, ...]:
        members = [pid for one in self._containers for pid in one.members()]
        found = await gathered(*(partial(one.unaccepted, members) for one in self._containers))
        return tuple(sorted(set(chain.from_iterable(found))))

    async def _lost(self) -> ConnectionsLost | None:
        """Why the frozen workload may not move with the connections that it has now: others than at the check, maybe."""
        if self._connections is not Connections.REQUIRE:
            return None
        members = [pid for one in self._containers for pid in one.members()]
        found = await self._containers[0].connections(members)  # containers of a pod share their network namespace
        return refused("the job", found, self._connections)

    async def _choose_kept(self) -> None:
        """Say which connections to others go on, of those that the frozen workload has."""
        if self._keeping is not None:
            members = [pid for one in self._containers for pid in one.members()]
            sockets = await self._containers[0].sockets(members)
            self._kept = await at_once(self._keeping.of, sockets)
            for one in self._containers:
                one.kept = frozenset(kept.ends for kept in self._kept)

    async def dump(self) -> Images:
        """CRIU dumps the containers side by side, and then holds them. Raises `ConnectionsLost` where all connections must live on
        and its images have one that cannot."""
        dumps = await gathered(*(one.dump for one in self._containers))
        images = {name: data for images in dumps for name, data in images.items()}
        settled = settle(images, {one.ends for one in self._kept})
        self._closed = settled.closed
        if self._connections is Connections.REQUIRE and (lost := refusal("the job", settled.closed)) is not None:
            raise lost
        whole = dict(settled.images)
        if self._kept:
            whole[directory_of(0, IMAGES), KEPT] = encode(self._kept)
        return await self._owner.completed(whole)

    def closed_connections(self) -> tuple[str, ...]:
        """Those to others than the workload itself, which `dump` has closed in the images."""
        return self._closed

    def dumped(self) -> Dump:
        """What none of the dumps had to do."""
        return min((one.dumped for one in self._containers), key=list(Dump).index)

    async def throttle(self, quota: float) -> None:
        """Leave each container this share of the processor time; none is slowed down where one of them cannot be."""
        for one in self._containers:
            await one.demand_quota()
        for one in self._containers:
            await one.throttle(quota)

    async def ended(self) -> str:
        """Return, with how, once one of the containers has ended by itself."""
        hows: list[str] = []

        async def watch(number: int, one: SourceContainer) -> None:
            how = await one.ended()
            hows.append(f"container {number}: {how}" if len(self._containers) > 1 else how)
            watches.cancel_scope.cancel()

        async with anyio.create_task_group() as watches:
            for number, one in enumerate(self._containers):
                watches.start_soon(watch, number, one)
        return hows[0]

    async def close(self) -> None:
        """Let go of descriptors."""
        await super().close()
        for tree in self._trees:
            await tree.close()


def union(changes: Sequence[DirtySet]) -> DirtySet:
    """What was found in each container, as one. No space is of two containers."""
    written = {address_space: runs for one in changes for address_space, runs in one.written.items()}
    return DirtySet(written, {address_space: runs for one in changes for address_space, runs in one.dropped.items()})
