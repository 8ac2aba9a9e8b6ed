"""A running pod on its way out of this node: its containers freeze together, are dumped side by side, and end together.

It fulfils the ports as one container does: the story does not know the difference. The kubelet's things are left to the kubelet: of
the original only the processes are killed here; records, snapshots and the sandbox go when the pod's object goes.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import anyio

from podferry.core.undo import Handler
from podferry.criu.checkpoint import Process
from podferry.criu.images import without_deleted_sources
from podferry.engine.journal import Journal
from podferry.engine.ports import IMAGES, Change, Debt
from podferry.errors import Failed
from podferry.fs.private import private_directory
from podferry.model import Dump
from podferry.node import outside
from podferry.node.payloads import OPEN_FILES
from podferry.node.process import spawn
from podferry.node.upper import Plan
from podferry.node.upper import Source as TreeSource
from podferry.wire.frames import Drop, Pages
from podferry.wire.messages import SpaceSum, TreeSum
from podferry.workload.helpers import gathered, helper_environment, kill_helper, python
from podferry.workload.leaving import Leaving, Remains, tree_total
from podferry.workload.pod.offered import PAYLOADS
from podferry.workload.pod.parts import container_of_space, directory_of, joined, numbered, space_of, split
from podferry.workload.pod.probes import Probe
from podferry.workload.threads import Looks, run

STAND_IN = "stand-in"
"""The process that answers probes (`podferry.workload.answering`), in the ledger."""
_MOUNTS = re.compile(r"mountpoints-\d+\.img")

HandOver = Callable[[], Awaitable[None]]
"""Returns when the owner counts the target pod, and the source pod is deleted."""


class OwedByPod:
    """Post-copy: what the target has not got of each container."""

    def __init__(self, parts: Sequence[Debt]) -> None:
        self._parts = parts

    @property
    def bytes(self) -> int:
        """How much is still to be pushed."""
        return sum(part.bytes for part in self._parts)

    def wanted(self, space: int, address: int) -> Iterator[Pages | Drop]:
        """The frames that answer for the page at `address` of `space`."""
        number, pid = container_of_space(space)
        if number >= len(self._parts):
            yield Drop(space, ((address, address + 4096),))
            return
        yield from numbered(number, self._parts[number].wanted(pid, address))

    def rest(self) -> Iterator[Pages | Drop]:
        """All that is still owed."""
        for number, part in enumerate(self._parts):
            yield from numbered(number, part.rest())

    def start_over(self) -> None:
        """All of it is owed again."""
        for part in self._parts:
            part.start_over()

    def close(self) -> None:
        """Let go of the processes."""
        for part in self._parts:
            part.close()


class HeldPod:
    """The frozen original, its containers by their number."""

    def __init__(self, journal: Journal, parts: Sequence[Leaving | Remains], hand_over: HandOver) -> None:
        self._journal, self._parts, self._hand_over = journal, parts, hand_over

    def owed(self) -> OwedByPod:
        """Post-copy: the memory that the target has not got."""
        return OwedByPod([part.owed() for part in self._parts])

    async def commit(self) -> None:
        """Have the owner count the target pod; only then kill the frozen original, and leave what remains to the kubelet.

        The mark that nothing of the pod starts here again stays until the pod is gone.
        """
        await self._hand_over()
        self._journal.release("departed")
        for part in self._parts:
            await part.kill()
        if (facts := self._journal.held(STAND_IN)) is not None:
            await run(kill_helper, facts)
            self._journal.release(STAND_IN)

    async def runs(self) -> bool:
        """Whether every container is there and has not ended."""
        return all([await part.runs() for part in self._parts])

    def executing(self) -> bool:
        """Whether anything of the pod is not frozen."""
        return any(part.executing() for part in self._parts)

    async def close(self) -> None:
        """Let go of descriptors."""
        for part in self._parts:
            await part.close()


class LeavingPod(HeldPod):
    """A running pod. `volumes` are its file systems, in the offer's order, and where each container has them; `payloads` packs what
    the kubelet has written for it and these images say is open; `departed` is the mark that nothing of it starts here."""

    _parts: Sequence[Leaving]

    def __init__(
        self,
        journal: Journal,
        parts: Sequence[Leaving],
        hand_over: HandOver,
        *,
        volumes: Sequence[tuple[Path, Mapping[int, Sequence[str]]]],
        payloads: Callable[[Sequence[bytes]], bytes],
        departed: Path,
        probes: Sequence[Probe] = (),
    ) -> None:
        super().__init__(journal, parts, hand_over)
        self._probes = probes
        self._payloads = payloads
        self._volumes = [(TreeSource(path), mounted) for path, mounted in volumes]
        self._departed = departed
        self._looks = Looks()

    # Memory.

    async def look(self) -> Change:
        """What was written or dropped since the last look; everything at the first."""
        return joined(await gathered(*(part.look for part in self._parts)))

    async def last_look(self) -> Change:
        """The last one: the pod is frozen, and the trackers leave it."""
        return joined(await gathered(*(part.last_look for part in self._parts)))

    def read(self, change: Change, round: int) -> Iterator[Pages | Drop]:
        """Read what `change` lists, one container after another."""
        changes = enumerate(split(change, len(self._parts)))
        return chain.from_iterable(numbered(number, self._parts[number].read(one, round)) for number, one in changes)

    def owe(self, change: Change) -> Iterator[Drop]:
        """Post-copy: leave what `change` lists for later."""
        for number, one in enumerate(split(change, len(self._parts))):
            for frame in numbered(number, self._parts[number].owe(one)):
                assert isinstance(frame, Drop)
                yield frame

    def memory_totals(self) -> tuple[SpaceSum, ...]:
        """How many pages of each space the target must hold by now."""
        return tuple(
            SpaceSum(space_of(number, one.space), one.pages)
            for number, part in enumerate(self._parts)
            for one in part.memory_totals()
        )

    # Files.

    async def trees(self, *, last: bool) -> AsyncIterator[tuple[int, bytes]]:
        """One pass over the upper layers and the volumes."""
        for number, part in enumerate(self._parts):
            async for _, record in part.trees(last=last):
                yield number, record
        for number, (tree, mounted) in enumerate(self._volumes, len(self._parts)):
            plan = await self._looks.at_once(partial(self._plan, tree, mounted, last))
            for chunk in tree.send(plan):
                yield number, chunk

    def _plan(self, tree: TreeSource, mounted: Mapping[int, Sequence[str]], last: bool) -> Plan:
        places = ((self._parts[part], at) for part, ats in mounted.items() for at in ats)
        suspects = {path for part, at in places for path in part.mapped_shared(at)}
        return tree.plan(suspects=suspects, frozen=last)

    def tree_totals(self) -> tuple[TreeSum, ...]:
        """What the last finished pass over each tree sent."""
        uppers = (
            TreeSum(number, one.entries, one.bytes, one.digest)
            for number, part in enumerate(self._parts)
            for one in part.tree_totals()
        )
        volumes = (tree_total(number, tree) for number, (tree, _) in enumerate(self._volumes, len(self._parts)))
        return (*uppers, *volumes)

    async def logs(self, *, last: bool) -> AsyncIterator[tuple[int, int, bytes]]:
        """What the containers have printed since the last pass."""
        for number, part in enumerate(self._parts):
            async for directory, offset, data in part.logs(last=last):
                yield directory_of(number, directory), offset, data

    # The freeze.

    async def stand_by(self) -> None:
        """Begin what the dumps need while the containers still run, and what answers probes when they do not."""
        await gathered(*(part.stand_by for part in self._parts))
        if self._probes:
            await run(self._start_stand_in)

    def _start_stand_in(self) -> None:
        what = {
            "cgroups": [part.cgroup.to_dict() for part in self._parts],
            "probes": [asdict(one) for one in self._probes],
        }
        argv = outside.surviving([*python("podferry.workload.answering"), json.dumps(what)])
        process = Process.of(spawn(argv, env=helper_environment()).pid)
        if process is None:
            raise Failed("what answers the pod's liveness probes while it stands still died at once")
        self._journal.acquire(STAND_IN, **asdict(process))

    async def shut_the_door(self) -> None:
        """What `exec` started in the containers ends, and nobody comes in any more."""
        await gathered(*(part.shut_the_door for part in self._parts))

    async def freeze(self) -> None:
        """Stop every task of every container. From here on nothing of the pod starts on this node, unless it is undone."""
        self._journal.acquire("departed", path=str(self._departed))
        private_directory(self._departed.parent, below=self._departed.parents[1])
        self._departed.touch()
        await gathered(*(part.freeze for part in self._parts))

    async def dump(self) -> Mapping[tuple[int, str], bytes]:
        """CRIU dumps the containers side by side, and then holds them."""
        dumps = await gathered(*(part.dump for part in self._parts))
        images = {
            (directory_of(number, directory), name): without_deleted_sources(data) if _MOUNTS.fullmatch(name) else data
            for number, of_part in enumerate(dumps)
            for (directory, name), data in of_part.items()
        }
        open_files = [data for (_, name), data in images.items() if name == OPEN_FILES]
        if payloads := await self._looks.at_once(partial(self._payloads, open_files)):
            images[directory_of(0, IMAGES), PAYLOADS] = payloads
        return images

    def dumped(self) -> Dump:
        """What the dumps were spared, all of them."""
        return min((part.dumped() for part in self._parts), key=list(Dump).index)

    async def slow_down(self, quota: float) -> None:
        """Leave each container this share of the processor time; none is slowed down where one of them cannot be."""
        for part in self._parts:
            await part.demand_quota()
        for part in self._parts:
            await part.slow_down(quota)

    async def ended(self) -> str:
        """Return, with how, once one of the containers has ended by itself."""
        hows: list[str] = []

        async def watch(number: int) -> None:
            hows.append(f"container {number}: {await self._parts[number].ended()}")
            watches.cancel_scope.cancel()

        async with anyio.create_task_group() as watches:
            for number in range(len(self._parts)):
                watches.start_soon(watch, number)
        return hows[0]

    async def close(self) -> None:
        """Let go of descriptors."""
        await self._looks.ended()
        await super().close()
        for tree, _ in self._volumes:
            tree.close()


def handlers() -> dict[str, Handler]:
    """How what only a pod holds is taken back."""

    async def come_back(facts: Mapping[str, Any]) -> None:
        Path(facts["path"]).unlink(missing_ok=True)

    return {"departed": come_back, STAND_IN: lambda facts: run(kill_helper, facts)}
