"""A running container on its way out of this node: its memory through tracker and reader, its files, CRIU's dump that holds it.

Everything it holds is in the ledger before it is held; `handlers` takes the same things back, for a migration that fails and for
one that a killed agent left.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import anyio

from podferry.core.inventory import Inventory, encode
from podferry.core.preflight import GUARDING_CRIU, numbers
from podferry.core.undo import Handler
from podferry.criu.checkpoint import CRIU_CONF, Hold, Process
from podferry.criu.dump_gate import Gate
from podferry.criu.skipped_pages import Population, complete, population, possible, worth_sparing
from podferry.criu.timers import put_right
from podferry.criu.vfork import freeze_apart_from_vfork
from podferry.engine.journal import Journal, Part
from podferry.engine.ports import IMAGES, LOG, UPPER, Change, OriginalGone
from podferry.errors import Bug, Failed, PodferryError, Refused
from podferry.fs.private import private_directory
from podferry.memory.kernel.reader import Data, Reader
from podferry.memory.kernel.uffd import PAGE
from podferry.memory.ranges import EMPTY, Growing, Runs
from podferry.memory.tracking.tracker import Kind, Round, create
from podferry.model import Dump
from podferry.node import inventory, network
from podferry.node.cgroup import FREEZE_TIMEOUT, Cgroup, CgroupFailed, CpuQuota, Frozen
from podferry.node.containerd import Containerd, NotFound
from podferry.node.guests import guests, show_out
from podferry.node.records import Task
from podferry.node.stdio import drained
from podferry.node.upper import Source as UpperSource
from podferry.node.upper import shared_files
from podferry.wire.batch import PageBatch
from podferry.wire.frames import MAX_DROPS, MAX_PAYLOAD, Drop, Pages
from podferry.wire.messages import SpaceSum, TreeSum
from podferry.workload.config import Config
from podferry.workload.helpers import reap, remove_task, runs
from podferry.workload.keeping import INVENTORY
from podferry.workload.nodefacts import version
from podferry.workload.offered import Offered
from podferry.workload.owed import Owed
from podferry.workload.threads import Looks, at_once, patiently, run, time_left

FREEZES = 3
"""How often somebody who came in at the last moment is sent out again."""
RECENT_LOOKS = 8
"""How far back it is asked what the job uses of the processors, before it is slowed down."""


@dataclass(frozen=True)
class Output:
    """Where what a container prints arrives, and the FIFOs that it still passes through beyond the container's own pipes."""

    log: Path | None = None
    fifos: tuple[Path, ...] = ()


