"""A container alone: podferry has containerd make it on the target, and removes what is left of it on the source."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel

from podferry.core.undo import Handler
from podferry.criu.checkpoint import CRIU_CONF
from podferry.criu.incoming import Incoming
from podferry.criu.processes import Process
from podferry.errors import Bug, Failed, PodferryError, Refused
from podferry.node.containerd import Containerd
from podferry.node.containerd_errors import ContainerdAlreadyExists, ContainerdNotFound
from podferry.node.netns import is_own
from podferry.node.newfile import check_new, create_new
from podferry.node.records import Container, upper_dir
from podferry.node.upper import Receiver
from podferry.workload.config import Config
from podferry.workload.frozen import FrozenContainer
from podferry.workload.helpers import ended, kill_helper, process_of, python, remove_task, runs, start_helper
from podferry.workload.offered import OfferedContainer
from podferry.workload.source import Owner
from podferry.workload.target import handlers
from podferry.workload.target_container import TargetContainer
from podferry.workload.threads import at_once, patiently, run, threaded

STATE_TIMEOUT = 7200.0


class ContainerdOwner(Owner):
    """Nobody but containerd knows of the container; its output goes to the file `log`."""

    def __init__(self, containerd: Containerd, log: Path | None) -> None:
        self._containerd, self._log = containerd, log

    async def after_commit(self, killed: Sequence[FrozenContainer]) -> None:
        """Remove its task, cgroup, record, snapshot and log."""
        for one in killed:
            await at_once(self._remove, one)

    def _remove(self, killed: FrozenContainer) -> None:
        record = killed.record
        remove_task(self._containerd, record.id)
        if killed.group is not None:
            killed.group.remove()
        with suppress(ContainerdNotFound):
            self._containerd.delete_container(record.id)
        with suppress(ContainerdNotFound):
            self._containerd.remove_snapshot(record.snapshotter, record.snapshot_key)
        if self._log is not None:
            self._log.unlink(missing_ok=True)


class ContainerdContainer:
    """The container `offered`, which containerd makes by a starter of ours (`podferry.workload.starter`): a process that outlives a
    killed agent. `log` is the file that its output goes to."""

    not_images: tuple[str, ...] = ()
    lasting: tuple[str, ...] = ("task", "container", "snapshot", "log", "restored")

    def __init__(self, config: Config, containerd: Containerd, offered: OfferedContainer) -> None:
        self._config, self._containerd, self._offered = config, containerd, offered
        self.name = self.key = offered.record.id
        self.flags = offered.flags
        self._starter: Process | None = None

    @property
    def made_already(self) -> Container | None:
        """Its record, once its task waits for its state."""
        return None if self._starter is None else self._offered.record

    def prepare(self, container: TargetContainer) -> None:
        """Its record, its snapshot, and its log where it has one."""
        record, journal = self._offered.record_here(self._config.wrapper), container.journal
        journal.acquire("container", id=record.id)
        try:
            self._containerd.create_container(record)
        except ContainerdAlreadyExists as there:
            journal.release("container")
            raise Refused(
                f"there is a container named {record.id} here already", remedy="remove or rename it"
            ) from there
        journal.acquire("snapshot", snapshotter=record.snapshotter, key=record.snapshot_key)
        mounts = self._containerd.prepare(
            record.snapshotter, record.snapshot_key, self._offered.layers, image=record.image, node=self._config.node
        )
        container.upper = Receiver(upper_dir(mounts))
        journal.acquire("restored", key=record.id)
        container.expect_restore(network=is_own(record.spec_json()), criu_conf=CRIU_CONF.read_text())
        container.belongs_in(record)
        if (path := self._offered.log) is not None:
            check_new(self._config.logs, path)  # before the ledger has it: what was there before is never deleted
            journal.acquire("log", path=str(path))
            try:
                container.log_file = create_new(self._config.logs, path)
            except Refused:
                journal.release("log")
                raise

    async def make(self, container: TargetContainer, timeout: float) -> Container:
        """Have the starter create its task. What a killed agent's starter had created is removed first: its wrapper has ended."""
        journal, record = container.journal, self._offered.record
        if (left := process_of(journal.held("starter"))) is not None:
            left.kill()
            await at_once(partial(remove_task, self._containerd, record.id))
            (container.scratch / "started.json").unlink(missing_ok=True)
        request = {
            "socket": str(self._config.containerd),
            "namespace": self._config.namespace,
            "id": record.id,
            "stdio": asdict(self._offered.stdio),
            "timeout": STATE_TIMEOUT,
        }
        (container.scratch / "start.json").write_text(json.dumps(request))
        journal.acquire("task", id=record.id)
        files = [container.scratch / "start.json", container.scratch / "started.json"]
        starter = start_helper(journal, container.scratch, "starter", [*python("podferry.workload.starter"), *files])
        async with anyio.create_task_group() as watch:
            watch.start_soon(self._watch, starter, container, container.incoming)
            try:
                await patiently(container.incoming.wait_prepared, timeout)
            except PodferryError:
                await anyio.lowlevel.checkpoint_if_cancelled()  # then it is what the cancel did to the wait
                raise
            watch.cancel_scope.cancel()
        self._starter = starter
        return record

    async def _watch(self, starter: Process, container: TargetContainer, incoming: Incoming) -> None:
        """containerd may fail before the wrapper is ever called: then nobody need wait for it."""
        try:
            await _end_of(starter, container)
        except PodferryError as error:
            incoming.abandon(error)
        except anyio.get_cancelled_exc_class():
            incoming.abandon()
            raise
        else:
            incoming.abandon(Bug("the container started although its state had not arrived"))

    async def before_restore(self, container: TargetContainer) -> None:
        """All was done when its state was whole."""

    async def restored(self, container: TargetContainer) -> None:
        """Wait for the starter's end, be it this agent's or one before its."""
        self._starter = self._starter or process_of(container.journal.held("starter"))
        await _end_of(self._starter, container)

    async def started(self, container: TargetContainer) -> None:
        """containerd has started it; the starter's work is done."""
        container.journal.release("starter")

    async def is_here(self) -> bool:
        """Whether containerd has a task of it, running or ended."""
        try:
            await at_once(self._containerd.task, self._offered.record.id)
        except ContainerdNotFound:
            return False
        return True

    async def has_ended(self) -> bool:
        """Whether no task of it runs."""
        return not await run(runs, self._containerd, self._offered.record.id)

    def mark_arrived(self) -> None:
        """Nobody restarts it."""

    async def crash(self) -> None:
        """Nobody asks for it: it is in the ledger until it has all its memory."""


async def _end_of(starter: Process | None, container: TargetContainer) -> None:
    """Wait for the starter's end. Raises what it says of a failure."""
    if starter is not None:
        await ended(starter)
    try:
        answer = json.loads((container.scratch / "started.json").read_text())
    except (OSError, ValueError) as error:
        raise Failed.because("the process that starts the container died", error) from error
    if "error" in answer:
        failure = PodferryError.from_dict(answer["error"])
        failure.evidence = container.restore_log() or failure.evidence
        raise failure


def target_handlers(config: Config, containerd: Containerd) -> dict[str, Handler]:
    """How what a container alone holds on the target is taken back."""

    def gone(function: Callable[..., object]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            with suppress(ContainerdNotFound):
                function(*args)

        return call

    return {
        **handlers(config),
        "container": threaded(lambda facts: gone(containerd.delete_container)(facts["id"])),
        "snapshot": threaded(lambda facts: gone(containerd.remove_snapshot)(facts["snapshotter"], facts["key"])),
        "log": threaded(lambda facts: Path(facts["path"]).unlink(missing_ok=True)),
        "task": threaded(lambda facts: remove_task(containerd, facts["id"])),
        "starter": threaded(kill_helper),
    }
