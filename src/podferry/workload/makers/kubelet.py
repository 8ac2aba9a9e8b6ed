"""A pod: the kubelet makes its containers on the target, and removes what is left of them on the source. Of the original only the
processes are killed here; records, snapshots and the sandbox go when the pod's object goes.

It is long because a pod is made in two orders, before GO or, where it keeps its name, after it, and both are steps of one class.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import structlog

from podferry.core.limits import PARSED_IMAGE, TERMINATION_MESSAGE
from podferry.core.undo import Handler
from podferry.criu.checkpoint import CRIU_CONF
from podferry.criu.connections import content
from podferry.criu.dump_images import without_deleted_sources
from podferry.criu.incoming import pod_key
from podferry.criu.network_setup import has_streams
from podferry.criu.processes import Process
from podferry.criu.waiting import wake
from podferry.engine.journal import Journal, Part
from podferry.engine.ports import IMAGES, Images
from podferry.errors import Bug, Failed
from podferry.fs.private import private_directory
from podferry.node import cri, network_namespace, outside
from podferry.node import payloads as volume_payloads
from podferry.node.cgroup import Cgroup, CgroupFailed
from podferry.node.cri import LOG_ROOT, Volume, termination_message
from podferry.node.netlock import Namespace
from podferry.node.netns import joined
from podferry.node.newfile import small_file
from podferry.node.payloads import OPEN_FILES
from podferry.node.pod_records import demand_uid
from podferry.node.process import spawn
from podferry.node.records import Container, TaskStatus
from podferry.node.runtime import ContainerNotFound, ContainerRuntime
from podferry.node.staging import Staged, discard
from podferry.node.upper import refresh_root
from podferry.workload import frozen
from podferry.workload.config import Config
from podferry.workload.frozen import FrozenContainer
from podferry.workload.helpers import ended, helper_environment, kill_helper, python, write_down
from podferry.workload.makers.arriving_connections import NETWORK_LOCK, TRANSLATION, ArrivingConnections
from podferry.workload.numbers import directory_of
from podferry.workload.offered import LAST_WORDS, PAYLOADS, PodPart
from podferry.workload.pod import kept_connections
from podferry.workload.pod.cluster_port import Cluster
from podferry.workload.pod.probes import Probe
from podferry.workload.pod.translations import PodTranslations
from podferry.workload.source import Owner
from podferry.workload.target import Maker, handlers
from podferry.workload.target_container import RESTORE_TIMEOUT, TargetContainer
from podferry.workload.threads import Scans, at_once, patiently, run

STAND_IN = "stand-in"
"""The process that answers probes (`podferry.workload.answering`), in the ledger."""
WAY_IN = "way-in"
"""In the ledger: the name, by the pod's uid, of what arrived before the pod was made."""
START_TIMEOUT = 10.0
POLL_INTERVAL = 0.005
_MOUNTS = re.compile(r"mountpoints-\d+\.img")

HandOver = Callable[[], Awaitable[None]]
"""Returns when the owner counts the target pod, and the source pod is deleted."""
Replaced = Callable[[], Awaitable[bool]]
"""Whether the pod's object was given up for one of the same name: then nothing of the pod may run here any more."""


