"""A workload on its way onto this node: its containers side by side, and its volumes.

A container alone is a workload of one. Who makes the containers, containerd by our call or the kubelet, is asked of a `Maker`. It
may make them one after another, of which only the first waits in podferry-runc until GO, as the kubelet does: so the target is
ready when that one and the volumes are there; the others are restored as they come, right after the first. Of a pod that keeps its
name none is made before GO. If one of them cannot be, none stays: those that ran are killed before the source hears that the
workload will never run here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from podferry.core.undo import Handler
from podferry.engine.journal import Journal
from podferry.engine.ports import JobDied, Json, PageChannel, is_log
from podferry.errors import Failed, PeerMisbehaved, PodferryError
from podferry.node.cri import SharedMountKind, Volume
from podferry.node.records import Container
from podferry.node.staging import Staged, discard_all
from podferry.node.upper import Receiver
from podferry.wire.frames import File
from podferry.wire.messages import StateEnd
from podferry.workload.account import Promise
from podferry.workload.config import Config
from podferry.workload.helpers import answered, gathered
from podferry.workload.numbers import container_of_address_space, container_of_directory, demand_known, demand_whole
from podferry.workload.page_channel import DaemonPageChannel
from podferry.workload.target_container import TargetContainer
from podferry.workload.target_undo import handlers as handlers_of_containers
from podferry.workload.threads import at_once, run

MADE_TIMEOUT = 100.0
"""Seconds from the order to the first container waiting: the kubelet's own patience with a container is 120."""


class Maker:
    """Who makes the workload's containers. Beside making it there is nothing to do for a container alone, as this says."""

    kept_from_the_resume = False
    """Whether the workload stays as soon as it runs, though this node's store still has pages to put in their places."""

    async def begin(self, containers: Sequence[TargetContainer]) -> None:
        """Have whoever makes the containers begin. May be called again."""

    def places(self, first: Container) -> Mapping[Volume, Path]:
        """Where the workload's volumes are here, once its first container is made."""
        return {}

    @property
    def makes_after_go(self) -> bool:
        """Whether none of the containers can be made before the right to run is here."""
        return False

    async def arrive(self, containers: Sequence[TargetContainer]) -> None:
        """The right to run is here: have whoever makes the containers begin, where that had to wait for it."""

    async def connect(self, containers: Sequence[TargetContainer]) -> None:
        """All has arrived: have the other ends of connections that go on know where the workload is going to be."""

    async def before_release(self, containers: Sequence[TargetContainer]) -> None:
        """Hold what the containers share until the last of them is restored."""

    async def after_release(self) -> None:
        """All are restored: let go of it."""

    def entrust(self) -> None:
        """The workload stays, whatever becomes of the migration."""


class TargetVolume:
    """A file system of the workload's own: staged until its place is there."""

    def __init__(self, volume: Volume, staged: Staged) -> None:
        self.volume, self._staged = volume, staged

    @property
    def receiver(self) -> Receiver:
        """What fills it."""
        return self._staged.receiver

    def move_in(self, place: Path) -> None:
        """The place is there: it takes in what was staged, and what comes later."""
        self._staged.move_to(place)


