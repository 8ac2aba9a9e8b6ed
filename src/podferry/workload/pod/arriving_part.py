"""One container of a pod on its way onto this node: the kubelet makes it, podferry-runc waits in its `create`, the agent fills it.

Until the kubelet has made the container, what arrives for it is staged.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio

from podferry.core.allowed_rights import rights_of
from podferry.core.limits import PARSED_IMAGE, TERMINATION_MESSAGE
from podferry.core.undo import Handler
from podferry.criu.checkpoint import CRIU_CONF, Process
from podferry.criu.incoming import Incoming, pod_key
from podferry.criu.network_setup import has_streams
from podferry.criu.restored_group import group_to_tell
from podferry.criu.rights import demand_no_more
from podferry.engine.journal import Part
from podferry.errors import Bug, Failed
from podferry.fs.private import private_directory
from podferry.memory.store.page_store import PageStore
from podferry.node import network, payloads
from podferry.node.cgroup import Cgroup, CgroupFailed
from podferry.node.containerd import Containerd, NotFound
from podferry.node.cri import LOG_ROOT, log_of, termination_message
from podferry.node.netlock import Namespace, joined
from podferry.node.newfile import small_file
from podferry.node.records import Container, Status, upper_dir
from podferry.node.staging import Staged, discard
from podferry.node.upper import refresh_root
from podferry.workload.account import Promise
from podferry.workload.arriving import RESTORE_TIMEOUT, Arriving
from podferry.workload.config import Config
from podferry.workload.helpers import ended, process_of
from podferry.workload.keeping import INVENTORY, keeping
from podferry.workload.nodefacts import version
from podferry.workload.pod.offered import LAST_WORDS, PAYLOADS, PodPart
from podferry.workload.threads import at_once, patiently

START_TIMEOUT = 10.0
LOOK_EVERY = 0.005


class ArrivingPart(Arriving):
    """The container `part` of a pod. `key` is not known before the pod's uid is."""

    lasting = ()

    def __init__(
        self, config: Config, containerd: Containerd, journal: Part, part: PodPart, promise: Promise | None = None
    ) -> None:
        super().__init__(config, containerd, journal, None, promise)
        self.name, self._flags = part.name, part.flags
        self._container: Container | None = None
        self._judged = False
        self._staged: Staged | None = None
        if "uid" in journal.facts:
            self.key = pod_key(journal.facts["uid"], part.name)

    def _prepare(self) -> None:
        self._journal.acquire("scratch", directory=str(self.scratch))
        self._store = PageStore.create(self.scratch / "store", self._grows)
        staged = self._config.staging / self.scratch.name
        self._journal.acquire("staged", directory=str(staged))
        self._staged = Staged(staged, below=self._config.state)
        self._upper = self._staged.receiver
        self._log = os.open(self.scratch / "log", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def expect(self, uid: str) -> None:
        """The pod has this uid: podferry-runc finds what is prepared for the container from now on, and waits."""
        self._journal.note(uid=uid)
        self.key = pod_key(uid, self.name)
        self._journal.acquire("incoming", key=self.key)
        self._incoming = Incoming.prepare(
            self.key,
            flags=("--lazy-pages", *self._flags),
            # an earlier podferry closed connections in the dump, and they are in its images all the same
            criu_conf=CRIU_CONF.read_text() + ("" if "--tcp-established" in self._flags else "tcp-close\n"),
            run=self._config.run,
        )

    async def _start_task(self) -> None:
        """The kubelet does."""

    async def made(self, timeout: float) -> Container:
        """Wait until the kubelet has made the container and podferry-runc waits in its `create`; its record.

        Its upper layer takes in at once what was staged, and what comes later.
        """
        if self._container is None:
            incoming = self._need_incoming()
            try:
                await patiently(incoming.wait_poised, timeout, abandon_on_cancel=True)
            except anyio.get_cancelled_exc_class():
                incoming.abandon()
                raise
            self._journal.acquire("restored", key=incoming.container)
            self._journal.note(container=incoming.container)
            self._container = await at_once(self._move_in, incoming.container)
        return self._container

    def _move_in(self, id: str) -> Container:
        record = self._containerd.container(id)
        self._need_incoming().belongs_in(group_to_tell(record.spec_json(), version("runc")))
        upper = upper_dir(self._containerd.mounts(record.snapshotter, record.snapshot_key))
        if self._staged is None:
            raise Bug("a part of a pod was made before it was prepared")
        self._staged.move_to(upper)
        self._upper = self._staged.receiver
        return record

    def has_connections(self) -> bool:
        """Whether connections come with its images."""
        return has_streams(self._config.incoming / self.key / "images")

    def network(self) -> Namespace | None:
        """The pod's network namespace; None where this agent has not seen the container made: another one had it restored."""
        return Namespace.of(self._container.spec_json(), 0) if self._container is not None else None

    def _judge_images(self) -> None:
        """Before GO where the kubelet has made the container by then, the first of a pod; the others before they are restored."""
        if self._container is not None:
            rights = rights_of(self._container.spec_json(), os.path.exists, os.uname().machine)
            demand_no_more(self._need_incoming().images, rights, also=(INVENTORY, LAST_WORDS, PAYLOADS))
            self._judged = True

    def _files_came(self) -> None:
        """They are told to the overlay when it is there."""

    async def release(self) -> float:
        """Have the container restored as soon as the kubelet has made it. Returns since when it runs."""
        if not self._journal.facts.get("released"):
            await self._let_it_be_restored()
        restoring = self._wrapper()
        stuck: TimeoutError | None = None
        try:
            with anyio.fail_after(RESTORE_TIMEOUT):
                if restoring is not None:
                    async with keeping(self._incoming, self._kept):
                        await ended(restoring)
        except TimeoutError as error:
            stuck = error
        if not await self._has_run():
            what = f"the restore of {self.name}"
            raise self._not_restored(what, stuck or Failed("runc left no log of it"))
        await self._started(self._journal.facts["container"])
        return await self._since()

    async def _let_it_be_restored(self) -> None:
        if self._incoming is None:
            raise Failed(
                "the agent was restarted before the container was restored", why="podferry-runc has ended with it"
            )
        record = await self.made(RESTORE_TIMEOUT)
        if not self._judged:
            await at_once(self._judge_images)
        await at_once(self._write_files, record)
        await at_once(network.lend, joined(record.spec_json()), self._incoming.images)
        wrapper = Process.of(self._incoming.wrapper)
        self._journal.acquire("kubelet-task", id=record.id)
        self._journal.note(released=True, wrapper=[wrapper.pid, wrapper.started] if wrapper else None)
        await at_once(self._incoming.restore)

    async def _started(self, id: str) -> None:
        """Wait a while until containerd has made a task of what `runc restore` left. One that has ended may be gone already."""
        with anyio.move_on_after(START_TIMEOUT):
            while True:
                with suppress(NotFound):
                    task = await at_once(self._containerd.task, id)
                    if task.status in (Status.RUNNING, Status.STOPPED):
                        return
                await anyio.sleep(LOOK_EVERY)

    def _write_files(self, record: Container) -> None:
        """The kubelet's log file begins with what the container printed on the source, and its root is told of its files."""
        refresh_root(self._containerd.bundle(record.id) / "rootfs")
        self._write_last_words(record)
        self._write_payloads()
        path = log_of(record)
        if path is None or self._log_end == 0:
            return
        if not path.is_relative_to(LOG_ROOT) or ".." in path.parts:
            raise Failed(f"the log of {self.name} is {path}", why=f"that is not below {LOG_ROOT}")
        with path.open("ab", buffering=0) as log, os.fdopen(os.dup(self._log), "rb") as staged:
            staged.seek(0)
            shutil.copyfileobj(staged, log)

    def _write_last_words(self, record: Container) -> None:
        """What the container has written of its termination message. The job may have the file open: its size must be the same."""
        words = self._need_incoming().images / LAST_WORDS
        if words.exists():
            place = termination_message(record.spec_json(), self._journal.facts["uid"], self.name, self._config.kubelet)
            if place is not None:
                place.write_bytes(small_file(words, TERMINATION_MESSAGE))
            words.unlink()

    def _write_payloads(self) -> None:
        """What the pod has open of the source's volumes is put beside what the kubelet has written here."""
        packed = self._need_incoming().images / PAYLOADS
        if packed.exists():
            payloads.unpack(small_file(packed, PARSED_IMAGE), self._journal.facts["uid"], self._config.kubelet)
            packed.unlink()

    async def resumed(self) -> float:
        """Since when it runs. Raises where it is gone."""
        if self._feeder is None:
            self._feeder = process_of(self._journal.held("feeder"))
        status = await self._status_of_feeder("filling", "done")
        if not await self.is_here():
            raise Failed(f"the container {self.name} is gone", evidence=self._log_of("feeder"))
        return float(status["resumed_ns"]) / 1e9

    async def is_here(self) -> bool:
        """Whether it runs, or has run here to its end."""
        return self._mark().exists() or await self.executes()

    async def executes(self) -> bool:
        """Whether it has a task that has not ended."""
        id = self._journal.facts.get("container")
        if id is None:
            return False
        try:
            return (await at_once(self._containerd.task, id)).status is not Status.STOPPED
        except NotFound:
            return False

    async def has_ended(self) -> bool:
        """Whether it has run here to its end."""
        return not await self.executes()

    def entrust(self) -> None:
        """It is the kubelet's from now on: nothing takes it back."""
        for kind in ("kubelet-task", "restored", "arrived"):
            self._journal.release(kind)

    async def crash(self) -> None:
        """End it as a crash would."""
        if (id := self._journal.facts.get("container")) is not None:
            await at_once(_kill, self._containerd, id)

    def mark_arrived(self) -> None:
        """From now on a restart of the container is an ordinary one."""
        path = self._mark()
        self._journal.acquire("arrived", path=str(path))
        private_directory(path.parent, below=self._config.state)
        path.touch()

    def _mark(self) -> Path:
        return self._config.arrived / (self.key or "none")

    async def _adopt(self) -> None:
        raise Bug("a part of a pod is not adopted")


def _kill(containerd: Containerd, id: str) -> None:
    with suppress(NotFound, CgroupFailed):
        Cgroup.of_container(containerd.runc_root(containerd.container(id)), id).kill()


def handlers(containerd: Containerd) -> dict[str, Handler]:
    """How what only a part of a pod holds is taken back."""

    async def kill_task(facts: Mapping[str, Any]) -> None:
        await at_once(_kill, containerd, facts["id"])

    async def unmark(facts: Mapping[str, Any]) -> None:
        Path(facts["path"]).unlink(missing_ok=True)

    async def unstage(facts: Mapping[str, Any]) -> None:
        await at_once(discard, Path(facts["directory"]))

    return {"kubelet-task": kill_task, "arrived": unmark, "staged": unstage}
