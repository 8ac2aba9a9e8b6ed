"""A running container on the source: its memory, its files, CRIU's dump that holds it.

Everything it holds is in the ledger before it is held; `podferry.workload.frozen.handlers` takes the same things back, for a
migration that fails and for one that a killed agent left.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import anyio

from podferry.core.connections import End, KernelSocket, OpenConnection, judge
from podferry.core.inventory import encode
from podferry.core.limits import TERMINATION_MESSAGE
from podferry.core.preflight import GUARDING_CRIU, numbers
from podferry.criu.checkpoint import CRIU_CONF, HeldDump
from podferry.criu.dump_gate import DumpGate
from podferry.criu.processes import Process
from podferry.criu.skipped_pages import Population, complete, population, possible
from podferry.criu.timers import put_right, put_threads_right
from podferry.criu.vfork import freeze_apart_from_vfork
from podferry.engine.journal import Part
from podferry.engine.ports import IMAGES, LOG, DirtySet, Images
from podferry.errors import PodferryError
from podferry.fs.private import private_directory
from podferry.memory.tracking.tracker import TrackerKind
from podferry.memory.tracking.trackers import create
from podferry.model import Dump
from podferry.node import inventory, netns, network_namespace, terminals, watched
from podferry.node.cgroup import FREEZE_TIMEOUT, Cgroup, CpuQuota
from podferry.node.cut_lines import end_lines
from podferry.node.exec_sessions import exec_sessions, terminate
from podferry.node.netlock import Namespace
from podferry.node.newfile import small_file
from podferry.node.records import Container, Task
from podferry.node.rotated_log import RotatedLog
from podferry.node.runtime import ContainerRuntime
from podferry.node.sockets import Peers, has_connections, kernel_sockets, unaccepted, unsent
from podferry.node.stdio import drained
from podferry.node.timer_threads import timer_threads
from podferry.node.unsaved_files import names_gone
from podferry.node.upper import shared_files
from podferry.workload.config import Config
from podferry.workload.frozen import FrozenContainer, executes
from podferry.workload.keeping import INVENTORY
from podferry.workload.nodefacts import version
from podferry.workload.numbers import container_of_address_space, directory_of
from podferry.workload.shared_memory import SharedMemory
from podferry.workload.source_memory import Left, SourceMemory
from podferry.workload.source_tree import SourceTree
from podferry.workload.threads import Scans, at_once, patiently, run, time_left

FROZEN_PATIENCE = 0.5
"""Seconds for which a file that the job has begun to watch at the last moment is searched while the job stands still."""
FREEZES = 3
"""How often somebody who came in at the last moment is sent out again."""
RECENT_SCANS = 8
"""How far back it is asked what the job uses of the processors, before it is slowed down."""


@dataclass(frozen=True)
class Output:
    """Where what a container prints arrives, and the FIFOs that it still passes through beyond the container's own pipes."""

    log: Path | None = None
    fifos: tuple[Path, ...] = ()


@dataclass(frozen=True)
class RunningContainer:
    """A container that runs: its record, its task, its upper directory, where its output goes, the flags of its dump, and CRIU's
    settings for it. The small files `enclosed` go with CRIU's images, by these names. `guarded`: while it stands still nobody kills
    it, and an `exec` does not count against it: the kubelet has it, and takes what does not answer for dead."""

    record: Container
    task: Task
    upper: Path
    output: Output = field(default_factory=Output)
    flags: tuple[str, ...] = ()
    enclosed: Mapping[str, Path] = field(default_factory=dict)
    conf: Path = CRIU_CONF
    guarded: bool = False


