"""A container that stands still on the source: whether it executes, what it has left to send, how it is killed or goes on.

A killed agent finds it by the ledger alone, so everything here works from what the journal says.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from podferry.core.undo import Handler
from podferry.criu.checkpoint import HeldDump
from podferry.criu.processes import Process
from podferry.criu.waiting import wake
from podferry.engine.journal import Part
from podferry.engine.ports import OriginalGone
from podferry.errors import Refused
from podferry.memory.tracking.tracker import TrackerKind
from podferry.memory.tracking.trackers import create
from podferry.node.cgroup import Cgroup, CgroupFailed, CpuQuota, Frozen
from podferry.node.netlock import Namespace
from podferry.node.pid_namespace import number_inside
from podferry.node.records import Container
from podferry.node.runtime import ContainerRuntime
from podferry.workload.helpers import reap, runs
from podferry.workload.numbers import address_space_of
from podferry.workload.source_memory import Left
from podferry.workload.threads import at_once, run, threaded


class FrozenContainer:
    """The container `record` on the source, by what `journal` says of it: one that an earlier agent took past the point of no
    return, or what a running one (`SourceContainer`) is as well."""

    def __init__(self, journal: Part, runtime: ContainerRuntime, record: Container) -> None:
        self.journal, self.runtime, self.record = journal, runtime, record
        self.group: Cgroup | None = None
        """The cgroup in which it was killed."""

    def left(self) -> Left:
        """All memory: what the earlier agent sent died with it. Raises `OriginalGone`."""
        try:
            cgroup = Cgroup.of_container(self.runtime.runc_root(self.record), self.record.id)
        except CgroupFailed as error:
            if runs(self.runtime, self.record.id):
                raise
            raise OriginalGone.because("the frozen original has ended", error) from error
        seen = create(TrackerKind.NONE, cgroup.pids).final()
        if not seen.address_spaces:
            raise OriginalGone("the frozen original has ended")
        pids = {address_space_of(self.journal.number, number_inside(pid)): pid for pid in seen.address_spaces}
        return Left(pids, {address_space: seen.address_spaces[pid].written for address_space, pid in pids.items()})

    async def kill(self) -> None:
        """Kill the frozen container; not one instruction of it runs. May be called again after a failure."""
        if (facts := self.journal.held("freeze")) is not None:
            self.group = Cgroup.from_dict(facts["cgroup"])
        await at_once(kill_frozen, self.journal)

    async def runs(self) -> bool:
        """Whether the container is there and has not ended."""
        return await run(runs, self.runtime, self.record.id)

    def executing(self) -> bool:
        """Whether the cgroup that was frozen is thawed and has processes."""
        facts = self.journal.held("freeze")
        return facts is not None and executes(Cgroup.from_dict(facts["cgroup"]))

    async def close(self) -> None:
        """Nothing is open."""


def executes(cgroup: Cgroup) -> bool:
    """Whether processes of the cgroup run. Where it is gone, none do."""
    with suppress(CgroupFailed, OSError):
        return cgroup.state() is Frozen.THAWED and bool(cgroup.pids())
    return False


def kill_frozen(journal: Part) -> None:
    """Kill a frozen container, and let `exec` in again. May be called again after a failure."""
    if (facts := journal.held("network-lock")) is not None:
        Namespace(**facts).unlock()  # before the kill: it may be found by a process
    if (facts := journal.held("held-dump")) is not None:
        held = HeldDump.from_dict(dict(facts))
        held.commit()
        reap(held.runc)
    if (facts := journal.held("exec-lock")) is not None:
        unlock_exec(facts)
    for kind in ("held-dump", "freeze", "quota", "exec-lock", "network-lock"):
        journal.release(kind)


def unlock_exec(facts: Mapping[str, Any]) -> None:
    """Let people in again. A signal that podferry-runc refused while the container stood still is sent now, where there is somebody
    to get it: containerd, which was asked to stop the container, sends it once only, and kills when its patience is over."""
    exec_lock = Path(facts["path"])
    exec_lock.unlink(missing_ok=True)
    wake(exec_lock.parent.parent, exec_lock.name)
    refused = exec_lock.with_name(f"{exec_lock.name}.signal")
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


@contextmanager
def unless_gone(cgroup: Cgroup) -> Iterator[None]:
    """A cgroup that went with its container needs nothing done to it. One that is there and fails still has
    to be given back what was taken: the error goes on to whoever tries again."""
    try:
        yield
    except (CgroupFailed, Refused):
        if cgroup.freezer.exists():
            raise


def handlers() -> dict[str, Handler]:
    """How each thing that the ledger of a container on the source may hold is taken back."""

    def roll_back(facts: Mapping[str, Any]) -> None:
        held = HeldDump.from_dict(dict(facts))
        with unless_gone(held.cgroup):
            held.rollback()
        reap(held.runc)

    def thaw(facts: Mapping[str, Any]) -> None:
        cgroup = Cgroup.from_dict(facts["cgroup"])
        with unless_gone(cgroup):
            cgroup.thaw()

    def give_back(facts: Mapping[str, Any]) -> None:
        cgroup = Cgroup.from_dict(facts["cgroup"])
        with unless_gone(cgroup):
            cgroup.set_cpu_quota(CpuQuota.from_dict(facts["quota"]))

    return {
        "exec-lock": threaded(unlock_exec),
        "outgoing": threaded(lambda facts: shutil.rmtree(facts["directory"], ignore_errors=True)),
        "held-dump": threaded(roll_back),
        "freeze": threaded(thaw),
        "quota": threaded(give_back),
        "network-lock": threaded(lambda facts: Namespace(**facts).unlock()),
    }