class KubeletOwner(Owner):
    """The kubelet has the pod. `departed` is the mark that nothing of it starts here; `payloads` packs what the kubelet has written
    for it and these images say is open; `probes` are answered while it stands still."""

    def __init__(
        self,
        journal: Journal,
        hand_over: HandOver,
        *,
        departed: Path,
        payloads: Callable[[Iterable[bytes]], bytes] = lambda images: b"",
        probes: Sequence[Probe] = (),
        replaced: Replaced | None = None,
    ) -> None:
        self._journal, self._hand_over, self._replaced = journal, hand_over, replaced
        self._departed, self._payloads, self._probes = departed, payloads, probes
        self._scans = Scans()

    async def stand_by(self, cgroups: Sequence[Cgroup]) -> None:
        """Start what answers probes when the containers do not."""
        if self._probes:
            await run(self._start_stand_in, cgroups)

    def _start_stand_in(self, cgroups: Sequence[Cgroup]) -> None:
        what = {"cgroups": [one.to_dict() for one in cgroups], "probes": [asdict(one) for one in self._probes]}
        argv = outside.surviving([*python("podferry.workload.answering"), json.dumps(what)])
        process = Process.of(spawn(argv, env=helper_environment()).pid)
        if process is None:
            raise Failed("the process that answers the frozen pod's liveness probes ended right after its start")
        write_down(self._journal, STAND_IN, process)

    async def before_freeze(self) -> None:
        """From here on nothing of the pod starts on this node, unless it is undone."""
        self._journal.acquire("departed", path=str(self._departed))
        private_directory(self._departed.parent, below=self._departed.parents[1])
        self._departed.touch()

    async def completed(self, images: Images) -> Images:
        """Without mounts whose source was deleted here, and with what is open of the pod's own volumes."""
        whole = {
            name: without_deleted_sources(content(data)) if _MOUNTS.fullmatch(name[1]) else data
            for name, data in images.items()
        }
        open_files = (content(data) for (_, name), data in images.items() if name == OPEN_FILES)
        if payloads := await self._scans.at_once(partial(self._payloads, open_files)):
            whole[directory_of(0, IMAGES), PAYLOADS] = payloads
        return whole

    async def replaced(self) -> bool:
        """The kubelet waits only to kill what is frozen, once the pod's object is gone."""
        return self._replaced is not None and await self._replaced()

    async def before_commit(self) -> None:
        """Have the owner count the target pod. The mark that nothing of the pod starts here again stays until the pod is gone."""
        await self._hand_over()
        self._journal.release("departed")

    async def after_commit(self, killed: Sequence[FrozenContainer]) -> None:
        """What remains is the kubelet's; nobody need answer probes any more."""
        if (facts := self._journal.held(STAND_IN)) is not None:
            await run(kill_helper, facts)
            self._journal.release(STAND_IN)


class KubeletMaker(Maker):
    """Has the controller make the target pod; the kubelet then makes its containers one after another, and the first waits in
    podferry-runc until GO. From the resume on the pod is the kubelet's, as any other."""

    kept_from_the_resume = True

    def __init__(
        self, config: Config, journal: Journal, cluster: Cluster, connections: ArrivingConnections | None = None
    ) -> None:
        self._config, self._journal, self._cluster, self._connections = config, journal, cluster, connections

    @property
    def makes_after_go(self) -> bool:
        """A pod that keeps its name is made only when the source's is gone."""
        return bool(self._journal.facts.get("keeps_name"))

    async def begin(self, containers: Sequence[TargetContainer]) -> None:
        """Have the pod made, and podferry-runc wait in each of its containers. For a pod that keeps its name, what arrives has its
        place by the migration's id until the pod is made, and has a uid."""
        id = self._journal.directory.name
        if "target_pod" in self._journal.facts or self.makes_after_go:
            return
        if self._cluster.keeps_name(id):
            demand_uid(id)
            for one in containers:
                await run(self._expect, one, id)
            self._journal.note(keeps_name=True)
            return
        uid = await self._ask_for_the_pod()
        for one in containers:
            await run(self._expect, one, uid)

    async def _ask_for_the_pod(self) -> str:
        """Its uid, once the controller has made it."""
        id = self._journal.directory.name
        self._journal.acquire("target-pod", id=id)
        pod = await self._cluster.target_pod(id)
        demand_uid(pod.uid)
        self._journal.note(target_pod=pod.uid)
        return pod.uid

    async def arrive(self, containers: Sequence[TargetContainer]) -> None:
        """Have the pod made that keeps its name; podferry-runc finds by its uid what has arrived."""
        uid = self._journal.facts.get("target_pod") or await self._ask_for_the_pod()
        for one in containers:
            await run(self._lead, one, uid)

    def _lead(self, container: TargetContainer, uid: str) -> None:
        key = pod_key(uid, container.maker.name)
        container.journal.acquire(WAY_IN, key=key)
        container.journal.note(made_as=uid)
        way = self._config.incoming / key
        if not way.is_symlink():
            way.symlink_to(container.maker.key)
        wake(self._config.run, key)

    def _expect(self, container: TargetContainer, uid: str) -> None:
        container.journal.note(uid=uid)
        # an earlier podferry closed connections in the dump, and they are in its images all the same
        closed = "" if "--tcp-established" in container.maker.flags else "tcp-close\n"
        container.expect_restore(criu_conf=CRIU_CONF.read_text() + closed)

    def places(self, first: Container) -> Mapping[Volume, Path]:
        """Where the pod has its volumes here, by its first container's record."""
        uid = self._journal.facts["target_pod"]
        return dict(cri.volumes([first.spec_json()], uid, self._config.kubelet))

    async def connect(self, containers: Sequence[TargetContainer]) -> None:
        """Those of its connections to others that go on."""
        if self._connections is not None:
            await self._connections.connect(containers)

    async def before_release(self, containers: Sequence[TargetContainer]) -> None:
        """Nothing passes over loopback until the last container is restored, whose sockets would be missed: a connection finds its
        other end gone, and whoever connects anew finds nobody listening."""
        first = containers[0].maker.made_already  # None where an agent before this one had it restored
        if first is None or self._journal.held(NETWORK_LOCK) is not None:
            return
        streams = any(has_streams(self._config.incoming / one.maker.key / "images") for one in containers)
        if not streams and len(containers) == 1:
            return
        namespace = Namespace.of(first.spec_json(), 0)
        self._journal.acquire(NETWORK_LOCK, **asdict(namespace))
        try:
            await at_once(namespace.lock)
        except Failed as error:
            if streams:
                raise
            self._journal.release(NETWORK_LOCK)
            why = "a container may find another one's port closed until that is restored"
            structlog.get_logger().warning(why, error=str(error))

    async def after_release(self) -> None:
        """Loopback is open again, also where an agent before this one has locked it."""
        if (facts := self._journal.held(NETWORK_LOCK)) is not None:
            await at_once(Namespace(facts["path"], facts["inode"]).unlock)
            self._journal.release(NETWORK_LOCK)

    def entrust(self) -> None:
        """Nobody deletes the pod any more."""
        self._journal.release("target-pod")
        self._journal.release(TRANSLATION)