class Leaving:
    """The running container `offered.record`, whose init is `task`. `upper` is its upper directory, `kind` how it is tracked,
    `conf` CRIU's settings for it; the small files `enclosed` go with CRIU's images, by these names."""

    def __init__(
        self,
        config: Config,
        containerd: Containerd,
        journal: Journal | Part,
        *,
        offered: Offered,
        task: Task,
        upper: Path,
        kind: Kind,
        output: Output | None = None,
        enclosed: Mapping[str, Path] | None = None,
        conf: Path = CRIU_CONF,
        guarded: bool = False,
    ) -> None:
        """`guarded`: while it stands still nobody kills it, and nobody's `exec` counts against it: the kubelet has it, and takes
        what does not answer for dead."""
        self._containerd, self._journal, self._offered, self._task = containerd, journal, offered, task
        self._runc_root = containerd.runc_root(offered.record)
        self._cgroup = Cgroup.of_container(self._runc_root, offered.record.id)
        self._tracker = create(kind, self._cgroup.pids, pause=self._paused)
        self._upper = UpperSource(upper)
        self._enclosed = dict(enclosed or {})
        self._output, self._conf = output or Output(offered.log), conf
        self._scratch = config.outgoing / journal.directory.name
        self._door, self._guarded = config.run / "leaving" / offered.record.id, guarded
        self._readers: dict[int, Reader] = {}
        self._pids: dict[int, int] = {}
        self._spaces: dict[int, int] = {}
        self._sent: dict[int, Runs] = {}
        self._spared: dict[int, bool] = {}
        self._log_sent = 0
        self._quota: CpuQuota | None = None
        self._cpu_used = deque[tuple[float, float]](maxlen=RECENT_LOOKS)
        self._hold: Hold | None = None
        self._dumped = Dump.ORDINARY
        self._network = network.DEFAULT
        self._owed: Owed | None = None
        self._looks = Looks()
        self._inventory: Inventory = {}

    @property
    def cgroup(self) -> Cgroup:
        """Its control group."""
        return self._cgroup

    # Memory.

    async def look(self) -> Change:
        """What was written or dropped since the last look; everything at the first."""
        if self._quota is None:
            self._cpu_used.append((time.monotonic(), self._cgroup.cpu_seconds()))
        return self._taken(await at_once(self._tracker.collect))  # with soft-dirty the job is paused for it

    async def last_look(self) -> Change:
        """The last one: the job is frozen, and the tracker leaves it."""
        return self._taken(await self._looks.at_once(self._tracker.final))

    @contextmanager
    def _paused(self) -> Iterator[None]:
        self._journal.acquire("freeze", cgroup=self._cgroup.to_dict())
        self._cgroup.freeze()
        try:
            yield
        finally:
            self._cgroup.thaw()
        self._journal.release("freeze")

    def _taken(self, seen: Round) -> Change:
        """What the tracker saw of processes, by their pids inside the container."""
        dropped: dict[int, Runs] = {}
        for pid in seen.gone:
            if (space := self._spaces.pop(pid, None)) is not None:
                dropped[space] = self._sent.get(space, EMPTY)
                self._close_reader(space)
        written: dict[int, Runs] = {}
        for pid, found in seen.spaces.items():
            try:
                space = self._spaces[pid] = self._spaces.get(pid) or pid_inside(pid)
            except OSError:  # it came and went around the look: nobody has heard of it
                continue
            self._pids[space] = pid
            if found.fresh:
                self._close_reader(space)
                self._spared[pid] = worth_sparing(found.written)
            written[space] = found.written
            dropped[space] = dropped.get(space, EMPTY) | found.dropped
        return Change(written, dropped)

    def _close_reader(self, space: int) -> None:
        if (reader := self._readers.pop(space, None)) is not None:
            reader.close()

    def read(self, change: Change, round: int) -> Iterator[Pages | Drop]:
        """Read what `change` lists, as frames of up to a megabyte. Send each before the next is taken."""
        for space, dropped in change.dropped.items():
            yield from self._forget(space, dropped)
        for space, written in change.written.items():
            yield from self._read_space(space, written, round)

    def owe(self, change: Change) -> Iterator[Drop]:
        """Post-copy: leave what `change` lists for later. The frames make the target forget what it has of it."""
        for space in {**change.dropped, **change.written}:
            yield from self._forget(space, change.dropped.get(space, EMPTY) | change.written.get(space, EMPTY))
        living = set(self._spaces.values())  # nobody will ask for what a process wrote that has exited since
        self._owed = Owed(self._pids, {space: runs for space, runs in change.written.items() if space in living})

    def owed(self) -> Owed:
        """Post-copy: the memory that the target has not got."""
        if self._owed is None:
            raise Bug("nothing was left for later")
        return self._owed

    def _read_space(self, space: int, written: Runs, round: int) -> Iterator[Pages | Drop]:
        """Pages that hold only zeros are dropped instead: absent pages of a complete space are zero."""
        batch = PageBatch(space, round)
        sent, void = Growing(), Growing()
        try:
            reader = self._readers[space] = self._readers.get(space) or Reader(self._pids[space])
        except OSError:
            return
        for piece in reader.read(written):
            if isinstance(piece, Data):
                sent.add(piece.address, piece.address + len(piece.memory))
                yield from batch.add(piece.address, piece.memory)
            else:
                void.add(piece.start, piece.end)
        yield from batch.flush()
        self._sent[space] = self._sent.get(space, EMPTY) | sent.runs()
        yield from self._forget(space, void.runs())

    def _forget(self, space: int, runs: Runs) -> Iterator[Drop]:
        known = self._sent.get(space, EMPTY)
        void = known & runs
        self._sent[space] = known - runs
        listed = iter(void)
        while some := tuple(islice(listed, MAX_DROPS)):
            yield Drop(space, some)

    def memory_totals(self) -> tuple[SpaceSum, ...]:
        """How many pages of each space the target must hold by now."""
        return tuple(SpaceSum(space, runs.size // PAGE) for space, runs in sorted(self._sent.items()))

    # Files.

    async def trees(self, *, last: bool) -> AsyncIterator[tuple[int, bytes]]:
        """One pass over the upper layer."""
        plan = await self._looks.at_once(lambda: self._upper.plan(suspects=self.mapped_shared(), frozen=last))
        for chunk in self._upper.send(plan):
            yield UPPER, chunk

    def tree_totals(self) -> tuple[TreeSum, ...]:
        """What the last finished pass over the upper layer sent."""
        return (tree_total(UPPER, self._upper),)

    async def logs(self, *, last: bool) -> AsyncIterator[tuple[int, int, bytes]]:
        """What the container has printed since the last pass. In the last one, the shim has taken in all of it first."""
        path = self._output.log
        if path is None:
            return
        if last:
            await self._looks.at_once(partial(drained, self._task.pid, self._output.fifos))
        with path.open("rb", buffering=0) as file:
            file.seek(self._log_sent)
            while data := file.read(MAX_PAYLOAD):
                offset, self._log_sent = self._log_sent, self._log_sent + len(data)
                yield LOG, offset, data

    def mapped_shared(self, mount_point: str = "/") -> set[bytes]:
        """Files below a mount of the container's whose content may change without a trace: a process has them mapped."""
        return {path for pid in self._cgroup.pids() for path in shared_files(pid, os.fsencode(mount_point))}

    # The freeze.

    async def freeze(self) -> None:
        """Stop every task. A job that was slowed down is not any more: CRIU works in its processes, and must not wait."""
        self._journal.acquire("freeze", cgroup=self._cgroup.to_dict())
        await at_once(self._freeze_without_guests, time_left(FREEZE_TIMEOUT))
        if self._quota is not None:
            self._cgroup.set_cpu_quota(self._quota)
            self._journal.release("quota")

    def _freeze_without_guests(self, timeout: float) -> None:
        """An `exec` that had passed the door before it was shut may have come in after the others were sent out."""
        for _ in range(FREEZES):
            self._freeze_apart_from_vfork(timeout)
            if not guests(self._task.pid, self._cgroup.pids()):
                return
            self._cgroup.thaw()
            show_out(self._task.pid, self._cgroup.pids)
        self._freeze_apart_from_vfork(timeout)

    def _freeze_apart_from_vfork(self, timeout: float) -> None:
        freeze_apart_from_vfork(partial(self._cgroup.freeze, timeout), self._cgroup.thaw, self._cgroup.pids)

    async def shut_the_door(self) -> None:
        """What `exec` started in the container ends, since CRIU could not dump it, and podferry-runc lets nobody in any more."""
        first = Process.of(self._task.pid) if self._guarded else None
        init = {"init": asdict(first)} if first is not None else {}
        self._journal.acquire("door", path=str(self._door), **init)
        await run(self._shut_the_door)

    def _shut_the_door(self) -> None:
        private_directory(self._door.parent, below=self._door.parents[1])
        self._door.write_text("guarded\n" if self._guarded else "")
        show_out(self._task.pid, self._cgroup.pids)

    async def stand_by(self) -> None:
        """Begin what the dump needs while the job still runs, where runc can be made to wait."""
        await run(self._stand_by)

    def _stand_by(self) -> None:
        if network.is_own(self._offered.record.spec_json()):
            self._network = network.look(self._task.pid)
        if Gate.usable():
            self._start_dump(wait=True, thin=possible())

    async def dump(self) -> Mapping[tuple[int, str], bytes]:
        """CRIU writes everything but the private memory, and then holds the frozen job."""
        stop = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            return await at_once(self._dump, stop, interrupt=partial(os.eventfd_write, stop, 1))
        finally:
            os.close(stop)

    def _start_dump(self, *, wait: bool, thin: bool = False) -> Hold:
        work = self._scratch / "work"
        self._journal.acquire("outgoing", directory=str(self._scratch))
        images = self._scratch / "images"
        self._journal.acquire("hold", work=str(work), images=str(images), cgroup=self._cgroup.to_dict(), waits=wait)
        hold = self._hold = Hold.start(
            self._offered.record.id,
            self._cgroup,
            runc_root=self._runc_root,
            images=images,
            work=work,
            flags=self._offered.flags,
            conf=self._conf,
            wait=wait,
            thin=thin,
        )
        self._journal.acquire("hold", **hold.to_dict())
        return hold

    def _dump(self, stop: int) -> Mapping[tuple[int, str], bytes]:
        self._inventory = inventory.take(self._task.pid, self._cgroup.pids(), inventory.cpuset(self._cgroup.freezer))
        hold = self._hold or self._start_dump(wait=False)
        if hold.waits and not hold.may_go_on():
            hold.call_off()
            hold = self._start_dump(wait=False)
        found: dict[int, Population] = {}
        if hold.waits:
            self._journal.acquire("hold", **hold.to_dict() | {"waits": False})
            self._dumped = Dump.PREPARED
            spared = [pid for pid in self._spaces if self._spared.get(pid)] if hold.thin else []
            hold.go_on(spared)
            found = {self._spaces[pid]: population(pid) for pid in spared}
        hold.wait_ready(stop=stop)
        self._journal.acquire("hold", **hold.to_dict())
        directory = self._scratch / "images"
        if complete(directory, found, guards=numbers(version("criu")) >= GUARDING_CRIU) and found:
            self._dumped = Dump.THIN
        put_right(directory)
        images = {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
        images[INVENTORY] = encode(self._inventory)
        for name, path in self._enclosed.items():
            with suppress(OSError):
                images[name] = path.read_bytes()
        if self._network != network.DEFAULT:
            images[network.IMAGE] = self._network.encode()
        return {(IMAGES, name): data for name, data in images.items()}

    def dumped(self) -> Dump:
        """What `dump` was spared."""
        return self._dumped

    async def demand_quota(self) -> None:
        """Raises `Refused` or `Failed` where `slow_down` cannot work."""
        self._cgroup.cpu_quota()

    async def slow_down(self, quota: float) -> None:
        """Leave the job this share of the processor time that it used before it was slowed down."""
        if self._quota is None:
            self._quota = self._cgroup.cpu_quota()
            self._cpu_used.append((time.monotonic(), self._cgroup.cpu_seconds()))
            self._journal.acquire("quota", cgroup=self._cgroup.to_dict(), quota=self._quota.to_dict())
        (since, before), (now, used) = self._cpu_used[0], self._cpu_used[-1]
        self._cgroup.set_cpu_quota(self._quota.scaled(quota, (used - before) / max(now - since, 1e-3)))

    async def ended(self) -> str:
        """Return, with how it ended, once the container has ended by itself."""
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self._task.pid)
            try:
                await anyio.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        try:
            status = await patiently(self._containerd.wait_task, self._offered.record.id, 5.0)
        except PodferryError:
            return "its exit status is not known"
        return f"exit status {status}"

    async def runs(self) -> bool:
        """Whether the container is there and has not ended."""
        return await run(runs, self._containerd, self._offered.record.id)

    def executing(self) -> bool:
        """Whether its cgroup is thawed and has processes."""
        return executes(self._cgroup)

    async def commit(self) -> None:
        """Kill the frozen original and remove what is left of it here."""
        await at_once(partial(commit, self._journal, self._containerd, self._offered))

    async def kill(self) -> None:
        """Kill the frozen original, and leave what remains of it to others."""
        await at_once(kill_frozen, self._journal)

    async def close(self) -> None:
        """Let go of descriptors."""
        await self._looks.ended()
        if self._owed is not None:
            self._owed.close()
        if self._hold is not None:
            self._hold.close()
        self._tracker.close()
        self._upper.close()
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()


class Remains:
    """The frozen original of a migration that an earlier agent took past the point of no return."""

    def __init__(self, journal: Journal | Part, containerd: Containerd, offered: Offered) -> None:
        self._journal, self._containerd, self._offered = journal, containerd, offered

    async def commit(self) -> None:
        """Kill the frozen original and remove what is left of it here."""
        await at_once(partial(commit, self._journal, self._containerd, self._offered))

    async def kill(self) -> None:
        """Kill the frozen original, and leave what remains of it to others."""
        await at_once(kill_frozen, self._journal)

    def owed(self) -> Owed:
        """All memory: what the earlier agent sent died with it. Raises `OriginalGone`."""
        record = self._offered.record
        try:
            cgroup = Cgroup.of_container(self._containerd.runc_root(record), record.id)
        except CgroupFailed as error:
            if runs(self._containerd, record.id):
                raise
            raise OriginalGone.because("the frozen original has ended", error) from error
        seen = create(Kind.NONE, cgroup.pids).final()
        pids = {pid_inside(pid): pid for pid in seen.spaces}
        return Owed(pids, {space: seen.spaces[pid].written for space, pid in pids.items()})

    async def runs(self) -> bool:
        """Whether the container is there and has not ended."""
        return await run(runs, self._containerd, self._offered.record.id)

    def executing(self) -> bool:
        """Whether the cgroup that was frozen is thawed and has processes."""
        facts = self._journal.held("freeze")
        return facts is not None and executes(Cgroup.from_dict(facts["cgroup"]))

    async def close(self) -> None:
        """Nothing is open."""


def tree_total(number: int, tree: UpperSource) -> TreeSum:
    """What the last pass over a tree sent. Raises `Failed` where it did not end."""
    summary = tree.summary
    if summary is None:
        raise Failed("the last pass over the upper layer did not end")
    return TreeSum(number, summary.entries, summary.bytes, summary.digest)


def executes(cgroup: Cgroup) -> bool:
    """Whether processes of the cgroup run. Where it is gone, none do."""
    with suppress(CgroupFailed, OSError):
        return cgroup.state() is Frozen.THAWED and bool(cgroup.pids())
    return False


@contextmanager
def unless_gone(cgroup: Cgroup) -> Iterator[None]:
    """A cgroup that went with its container needs nothing done to it. One that is there and fails is still owed what was tried:
    the error goes on to whoever tries again and tells."""
    try:
        yield
    except (CgroupFailed, Refused):
        if cgroup.freezer.exists():
            raise


def pid_inside(pid: int) -> int:
    """The pid that a process has in its own pid namespace, by which CRIU's images name it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nNSpid:")[2].split("\n", 1)[0].split()[-1])


def commit(journal: Journal | Part, containerd: Containerd, offered: Offered) -> None:
    """Kill the frozen original and remove its task, record, snapshot and log. May be called again after a failure."""
    record, frozen = offered.record, journal.held("freeze")
    kill_frozen(journal)
    remove_task(containerd, record.id)
    if frozen is not None:
        Cgroup.from_dict(frozen["cgroup"]).remove()
    with suppress(NotFound):
        containerd.delete_container(record.id)
    with suppress(NotFound):
        containerd.remove_snapshot(record.snapshotter, record.snapshot_key)
    if offered.log is not None:
        offered.log.unlink(missing_ok=True)


def kill_frozen(journal: Journal | Part) -> None:
    """Kill a frozen original; not one instruction of it runs. May be called again after a failure."""
    if (facts := journal.held("hold")) is not None:
        hold = Hold.from_dict(dict(facts))
        hold.commit()
        reap(hold.runc)
    if (facts := journal.held("door")) is not None:
        open_door(facts)
    for kind in ("hold", "freeze", "quota", "door"):
        journal.release(kind)


def open_door(facts: Mapping[str, Any]) -> None:
    """Let people in again. A signal that podferry-runc refused while the container stood still is sent now, where there is somebody
    to get it: containerd, which was asked to stop the container, sends it once only, and kills when its patience is over."""
    door = Path(facts["path"])
    door.unlink(missing_ok=True)
    refused = door.with_name(f"{door.name}.signal")
    with suppress(FileNotFoundError):
        wanted = signal_of(refused.read_text().strip())
        refused.unlink()
        if wanted is not None and "init" in facts:
            Process(**facts["init"]).send(wanted)


def signal_of(word: str) -> signal.Signals | None:
    """A signal as `runc kill` takes it: 15, TERM or SIGTERM. None for what is none."""
    try:
        return signal.Signals(int(word)) if word.isdigit() else signal.Signals[f"SIG{word.upper().removeprefix('SIG')}"]
    except (ValueError, KeyError):
        return None


def handlers() -> dict[str, Handler]:
    """How each thing that the ledger of a leaving container may hold is taken back."""

    def threaded(function: Callable[[Mapping[str, Any]], object]) -> Handler:
        return lambda facts: at_once(function, facts)

    def roll_back(facts: Mapping[str, Any]) -> None:
        hold = Hold.from_dict(dict(facts))
        with unless_gone(hold.cgroup):
            hold.rollback()
        reap(hold.runc)

    def thaw(facts: Mapping[str, Any]) -> None:
        cgroup = Cgroup.from_dict(facts["cgroup"])
        with unless_gone(cgroup):
            cgroup.thaw()

    def give_back(facts: Mapping[str, Any]) -> None:
        cgroup = Cgroup.from_dict(facts["cgroup"])
        with unless_gone(cgroup):
            cgroup.set_cpu_quota(CpuQuota.from_dict(facts["quota"]))

    return {
        "door": threaded(open_door),
        "outgoing": threaded(lambda facts: shutil.rmtree(facts["directory"], ignore_errors=True)),
        "hold": threaded(roll_back),
        "freeze": threaded(thaw),
        "quota": threaded(give_back),
    }