class SourceContainer(FrozenContainer):
    """The container `running`, tracked as `kind` says. It may be frozen, and thawed again, as often as the migration needs it."""

    def __init__(
        self, config: Config, runtime: ContainerRuntime, journal: Part, running: RunningContainer, kind: TrackerKind
    ) -> None:
        super().__init__(journal, runtime, running.record)
        self._running, self._task = running, running.task
        self._runc_root = runtime.runc_root(running.record)
        self.cgroup = Cgroup.of_container(self._runc_root, running.record.id)
        self.memory = SourceMemory(journal.number, create(kind, self.cgroup.pids, pause=self._paused))
        self.shared = SharedMemory(journal.number, self.cgroup.pids)
        self.tree = SourceTree(running.upper, self.mapped_shared)
        self._scratch = config.outgoing / journal.directory.name
        self._exec_lock = config.run / "leaving" / running.record.id
        self._log: RotatedLog | None = None
        self._log_sent = 0
        self._quota: CpuQuota | None = None
        self._cpu_used = deque[tuple[float, float]](maxlen=RECENT_SCANS)
        self._held: HeldDump | None = None
        self._network = network_namespace.DEFAULT
        self._peers = Peers()
        self.kept: frozenset[tuple[End, End]] = frozenset()
        """Connections of the workload's to others that go on."""
        self._scans = Scans()
        self._told: set[watched.Watched] = set()
        self._linked = anyio.Event()
        self.dumped = Dump.ORDINARY
        """What `dump` did not have to do."""

    # Memory.

    async def scan_dirty(self) -> DirtySet:
        """What was written or dropped since the previous scan; everything at the first."""
        if self._quota is None:
            self._cpu_used.append((time.monotonic(), self.cgroup.cpu_seconds()))
        return self.memory.found(await at_once(self.memory.tracker.collect))  # with soft-dirty the job is paused for it

    async def final_scan(self) -> DirtySet:
        """The last one: the job is frozen, and the tracker leaves it."""
        return self.memory.found(await self._scans.at_once(self.memory.tracker.final))

    def left(self) -> Left:
        """Post-copy: what was left for later."""
        return self.memory.left

    @contextmanager
    def _paused(self) -> Iterator[None]:
        self.journal.acquire("freeze", cgroup=self.cgroup.to_dict())
        self.cgroup.freeze()
        try:
            yield
        finally:
            self.cgroup.thaw()
        self.journal.release("freeze")

    # Files.

    async def logs(self, *, last: bool) -> AsyncIterator[tuple[int, int, bytes]]:
        """What the container has printed since the last pass. In the last one, the shim has taken in all of it first."""
        if self._running.output.log is None:
            return
        self._log = self._log or RotatedLog(self._running.output.log)
        if last:
            await self._scans.at_once(self._output_arrives)
        for data in self._log.new():
            offset, self._log_sent = self._log_sent, self._log_sent + len(data)
            yield directory_of(self.journal.number, LOG), offset, data

    def _output_arrives(self) -> None:
        output = self._running.output
        drained(self._task.pid, output.fifos)
        if output.log is not None:
            end_lines(output.log, output.fifos)

    def mapped_shared(self, mount_point: str = "/") -> set[bytes]:
        """Files below a mount of the container's whose content may change without a trace: a process has them mapped."""
        return {path for pid in self.cgroup.pids() for path in shared_files(pid, os.fsencode(mount_point))}

    # The freeze.

    async def freeze(self) -> None:
        """Stop every task. A job that was slowed down is not any more: CRIU works in its processes, and must not wait.

        May be called again after `thaw_again`."""
        if self.journal.held("freeze") is None:
            self.journal.acquire("freeze", cgroup=self.cgroup.to_dict())
        await at_once(self._freeze_without_exec_sessions, time_left(FREEZE_TIMEOUT))
        if self._quota is not None and self.journal.held("quota") is not None:
            self.cgroup.set_cpu_quota(self._quota)
            self.journal.release("quota")

    def _freeze_without_exec_sessions(self, timeout: float) -> None:
        """An `exec` that podferry-runc let in before the lock was set may have started after the others were ended."""
        self._freeze_apart_from_vfork(timeout)
        for _ in range(FREEZES):
            if not exec_sessions(self._task.pid, self.cgroup.pids()):
                return
            self.cgroup.thaw()
            terminate(self._task.pid, self.cgroup.pids)
            self._freeze_apart_from_vfork(timeout)

    def members(self) -> Collection[int]:
        """Its processes."""
        return self.cgroup.pids()

    async def unaccepted(self, members: Collection[int]) -> tuple[str, ...]:
        """What CRIU would leave out: connections of the workload's processes, `members`, that wait to be accepted in this
        container's network namespace, or were closed with data left, and terminals of its own with what nobody has read."""

        def look() -> tuple[str, ...]:
            first = self._task.pid
            waits = (*unaccepted(first, members), *unsent(first, members))
            return (*waits, *terminals.unread(first, self.cgroup.pids()))

        return await self._scans.at_once(look)

    async def connections(self, members: Collection[int]) -> tuple[OpenConnection, ...]:
        """Those of the workload's processes, `members`, in this container's network namespace, whatever stands between."""
        return judge(await self.sockets(members))

    async def sockets(self, members: Collection[int]) -> list[KernelSocket]:
        """The sockets of the workload's processes, `members`, in this container's network namespace."""
        return await self._scans.at_once(lambda: kernel_sockets(self._task.pid, members))

    async def thaw_again(self) -> None:
        """Let the frozen container go on for a moment: `freeze` is called again. The ledger keeps the freeze."""
        await at_once(self.cgroup.thaw)

    def _freeze_apart_from_vfork(self, timeout: float) -> None:
        freeze_apart_from_vfork(partial(self.cgroup.freeze, timeout), self.cgroup.thaw, self.cgroup.pids)

    async def lock_exec(self) -> None:
        """What `exec` started in the container ends, since CRIU could not dump it, and podferry-runc lets nobody in any more."""
        first = Process.of(self._task.pid) if self._running.guarded else None
        init = {"init": asdict(first)} if first is not None else {}
        self.journal.acquire("exec-lock", path=str(self._exec_lock), **init)
        await run(self._lock_exec)

    def _lock_exec(self) -> None:
        private_directory(self._exec_lock.parent, below=self._exec_lock.parents[1])
        self._exec_lock.write_text("guarded\n" if self._running.guarded else "")
        terminate(self._task.pid, self.cgroup.pids)

    async def stand_by(self) -> None:
        """Begin what the dump needs while the job still runs, where runc can be made to wait."""
        await run(self._stand_by)

    def _stand_by(self) -> None:
        if netns.is_own(self.record.spec_json()):
            self._network = network_namespace.read(self._task.pid)
        if DumpGate.usable():
            self._start_dump(wait=True, skipping=possible())

    async def dump(self) -> Images:
        """CRIU writes everything but the private memory, and then holds the frozen job."""
        stop = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            images = await at_once(self._dump, stop, interrupt=partial(os.eventfd_write, stop, 1))
            self._linked.set()
            return images
        finally:
            os.close(stop)

    async def names_settled(self) -> None:
        """Return when CRIU gives no file another name any more: one that is open, and whose name is gone, gets one in the dump."""
        if await self._scans.at_once(lambda: names_gone(self.cgroup.pids())):
            await self._linked.wait()

    def _scan_paths(self, patience: float = watched.PATIENCE) -> str:
        """CRIU's settings for what the job watches, as far as CRIU was not told of it yet."""
        with suppress(OSError):
            wanted = watched.of_the_root(self._task.pid, watched.watched(self.cgroup.pids())) - self._told
            self._told |= wanted
            return watched.settings(watched.paths(self._task.pid, wanted, patience))
        return ""

    def _start_dump(self, *, wait: bool, skipping: bool = False) -> HeldDump:
        work = self._scratch / "work"
        self.journal.acquire("outgoing", directory=str(self._scratch))
        images = self._scratch / "images"
        self.journal.acquire("held-dump", work=str(work), images=str(images), cgroup=self.cgroup.to_dict(), waits=wait)
        held = self._held = HeldDump.start(
            self.record.id,
            self.cgroup,
            runc_root=self._runc_root,
            images=images,
            work=work,
            flags=self._running.flags,
            conf=self._running.conf,
            more=self._scan_paths(),
            wait=wait,
            skipping=skipping,
        )
        self.journal.acquire("held-dump", **held.to_dict())
        return held

    def _dump(self, stop: int) -> Images:
        had = None
        if inventory.may_be_taken(pids := self.cgroup.pids()):
            had = inventory.take(self._task.pid, pids, inventory.cpuset(self.cgroup.freezer))
        told = timer_threads(pids)
        locked = self._hold_loopback()
        if self.journal.held("held-dump") is None:
            self._held = None  # an earlier one was taken back
        held = self._held or self._start_dump(wait=False)
        if held.waits and not held.may_go_on():
            held.call_off()
            held = self._start_dump(wait=False)
        found: dict[int, Population] = {}
        if held.waits:
            held.note_open()
            self.journal.acquire("held-dump", **held.to_dict() | {"waits": False})
            self.dumped = Dump.PREPARED
            skipped = (
                [pid for pid in self.memory.address_spaces if self.memory.skippable.get(pid)] if held.skipping else []
            )
            held.tell(self._scan_paths(FROZEN_PATIENCE))
            held.go_on(skipped)
            found = {container_of_address_space(self.memory.address_spaces[pid])[1]: population(pid) for pid in skipped}
        held.wait_ready(stop=stop)
        self.journal.acquire("held-dump", **held.to_dict())
        if locked is not None:
            self.journal.acquire("network-lock", **asdict(locked))  # the latest entry: unlocked before the job goes on
        self._peers.take(self._task.pid, self.cgroup.pids(), self.kept)
        directory = self._scratch / "images"
        if complete(directory, found, guards=numbers(version("criu")) >= GUARDING_CRIU) and found:
            self.dumped = Dump.MEMORY_SKIPPING
        put_right(directory)
        put_threads_right(directory, told)
        images: dict[str, bytes | Path] = {path.name: path for path in sorted(directory.iterdir())}
        if had is not None:
            images[INVENTORY] = encode(had)
        for name, path in self._running.enclosed.items():
            with suppress(OSError):
                images[name] = small_file(path, TERMINATION_MESSAGE)
        if self._network != network_namespace.DEFAULT:
            images[network_namespace.IMAGE] = self._network.encode()
        return {(directory_of(self.journal.number, IMAGES), name): data for name, data in images.items()}

    def _hold_loopback(self) -> Namespace | None:
        """Nothing passes between the job's own sockets, or by a connection that is kept, until it is known where the job runs;
        nothing need be done where it has none."""
        if not has_connections(self._task.pid):
            return None
        namespace = Namespace.of(self.record.spec_json(), self._task.pid)
        self.journal.acquire("network-lock", **asdict(namespace))
        namespace.lock(self.kept)
        return namespace

    async def kill(self) -> None:
        """Kill the frozen container; not one instruction of it runs. Whoever is connected to it is told."""
        await super().kill()
        self._peers.reset()

    async def demand_quota(self) -> None:
        """Raises `Refused` or `Failed` where `throttle` cannot work."""
        self.cgroup.cpu_quota()

    async def throttle(self, quota: float) -> None:
        """Leave the job this share of the processor time that it used before it was slowed down."""
        if self._quota is None:
            self._quota = self.cgroup.cpu_quota()
            self._cpu_used.append((time.monotonic(), self.cgroup.cpu_seconds()))
            self.journal.acquire("quota", cgroup=self.cgroup.to_dict(), quota=self._quota.to_dict())
        (since, before), (now, used) = self._cpu_used[0], self._cpu_used[-1]
        self.cgroup.set_cpu_quota(self._quota.scaled(quota, (used - before) / max(now - since, 1e-3)))

    async def ended(self) -> str:
        """Return, with how it ended, once the container has ended by itself."""
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self._task.pid)
            try:
                await anyio.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        try:
            status = await patiently(self.runtime.wait_task, self.record.id, 5.0)
        except PodferryError:
            return "its exit status is not known"
        return f"exit status {status}"

    def executing(self) -> bool:
        """Whether its cgroup is thawed and has processes."""
        return executes(self.cgroup)

    async def close(self) -> None:
        """Let go of descriptors."""
        await self._scans.ended()
        self._peers.close()
        if self._log is not None:
            self._log.close()
        if self._held is not None:
            self._held.close()
        self.memory.close()
