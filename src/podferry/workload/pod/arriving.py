"""A pod on its way onto this node: its containers side by side, its volumes, and the object that the controller makes for it.

It fulfils the ports as one container does. What is peculiar: the kubelet starts the containers of a pod one after another, and the
first waits in podferry-runc until GO. So the pod is poised when its sandbox, its volumes and its first container are there; the
others are restored as the kubelet comes to them, right after the first. If one of them cannot be, none stays: those that ran are
killed before the source hears that the pod will never run here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from podferry.core.undo import Handler
from podferry.engine.journal import Journal
from podferry.engine.ports import JobDied, Json, PageChannel
from podferry.errors import Failed, PeerMisbehaved, PodferryError
from podferry.node import cri
from podferry.node.containerd import Containerd
from podferry.node.cri import Kind, Volume
from podferry.node.netlock import Namespace
from podferry.node.records import Container
from podferry.node.staging import Staged, discard_all
from podferry.node.upper import Receiver
from podferry.wire.messages import StateEnd
from podferry.workload.config import Config
from podferry.workload.feeder_channel import FeederChannel
from podferry.workload.helpers import gathered
from podferry.workload.numbers import container_of_directory, container_of_space, demand_known, end_of
from podferry.workload.pod import arriving_part
from podferry.workload.pod.arriving_part import ArrivingPart
from podferry.workload.pod.offered import OfferedPod
from podferry.workload.pod.ports import Cluster
from podferry.workload.threads import at_once, run

MADE_TIMEOUT = 100.0
"""Seconds from the pod's object to its first container waiting: the kubelet's own patience with a container is 120."""


class ArrivingVolume:
    """A file system of the pod's own: staged until the kubelet has made its place."""

    def __init__(self, volume: Volume, staged: Staged) -> None:
        self.volume, self._staged = volume, staged

    @property
    def receiver(self) -> Receiver:
        """What fills it."""
        return self._staged.receiver

    def move_in(self, place: Path) -> None:
        """The place is there: it takes in what was staged, and what comes later."""
        self._staged.move_to(place)