class KubeletContainer:
    """A container of the pod, as the kubelet makes it from its own object: nothing of its record comes from the source. Until it is
    there, what arrives for it is staged."""

    not_images: tuple[str, ...] = (LAST_WORDS, PAYLOADS, kept_connections.IMAGE)
    lasting: tuple[str, ...] = ("kubelet-task", "restored", "arrived")

    def __init__(self, config: Config, runtime: ContainerRuntime, journal: Part, offered: PodPart) -> None:
        self._config, self._runtime, self._journal = config, runtime, journal
        self.name, self.flags = offered.name, offered.flags
        self.made_already: Container | None = None
        self._staged: Staged | None = None

    @property
    def key(self) -> str:
        """By the pod's uid, which is not known before the pod is made; for a pod that is made after GO, by the migration's."""
        uid = self._journal.facts.get("uid")
        return pod_key(uid, self.name) if uid else ""

    @property
    def _id(self) -> str | None:
        return self._journal.facts.get("container")

    @property
    def _pod(self) -> str:
        """The uid of the pod here."""
        facts = self._journal.facts
        return str(facts.get("made_as") or facts.get("uid") or "")

    def prepare(self, container: TargetContainer) -> None:
        """Stage its files and its output."""
        staged = self._config.staging / self._journal.directory.name
        self._journal.acquire("staged", directory=str(staged))
        self._staged = Staged(staged, below=self._config.state)
        container.upper = self._staged.receiver
        container.log_file = os.open(container.scratch / "log", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    async def make(self, container: TargetContainer, timeout: float) -> Container:
        """Wait until the kubelet has made it. Its upper layer takes in at once what was staged, and what comes later."""
        if container.adopted:
            raise Failed(
                "the agent was restarted before the container was restored", why="podferry-runc has ended with it"
            )
        incoming = container.incoming
        try:
            await patiently(incoming.wait_prepared, timeout, abandon_on_cancel=True)
        except anyio.get_cancelled_exc_class():
            incoming.abandon()
            raise
        self._journal.acquire("restored", key=incoming.container)
        self._journal.note(container=incoming.container)
        self.made_already = record = await at_once(self._move_in, container, incoming.container)
        return record

    def _move_in(self, container: TargetContainer, id: str) -> Container:
        record = self._runtime.container(id)
        container.belongs_in(record)
        upper = self._runtime.upper(record)
        if self._staged is None:
            raise Bug("a container of a pod was made before it was prepared")
        self._staged.move_to(upper)
        refresh_root(self._runtime.root(record))
        container.upper = self._staged.receiver
        return record

    async def before_restore(self, container: TargetContainer) -> None:
        """Its log begins with what it printed on the source; its termination message, and what it has open of the source's volumes,
        are put in their places."""
        record = await container.make(RESTORE_TIMEOUT)
        await at_once(self._write_files, container, record)
        await at_once(network_namespace.lend, joined(record.spec_json()), container.incoming.images)
        self._journal.acquire("kubelet-task", id=record.id)

    def _write_files(self, container: TargetContainer, record: Container) -> None:
        self._write_last_words(container.incoming.images / LAST_WORDS, record)
        self._write_payloads(container.incoming.images / PAYLOADS)
        path = self._runtime.log(record)
        if path is None or container.log_size == 0:
            return
        if not path.is_relative_to(LOG_ROOT) or ".." in path.parts:
            raise Failed(f"the log of {self.name} is {path}", why=f"that is not below {LOG_ROOT}")
        with path.open("ab", buffering=0) as log, os.fdopen(os.dup(container.log_file), "rb") as staged:
            staged.seek(0)
            shutil.copyfileobj(staged, log)

    def _write_last_words(self, words: Path, record: Container) -> None:
        """The job may have the file open: its size must be the same."""
        if words.exists():
            place = termination_message(record.spec_json(), self._pod, self.name, self._config.kubelet)
            if place is not None:
                place.write_bytes(small_file(words, TERMINATION_MESSAGE))
            words.unlink()

    def _write_payloads(self, packed: Path) -> None:
        if packed.exists():
            volume_payloads.unpack(small_file(packed, PARSED_IMAGE), self._pod, self._config.kubelet)
            packed.unlink()

    async def restored(self, container: TargetContainer) -> None:
        """Wait for podferry-runc's end: who called it hears how it ended."""
        if (wrapper := container.wrapper()) is not None:
            await ended(wrapper)
        if not await container.has_run():
            raise Failed("runc left no log of it")

    async def started(self, container: TargetContainer) -> None:
        """Wait a while until the runtime has made a task of what `runc restore` left. One that has ended may be gone already."""
        with anyio.move_on_after(START_TIMEOUT):
            while True:
                with suppress(ContainerNotFound):
                    task = await at_once(self._runtime.task, self._journal.facts["container"])
                    if task.status in (TaskStatus.RUNNING, TaskStatus.STOPPED):
                        return
                await anyio.sleep(POLL_INTERVAL)

    async def is_here(self) -> bool:
        """Whether it runs, or has run here to its end."""
        return self._mark().exists() or not await self.has_ended()

    async def has_ended(self) -> bool:
        """Whether it has no task that has not ended."""
        if self._id is None:
            return True
        try:
            return (await at_once(self._runtime.task, self._id)).status is TaskStatus.STOPPED
        except ContainerNotFound:
            return True

    async def crash(self) -> None:
        """End it as a crash would: what becomes of it then is the kubelet's business."""
        if self._id is not None:
            await at_once(_kill, self._runtime, self._id)

    def mark_arrived(self) -> None:
        """From now on a restart of the container is an ordinary one."""
        path = self._mark()
        self._journal.acquire("arrived", path=str(path))
        private_directory(path.parent, below=self._config.state)
        path.touch()

    def _mark(self) -> Path:
        return self._config.arrived / (pod_key(self._pod, self.name) if self._pod else "none")


def _kill(runtime: ContainerRuntime, id: str) -> None:
    with suppress(ContainerNotFound, CgroupFailed):
        Cgroup.of_container(runtime.runc_root(runtime.container(id)), id).kill()


def target_handlers(
    config: Config, runtime: ContainerRuntime, cluster: Cluster, here: PodTranslations
) -> dict[str, Handler]:
    """How what the target of a pod holds is taken back."""

    async def give_back(facts: Mapping[str, Any]) -> None:
        await cluster.give_back(facts["id"])

    async def kill_task(facts: Mapping[str, Any]) -> None:
        await at_once(_kill, runtime, facts["id"])

    async def unmark(facts: Mapping[str, Any]) -> None:
        Path(facts["path"]).unlink(missing_ok=True)

    async def unstage(facts: Mapping[str, Any]) -> None:
        await at_once(discard, Path(facts["directory"]))

    async def unlock(facts: Mapping[str, Any]) -> None:
        if not facts.get("silent"):  # or who is told already to send here would be answered with a reset: the pod goes
            await run(Namespace(facts["path"], facts["inode"]).unlock)

    async def close_the_way(facts: Mapping[str, Any]) -> None:
        (config.incoming / facts["key"]).unlink(missing_ok=True)

    own = {
        NETWORK_LOCK: unlock,
        TRANSLATION: lambda facts: run(here.leave, facts["uid"]),
        "target-pod": give_back,
        "kubelet-task": kill_task,
        "arrived": unmark,
        "staged": unstage,
        WAY_IN: close_the_way,
    }
    return {**handlers(config), **own}


def source_handlers() -> dict[str, Handler]:
    """How what the source of a pod holds is taken back."""

    async def come_back(facts: Mapping[str, Any]) -> None:
        Path(facts["path"]).unlink(missing_ok=True)

    return {**frozen.handlers(), "departed": come_back, STAND_IN: lambda facts: run(kill_helper, facts)}