class TargetWorkload:
    """The workload of `containers` and `volumes`."""

    def __init__(
        self,
        config: Config,
        journal: Journal,
        containers: Sequence[TargetContainer],
        maker: Maker,
        volumes: Sequence[Volume] = (),
        promise: Promise | None = None,
    ) -> None:
        """`promise` is what this node has promised of memory and disk."""
        self._promise = promise
        self._config, self._journal, self._containers, self._maker = config, journal, containers, maker
        self._wanted = volumes
        self._volumes: list[TargetVolume] = []
        self._in_place = False

    async def prepare(self) -> None:
        """Places for pages, images and files."""
        for one in self._containers:
            await one.prepare()
        if self._wanted:
            await run(self._stage_volumes)

    def _stage_volumes(self) -> None:
        name = self._journal.directory.name
        on_disk, in_memory = self._config.staging / f"{name}.volumes", self._config.run / "staging" / name
        self._journal.acquire("staged-volumes", directories=[str(on_disk), str(in_memory)])
        for number, volume in enumerate(self._wanted):
            root, below = (
                (on_disk, self._config.state) if volume.kind is SharedMountKind.DISK else (in_memory, self._config.run)
            )
            self._volumes.append(TargetVolume(volume, Staged(root / str(number), below=below)))

    async def make_ready(self, *, postcopy: bool) -> None:
        """Start the lazy-pages daemons, and have the first container made, up to waiting for its state, unless that has to wait for
        GO."""
        await self._maker.begin(self._containers)
        await gathered(*(partial(one.start_lazypages, postcopy=postcopy) for one in self._containers))
        if not self._maker.makes_after_go:
            await self._make_first()

    @property
    def makes_after_go(self) -> bool:
        """Whether `make_late` has something to do."""
        return self._maker.makes_after_go

    async def make_late(self) -> None:
        """The right to run is here: have the first container made, where that had to wait for it."""
        if self._maker.makes_after_go:
            await self._maker.arrive(self._containers)
            await self._make_first()

    async def _make_first(self) -> None:
        first = await self._containers[0].make(MADE_TIMEOUT)
        if self._volumes and not self._in_place:
            await run(self._move_volumes_in, first)
            self._in_place = True

    async def lost(self) -> PodferryError:
        """Return, with the reason, once the first container waits no more: it was deleted, or whoever makes it lost patience."""
        if self._maker.makes_after_go:
            await anyio.sleep_forever()
        return await self._containers[0].lost()

    def _move_volumes_in(self, first: Container) -> None:
        places = self._maker.places(first)
        for one in self._volumes:
            if one.volume not in places:
                raise Failed(
                    f"the pod on {self._config.node} has no volume {one.volume.name} of kind {one.volume.kind}",
                    why=f"it has {', '.join(f'{volume.name} ({volume.kind})' for volume in places)}",
                )
            one.move_in(places[one.volume])

    # What arrives.

    def pages(self, round: int, address_space: int, address: int, data: memoryview) -> None:
        """Put arrived pages into the store."""
        number, pid = container_of_address_space(address_space)
        self._container(number).pages(round, pid, address, data)

    def drop(self, address_space: int, start: int, end: int) -> None:
        """Pages that are zero or gone."""
        number, pid = container_of_address_space(address_space)
        self._container(number).drop(pid, start, end)

    def tree(self, number: int, record: memoryview) -> None:
        """A record of an upper layer or a volume."""
        if self._promise is not None:
            self._promise.take(disk=len(record))
        if number < len(self._containers):
            return self._containers[number].tree(record)
        if number - len(self._containers) >= len(self._volumes):
            raise PeerMisbehaved(f"a record of tree {number}, which the workload does not have")
        return self._volumes[number - len(self._containers)].receiver.feed(record)

    def log(self, directory: int, offset: int, data: memoryview) -> None:
        """A piece of what a container printed."""
        self._container(container_of_directory(directory)).log(offset, data)

    def image(self, directory: int, name: str, offset: int, data: memoryview, *, last: bool) -> None:
        """A piece of one of CRIU's images."""
        self._container(container_of_directory(directory)).image(name, offset, data, last=last)

    def image_of_pages(self, piece: File) -> None:
        """A piece of one of CRIU's images, of pages of which some are here already."""
        if is_log(piece.directory):
            raise PeerMisbehaved("memory is no output of a container")
        self._container(container_of_directory(piece.directory)).image_of_pages(piece)

    def _container(self, number: int) -> TargetContainer:
        if number >= len(self._containers):
            raise PeerMisbehaved(f"something for container {number}, which the workload does not have")
        return self._containers[number]

    async def verify(self, end: StateEnd) -> None:
        """Everything is here and whole, or an error says what is not."""
        demand_known(end, len(self._containers), len(self._containers) + len(self._volumes))
        if self._journal.facts.get("rehearsal"):
            for one in self._containers:
                await one.judge(end)
            return
        for one in self._containers:
            await one.verify(end)
        for number, volume in enumerate(self._volumes, len(self._containers)):
            demand_whole(volume.receiver, number, end, f"the volume {volume.volume.name}")
        await self._maker.connect(self._containers)

    # Post-copy.

    def open_page_channel(self) -> DaemonPageChannel:
        """Connect to the lazy-pages daemons."""
        return DaemonPageChannel([one.daemon_socket() for one in self._containers])

    def remote_pages_complete(self, channel: PageChannel) -> None:
        """What is absent now is zero."""
        for one in self._containers:
            one.remote_pages_complete(channel)

    # The resume.

    def differences(self) -> tuple[str, ...]:
        """After `release`: what a container has not here as it had it on the source."""
        if len(self._containers) == 1:
            return self._containers[0].differences()
        return tuple(f"{one.maker.name}: {what}" for one in self._containers for what in one.differences())

    async def release(self) -> float:
        """Have one container after another restored. All run when this returns; returns since when the last does."""
        since: list[float] = []
        await self._maker.before_release(self._containers)
        for one in self._containers:
            try:
                since.append(await one.release())
            except PodferryError as error:
                if any([await answered(before.maker.has_ended) for before in self._containers[: len(since)]]):
                    what = "a container has run here to its end, and another cannot be restored"
                    raise JobDied.because(what, error) from error
                raise
        await self._maker.after_release()
        for one in self._containers:
            await at_once(one.maker.mark_arrived)
        return max(since)

    async def resumed(self) -> float:
        """Since when all run, for an agent that was restarted. Raises where one is gone."""
        since = max([await one.resumed() for one in self._containers])
        await self._maker.after_release()
        return since

    async def is_here(self) -> bool:
        """Whether the workload runs here, or has."""
        return any([await one.maker.is_here() for one in self._containers])

    async def filled(self) -> Json:
        """Return, with figures, once every page is in its place.

        In post-copy the workload is kept only when it has all its memory: before that one container's death is all of it's, since
        the source may be told to go on.
        """
        kept = self._maker.kept_from_the_resume and not self._journal.facts.get("postcopy")
        if kept:
            self._entrust()
            figures = await gathered(*(partial(_filled_or_crashed, one) for one in self._containers))
        else:
            figures = await gathered(*(one.filled for one in self._containers))
            self._entrust()
        return {**figures[0], "containers": figures} if len(figures) > 1 else figures[0]

    def _entrust(self) -> None:
        self._maker.entrust()
        for one in self._containers:
            one.entrust()

    async def close(self) -> None:
        """Let go of descriptors."""
        for one in self._containers:
            await one.close()
        for volume in self._volumes:
            volume.receiver.close()
        self._volumes.clear()


async def _filled_or_crashed(container: TargetContainer) -> Json:
    """A container that cannot have its memory has crashed."""
    try:
        return await container.filled()
    except PodferryError as error:
        await container.maker.crash()
        return {"failed": str(error)}


def handlers(config: Config) -> dict[str, Handler]:
    """How what a workload holds on the target, whoever makes its containers, is taken back."""

    async def unstage(facts: Mapping[str, Any]) -> None:
        for directory in facts["directories"]:
            await run(discard_all, Path(directory))

    return {**handlers_of_containers(config), "staged-volumes": unstage}