class ArrivingPod:
    """The pod `offered`, of the containers `parts`. What is made is the kubelet's; what is kept meanwhile is in the ledger."""

    def __init__(
        self, config: Config, journal: Journal, offered: OfferedPod, parts: Sequence[ArrivingPart], cluster: Cluster
    ) -> None:
        self._config, self._journal, self._offered, self._parts, self._cluster = (
            config,
            journal,
            offered,
            parts,
            cluster,
        )
        self._volumes: list[ArrivingVolume] = []
        self._in_place = False

    async def prepare(self) -> None:
        """Places for pages, images and files. Nothing of the pod is there yet."""
        for part in self._parts:
            await part.prepare()
        await run(self._stage_volumes)

    def _stage_volumes(self) -> None:
        name = self._journal.directory.name
        on_disk, in_memory = self._config.staging / f"{name}.volumes", self._config.run / "staging" / name
        self._journal.acquire("staged-volumes", directories=[str(on_disk), str(in_memory)])
        for number, volume in enumerate(self._offered.volumes):
            root, below = (on_disk, self._config.state) if volume.kind is Kind.DISK else (in_memory, self._config.run)
            self._volumes.append(ArrivingVolume(volume, Staged(root / str(number), below=below)))

    async def poise(self, *, postcopy: bool) -> None:
        """Have the controller make the pod, and wait until the kubelet has come to its first container."""
        if "target_pod" not in self._journal.facts:
            self._journal.acquire("target-pod", id=self._journal.directory.name)
            pod = await self._cluster.target_pod(self._journal.directory.name)
            cri.demand_uid(pod.uid)
            self._journal.note(target_pod=pod.uid)
            for part in self._parts:
                await run(part.expect, pod.uid)
        await gathered(*(partial(part.poise, postcopy=postcopy) for part in self._parts))
        first = await self._parts[0].made(MADE_TIMEOUT)
        if not self._in_place:
            await run(self._move_volumes_in, first)
            self._in_place = True

    async def lost(self) -> PodferryError:
        """Return, with the reason, once the first container waits no more: its pod was deleted, or the kubelet lost patience."""
        return await self._parts[0].lost()

    def _move_volumes_in(self, first: Container) -> None:
        uid = self._journal.facts["target_pod"]
        places = dict(cri.volumes([first.spec_json()], uid, self._config.kubelet))
        for one in self._volumes:
            if one.volume not in places:
                raise Failed(
                    f"the pod on {self._config.node} has no volume {one.volume.name} of kind {one.volume.kind}",
                    why=f"it has {', '.join(f'{volume.name} ({volume.kind})' for volume in places)}",
                )
            one.move_in(places[one.volume])

    # What arrives.

    def pages(self, round: int, space: int, address: int, data: memoryview) -> None:
        """Put arrived pages into the store."""
        number, pid = container_of_space(space)
        self._part(number).pages(round, pid, address, data)

    def drop(self, space: int, start: int, end: int) -> None:
        """Pages that are zero or gone."""
        number, pid = container_of_space(space)
        self._part(number).drop(pid, start, end)

    def tree(self, number: int, record: memoryview) -> None:
        """A record of an upper layer or a volume."""
        if number < len(self._parts):
            return self._parts[number].tree(0, record)
        if number - len(self._parts) >= len(self._volumes):
            raise PeerMisbehaved(f"a record of tree {number}, which the pod has not")
        return self._volumes[number - len(self._parts)].receiver.feed(record)

    def log(self, directory: int, offset: int, data: memoryview) -> None:
        """A piece of what a container printed."""
        number, own = container_of_directory(directory)
        self._part(number).log(own, offset, data)

    def image(self, directory: int, name: str, offset: int, data: memoryview, *, last: bool) -> None:
        """A piece of one of CRIU's images."""
        number, own = container_of_directory(directory)
        self._part(number).image(own, name, offset, data, last=last)

    def _part(self, number: int) -> ArrivingPart:
        if number >= len(self._parts):
            raise PeerMisbehaved(f"something for container {number}, which the pod has not")
        return self._parts[number]

    async def verify(self, end: StateEnd) -> None:
        """Everything is here and whole, or an error says what is not."""
        demand_known(end, len(self._parts), len(self._parts) + len(self._volumes))
        for number, part in enumerate(self._parts):
            await part.verify(end_of(number, end))
        sums = {one.tree: one for one in end.trees}
        for number, one in enumerate(self._volumes, len(self._parts)):
            came, sent = one.receiver.finish(), sums.get(number)
            if sent is None or (came.entries, came.bytes, came.digest) != (sent.entries, sent.bytes, sent.digest):
                raise Failed(f"the volume {one.volume.name} did not arrive whole", why=f"{came} is not {sent}")

    # Post-copy.

    def relay(self) -> FeederChannel:
        """Connect to the page feeders."""
        return FeederChannel([part.feeder_socket() for part in self._parts])

    def all_owed_came(self, channel: PageChannel) -> None:
        """What is absent now is zero."""
        for part in self._parts:
            part.all_owed_came(channel)

    # The resume.

    def differences(self) -> tuple[str, ...]:
        """What a container has not here as it had it on the source."""
        return tuple(f"{part.name}: {one}" for part in self._parts for one in part.differences())

    async def release(self) -> float:
        """Have one container after another restored. All run when this returns; returns since when the last does."""
        since: list[float] = []
        await at_once(self._hold_loopback)
        for part in self._parts:
            try:
                since.append(await part.release())
            except PodferryError as error:
                if any([await one.has_ended() for one in self._parts[: len(since)]]):
                    what = "a container has run here to its end, and another cannot be restored"
                    raise JobDied.because(what, error) from error
                raise
        await at_once(self._let_loopback_go)
        for part in self._parts:
            await at_once(part.mark_arrived)
        return max(since)

    def _hold_loopback(self) -> None:
        """Nothing passes over loopback until the last container is restored, whose sockets would be missed."""
        if self._journal.held("network-lock") is not None or not any(part.has_connections() for part in self._parts):
            return
        if (namespace := self._parts[0].network()) is not None:
            self._journal.acquire("network-lock", **asdict(namespace))
            namespace.lock()

    def _let_loopback_go(self) -> None:
        if (facts := self._journal.held("network-lock")) is not None:
            Namespace(**facts).unlock()
            self._journal.release("network-lock")

    async def resumed(self) -> float:
        """Since when all run, for an agent that was restarted. Raises where one is gone."""
        since = max([await part.resumed() for part in self._parts])
        await at_once(self._let_loopback_go)
        return since

    async def is_here(self) -> bool:
        """Whether the pod runs here, or has."""
        return any([await part.is_here() for part in self._parts])

    async def filled(self) -> Json:
        """Return, with figures, once every page is in its place.

        From the resume on the pod is the kubelet's, as any other. In post-copy it is only when it has all its memory: before that,
        one container's death is the whole pod's, since the source may be told to go on.
        """
        postcopy = bool(self._journal.facts.get("postcopy"))
        if postcopy:
            figures = await gathered(*(part.filled for part in self._parts))
        self._journal.release("target-pod")
        for part in self._parts:
            part.entrust()
        if not postcopy:
            figures = await gathered(*(partial(_filled_or_crashed, part) for part in self._parts))
        return {**figures[0], "containers": figures} if len(figures) > 1 else figures[0]

    async def close(self) -> None:
        """Let go of descriptors."""
        for part in self._parts:
            await part.close()
        for volume in self._volumes:
            volume.receiver.close()
        self._volumes.clear()


async def _filled_or_crashed(part: ArrivingPart) -> Json:
    """A container that cannot have its memory has crashed: what becomes of it then is the kubelet's business."""
    try:
        return await part.filled()
    except PodferryError as error:
        await part.crash()
        return {"failed": str(error)}


def handlers(containerd: Containerd, cluster: Cluster) -> dict[str, Handler]:
    """How what only a pod holds is taken back."""

    async def give_back(facts: Mapping[str, Any]) -> None:
        await cluster.give_back(facts["id"])

    async def unstage(facts: Mapping[str, Any]) -> None:
        for directory in facts["directories"]:
            await run(discard_all, Path(directory))

    async def unlock(facts: Mapping[str, Any]) -> None:
        await run(Namespace(**facts).unlock)

    return {
        "network-lock": unlock,
        "target-pod": give_back,
        "staged-volumes": unstage,
        **arriving_part.handlers(containerd),
    }
