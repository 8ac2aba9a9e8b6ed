"""What a leaving container holds is taken back, or said to be held still: a job must not stay frozen in silence."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import anyio
import pytest

from podferry.core.connections import ConnectionsLost, End, KernelSocket, OpenConnection, end_of, judge
from podferry.core.undo import Ledger
from podferry.criu.checkpoint import HeldDump
from podferry.criu.connections import Settled
from podferry.criu.dump_gate import DumpGate
from podferry.criu.dump_images import FILES_MAGIC, write_entries
from podferry.criu.processes import Process
from podferry.engine.journal import Journal, Part
from podferry.engine.ports import OriginalGone
from podferry.errors import Failed, PodferryError, Refused
from podferry.memory.ranges import EMPTY, Runs
from podferry.memory.tracking.tracker import AddressSpaceRound, DirtyScan, TrackerKind
from podferry.model import Connections, Dump
from podferry.node.cgroup import Cgroup, CgroupFailed, CpuQuota
from podferry.node.containerd_errors import ContainerdFailed, ContainerdNotFound
from podferry.node.netlock import Namespace
from podferry.node.pid_namespace import number_inside
from podferry.node.process import spawn
from podferry.node.records import Container, Opaque, Task, TaskStatus
from podferry.workload.config import Config
from podferry.workload.frozen import FrozenContainer, handlers
from podferry.workload.numbers import address_space_of
from podferry.workload.source import Owner, SourceWorkload
from podferry.workload.source_container import Output, RunningContainer, SourceContainer

pytestmark = [pytest.mark.unit, pytest.mark.anyio]
JOB = Container("job", "image", "overlayfs", "job", Opaque("spec", b"{}"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def files(cgroup: Cgroup) -> dict[str, Path]:
    """Which file of the group each kind of entry writes to."""
    return {"freeze": cgroup.freezer / "freezer.state", "held-dump": cgroup.freezer / "freezer.state"} | {
        "quota": cgroup.freezer / "cpu.cfs_quota_us"
    }


def made(directory: Path) -> Cgroup:
    directory.mkdir()
    cgroup = Cgroup(directory, directory, directory)
    for path, text in (("freezer.state", "FROZEN"), ("cpu.cfs_quota_us", "1000"), ("cpu.cfs_period_us", "100000")):
        (directory / path).write_text(text)
    (directory / "cgroup.procs").touch()
    return cgroup


def facts(kind: str, cgroup: Cgroup, tmp_path: Path) -> dict[str, Any]:
    if kind == "held-dump":
        held = HeldDump("job", cgroup, tmp_path / "work")
        held.waits = True
        return held.to_dict()
    return {"cgroup": cgroup.to_dict(), "quota": CpuQuota().to_dict()}


@pytest.mark.parametrize("kind", ["freeze", "held-dump", "quota"])
async def test_what_cannot_be_given_back_is_said_and_tried_again(kind: str, tmp_path: Path) -> None:
    cgroup = made(tmp_path / "group")
    path = files(cgroup)[kind]
    path.unlink()
    path.mkdir()  # there, and not writable even for root
    ledger = Ledger()
    ledger.add(kind, facts(kind, cgroup, tmp_path))
    (left,) = await ledger.unwind(handlers())
    assert left.kind == kind
    assert str(path) in left.why
    path.rmdir()
    path.write_text("FROZEN" if kind != "quota" else "1000")
    assert await ledger.unwind(handlers()) == []
    assert path.read_text() == ("THAWED" if kind != "quota" else "-1")


@pytest.mark.parametrize("kind", ["freeze", "held-dump", "quota"])
async def test_what_went_with_its_container_needs_nothing(kind: str, tmp_path: Path) -> None:
    cgroup = Cgroup(*[tmp_path / "group"] * 3)
    ledger = Ledger()
    ledger.add(kind, facts(kind, cgroup, tmp_path))
    assert await ledger.unwind(handlers()) == []


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (ContainerdNotFound("no task"), OriginalGone),
        (TaskStatus.STOPPED, OriginalGone),
        (TaskStatus.RUNNING, CgroupFailed),
        (ContainerdFailed("it is not there yet"), CgroupFailed),
    ],
)
def test_an_original_that_its_node_forgot_owes_no_memory(
    said: TaskStatus | ContainerdFailed, error: type[PodferryError], tmp_path: Path
) -> None:
    """The node was switched off, say: runc has no state of it, and containerd, once it is there, no task."""

    def task(id: str) -> Task:
        if isinstance(said, ContainerdFailed):
            raise said
        return Task(id, 1, said)

    containerd = SimpleNamespace(runc_root=lambda record: tmp_path, task=task)
    with pytest.raises(error) as caught:
        FrozenContainer(Part(Journal(tmp_path / "journal"), 0), containerd, JOB).left()  # type: ignore[arg-type]
    assert type(caught.value) is error


def leaving(tmp_path: Path, cgroup: Cgroup, journal: Journal, number: int = 0) -> SourceContainer:
    (tmp_path / "runc/job").mkdir(parents=True)
    (tmp_path / "runc/job/state.json").write_text(json.dumps({"cgroup_paths": {"freezer": str(cgroup.freezer)}}))
    (tmp_path / "upper").mkdir()
    return SourceContainer(
        Config("a", "a:1", tmp_path, {}, run=tmp_path, state=tmp_path),
        SimpleNamespace(runc_root=lambda record: tmp_path / "runc"),  # type: ignore[arg-type]
        Part(journal, number),
        RunningContainer(JOB, Task("job", 1, TaskStatus.RUNNING), tmp_path / "upper"),
        TrackerKind.SOFT_DIRTY,
    )


def test_a_job_that_is_paused_for_a_look_is_in_the_ledger_until_it_runs_again(tmp_path: Path) -> None:
    """An agent that is killed at that moment, or a thaw that fails, must not leave it frozen."""
    cgroup = made(tmp_path / "group")
    journal = Journal(tmp_path / "journal")
    job = leaving(tmp_path, cgroup, journal)
    with job._paused():
        assert Journal(tmp_path / "journal").held("freeze.0") == {"cgroup": Cgroup(cgroup.freezer).to_dict()}
        assert files(cgroup)["freeze"].read_text() == "FROZEN"
    assert files(cgroup)["freeze"].read_text() == "THAWED"
    assert journal.held("freeze.0") is None
    with pytest.raises(CgroupFailed), job._paused():
        files(cgroup)["freeze"].unlink()
        files(cgroup)["freeze"].mkdir()
    assert journal.held("freeze.0") is not None
    assert issubclass(CgroupFailed, PodferryError)


def test_a_process_that_ends_right_after_the_look_is_nobodys_fault(tmp_path: Path) -> None:
    """A job that runs a command now and then must not have its migration end by it."""
    job = leaving(tmp_path, made(tmp_path / "group"), Journal(tmp_path / "journal"))
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    seen = AddressSpaceRound(areas=(), written=Runs.of(0x1000, 0x2000), dropped=EMPTY, deferred=EMPTY, fresh=True)
    both = {os.getpid(): seen, child: seen}
    change = job.memory.found(DirtyScan(both, new=frozenset(both), gone=frozenset(), shared={}))
    here = number_inside(os.getpid())
    assert set(change.written) == {here}
    change = job.memory.found(DirtyScan({os.getpid(): seen}, new=frozenset(), gone=frozenset({child}), shared={}))
    assert set(change.written) == set(change.dropped) == {here}


@pytest.fixture(autouse=True)
def nothing_is_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at the network of the processes that the tests name."""
    monkeypatch.setattr("podferry.workload.source_container.has_connections", lambda pid: False)
    monkeypatch.setattr("podferry.workload.source_container.Peers.take", lambda self, pid, pids, kept: None)


class FakeHeldDump:
    """A dump whose `criu` never came to the gate where `broken`."""

    def __init__(self, images: Path, said: list[str], *, waits: bool, skipping: bool, broken: bool) -> None:
        self.waits, self.skipping, self._said, self._broken = waits, skipping, said, broken
        images.mkdir(parents=True, exist_ok=True)
        write_entries(images / "files.img", FILES_MAGIC, [])
        said.append("waits" if waits else "begins")

    def to_dict(self) -> dict[str, Any]:
        return {"waits": self.waits}

    def note_open(self) -> None:
        pass

    def may_go_on(self) -> bool:
        return not self._broken

    def call_off(self) -> None:
        self._said.append("called off")

    def tell(self, more: str) -> None:
        assert not more, "it watches nothing"

    def go_on(self, skipped: list[int]) -> None:
        self.waits = False
        self._said.append(f"goes on, skipped {len(skipped)}")

    def wait_ready(self, *, stop: int) -> None:
        assert not self.waits


@pytest.mark.parametrize(
    ("gate", "skipping", "whole", "broken", "dumped", "said"),
    [
        (True, True, True, False, Dump.MEMORY_SKIPPING, ["waits", "goes on, skipped 1"]),
        (True, True, False, False, Dump.PREPARED, ["waits", "goes on, skipped 1"]),
        (True, False, True, False, Dump.PREPARED, ["waits", "goes on, skipped 0"]),
        (True, True, True, True, Dump.ORDINARY, ["waits", "called off", "begins"]),
        (False, True, True, False, Dump.ORDINARY, ["begins"]),
    ],
)
async def test_what_a_dump_cannot_be_spared_does_not_end_the_migration(
    gate: bool,
    skipping: bool,
    whole: bool,
    broken: bool,
    dumped: Dump,
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[str] = []

    def start(id: str, cgroup: Cgroup, *, images: Path, wait: bool, skipping: bool, **_: object) -> FakeHeldDump:
        return FakeHeldDump(images, heard, waits=wait, skipping=skipping, broken=broken)

    monkeypatch.setattr(HeldDump, "start", start)
    monkeypatch.setattr(DumpGate, "usable", lambda: gate)
    monkeypatch.setattr("podferry.workload.source_container.possible", lambda: skipping)
    completed: list[int] = []
    monkeypatch.setattr(
        "podferry.workload.source_container.complete", lambda images, found, guards: completed.extend(found) or whole
    )
    journal = Journal(tmp_path / "journal")
    job = leaving(tmp_path, made(tmp_path / "group"), journal, number=1)
    job.memory.address_spaces = {
        os.getpid(): address_space_of(1, number_inside(os.getpid())),
        1 << 22: address_space_of(1, 7),
    }
    job.memory.skippable = {os.getpid(): True, 1 << 22: False}
    await job.stand_by()
    await job.dump()
    assert heard == said
    assert completed == ([number_inside(os.getpid())] if "skipped 1" in said[-1] else [])
    assert job.dumped is dumped
    assert (journal.held("held-dump.1") or {})["waits"] is False


def test_a_pod_says_what_all_of_its_dumps_were_spared() -> None:
    for dumps, said in (
        (Dump, Dump.ORDINARY),
        ((Dump.MEMORY_SKIPPING, Dump.PREPARED), Dump.PREPARED),
        ((Dump.MEMORY_SKIPPING,), Dump.MEMORY_SKIPPING),
    ):
        parts: Any = [SimpleNamespace(dumped=dump, tree=None) for dump in dumps]
        assert SourceWorkload(parts, AsyncMock()).dumped() is said


async def test_a_pod_is_slowed_down_as_a_whole_or_not_at_all() -> None:
    parts: Any = [
        SimpleNamespace(tree=None, demand_quota=AsyncMock(), throttle=AsyncMock()),
        SimpleNamespace(
            tree=None, demand_quota=AsyncMock(side_effect=Refused("no cpu controller")), throttle=AsyncMock()
        ),
    ]
    pod = SourceWorkload(parts, AsyncMock())
    with pytest.raises(Refused):
        await pod.throttle(0.5)
    assert [part.throttle.await_count for part in parts] == [0, 0]
    parts[1].demand_quota.side_effect = None
    await pod.throttle(0.5)
    assert [part.throttle.await_count for part in parts] == [1, 1]


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(("word", "number"), [("15", 15), ("HUP", 1), ("SIGUSR1", 10)])
async def test_a_signal_that_was_refused_while_the_job_stood_still_is_sent_when_it_goes_on(
    word: str, number: int, same: bool, tmp_path: Path
) -> None:
    """To the container's first process, and to no other that has its pid by now."""
    child = spawn(["env", f"--default-signal={number}", "sleep", "60"])  # a run under nohup ignores HUP
    try:
        init = Process.of(child.pid)
        assert init is not None
        exec_lock = tmp_path / "c0ffee"
        exec_lock.write_text("guarded\n")
        exec_lock.with_name("c0ffee.signal").write_text(f"{word}\n")
        ledger = Ledger()
        ledger.add("exec-lock", {"path": str(exec_lock), "init": asdict(init if same else replace(init, started=1))})
        assert await ledger.unwind(handlers()) == []
        assert list(tmp_path.iterdir()) == []
        if same:
            assert child.wait(20) == -number
        else:
            assert init.alive()
    finally:
        child.kill()
        child.wait()


async def test_somebody_who_came_in_at_the_last_moment_is_not_frozen_with_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An `exec` that had passed podferry-runc before the door was shut: CRIU could not dump it."""
    cgroup = made(tmp_path / "group")
    job = leaving(tmp_path, cgroup, Journal(tmp_path / "journal"))
    inside, seen = [(7,), ()], []

    def exec_sessions(first: int, pids: object) -> tuple[int, ...]:
        assert files(cgroup)["freeze"].read_text() == "FROZEN", "only then nobody can come any more"
        return inside.pop(0)

    def terminate(first: int, pids: object) -> int:
        seen.append(files(cgroup)["freeze"].read_text())
        return 1

    monkeypatch.setattr("podferry.workload.source_container.exec_sessions", exec_sessions)
    monkeypatch.setattr("podferry.workload.source_container.terminate", terminate)
    await job.freeze()
    assert (seen, inside) == (["THAWED"], [])
    assert files(cgroup)["freeze"].read_text() == "FROZEN"


class FakeMember:
    """One of two containers, which `waits` for the other to accept a connection, and `talks` to another, as often as it says."""

    tree = None

    def __init__(self, number: int, said: list[str], waits: int = 0, talks: int = 0) -> None:
        self.number, self.frozen, self._said, self._waits, self._talks = number, False, said, waits, talks

    async def freeze(self) -> None:
        assert not self.frozen
        self.frozen = True
        self._said.append(f"{self.number} frozen")

    def members(self) -> list[int]:
        return [self.number]

    async def unaccepted(self, members: list[int]) -> tuple[str, ...]:
        assert self.frozen
        assert members == [1, 2], "a process of either may have the other end"
        self._waits -= 1
        return ("127.0.0.1:5000 -> 127.0.0.1:80",) if self._waits >= 0 else ()

    async def thaw_again(self) -> None:
        self.frozen = False
        self._said.append(f"{self.number} thawed")

    async def connections(self, members: list[int]) -> tuple[OpenConnection, ...]:
        assert self.frozen
        assert members == [1, 2]
        self._talks -= 1
        ends = [KernelSocket("tcp", End(ip_address("10.0.0.5"), 1), End(ip_address("10.0.1.9"), 2), 1)]
        return judge(ends if self._talks >= 0 else [])


async def test_no_container_stays_frozen_while_a_connection_to_it_waits_to_be_accepted() -> None:
    """Whoever has to accept it may be in any of them."""
    said: list[str] = []
    pod: list[Any] = [FakeMember(1, said, waits=2), FakeMember(2, said)]
    await SourceWorkload(pod, Owner()).freeze()
    together = [sorted(said[at : at + 2]) for at in range(0, len(said), 2)]
    frozen, thawed = ["1 frozen", "2 frozen"], ["1 thawed", "2 thawed"]
    assert together == [frozen, thawed, frozen, thawed, frozen]


async def test_a_connection_that_is_never_accepted_ends_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("podferry.workload.source.ACCEPT_PAUSES", (0.0, 0.0))
    pod: list[Any] = [FakeMember(1, said, waits=10**6), FakeMember(2, said)]
    with pytest.raises(Failed) as caught:
        await SourceWorkload(pod, Owner()).freeze()
    assert "waits to be accepted" in caught.value.what
    assert "frozen 3 times" in str(caught.value.why)
    assert sorted(said[-2:]) == ["1 thawed", "2 thawed"], "and both go on meanwhile"


async def test_a_workload_that_may_lose_no_connection_is_frozen_once_it_has_none_to_lose() -> None:
    """A probe, or a question to DNS, is open for a moment only."""
    said: list[str] = []
    pod: list[Any] = [FakeMember(1, said, talks=2), FakeMember(2, said)]
    await SourceWorkload(pod, Owner(), connections=Connections.REQUIRE).freeze()
    assert (said.count("1 frozen"), said.count("1 thawed"), pod[0].frozen) == (3, 2, True)


async def test_a_connection_that_stays_ends_the_attempt_where_none_may_be_lost() -> None:
    said: list[str] = []
    pod: list[Any] = [FakeMember(1, said, talks=10**6), FakeMember(2, said)]
    with pytest.raises(ConnectionsLost) as caught:
        await SourceWorkload(pod, Owner(), connections=Connections.REQUIRE).freeze()
    assert "tcp 10.0.0.5:1 -> 10.0.1.9:2" in caught.value.why
    assert sorted(said[-2:]) == ["1 thawed", "2 thawed"], "and both go on"
    said.clear()
    await SourceWorkload(pod, Owner()).freeze()
    assert sorted(said) == ["1 frozen", "2 frozen"], "nobody asked for it: it is closed"


@pytest.mark.parametrize("asked", [*Connections])
async def test_images_with_a_connection_that_cannot_live_are_not_sent_where_none_may_be_lost(
    asked: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = Settled({}, ("10.0.0.5:1 -> 10.0.1.9:2",))
    monkeypatch.setattr("podferry.workload.source.settle", lambda images, kept: closed)
    parts: list[Any] = [SimpleNamespace(tree=None, dump=AsyncMock(return_value={}))]
    workload = SourceWorkload(parts, Owner(), connections=asked)
    if asked is not Connections.REQUIRE:
        assert await workload.dump() == {}
    else:
        with pytest.raises(ConnectionsLost) as caught:
            await workload.dump()
        assert caught.value.why == "10.0.0.5:1 -> 10.0.1.9:2"
    assert workload.closed_connections() == closed.closed


async def test_a_job_that_runs_has_not_ended_and_one_that_ends_tells_its_exit_status(tmp_path: Path) -> None:
    job, child = leaving(tmp_path, made(tmp_path / "group"), Journal(tmp_path / "journal")), spawn(["sleep", "60"])
    asked: list[int | None] = []

    def wait_task(id: str, patience: float) -> int:
        asked.append(child.poll())
        return 137

    job._task, job.runtime = Task("job", child.pid, TaskStatus.RUNNING), SimpleNamespace(wait_task=wait_task)  # type: ignore[assignment]
    said: list[str] = []

    async def ended() -> None:
        said.append(await job.ended())

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(ended)
            await anyio.wait_all_tasks_blocked()
            assert (said, asked) == ([], []), "it still runs"
            child.kill()
            child.wait()
    finally:
        child.kill()
        child.wait()
    assert said == ["exit status 137"]
    assert asked == [-9], "containerd is asked only once the process has ended"


async def test_a_job_whose_exit_status_nobody_kept_has_ended_all_the_same(tmp_path: Path) -> None:
    job, child = leaving(tmp_path, made(tmp_path / "group"), Journal(tmp_path / "journal")), spawn(["true"])
    child.wait()

    def wait_task(id: str, patience: float) -> int:
        raise ContainerdNotFound("no task")

    job._task, job.runtime = Task("job", child.pid, TaskStatus.RUNNING), SimpleNamespace(wait_task=wait_task)  # type: ignore[assignment]
    assert await job.ended() == "its exit status is not known"


async def test_everything_that_is_open_for_a_job_is_closed_once_it_is_let_go(tmp_path: Path) -> None:
    job = leaving(tmp_path, made(tmp_path / "group"), Journal(tmp_path / "journal"))
    closed: list[str] = []

    def closing(name: str) -> Any:
        return SimpleNamespace(close=lambda: closed.append(name))

    job.memory.close()
    job.memory, job._held, job._log, job._peers = map(closing, ("memory", "held", "log", "peers"))
    await job.close()
    assert sorted(closed) == ["held", "log", "memory", "peers"]


async def test_the_last_pass_over_the_log_has_what_the_shim_had_not_written_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, fifo = tmp_path / "job.log", tmp_path / "fifo"
    log.write_bytes(b"one\n")
    waited: list[tuple[int, tuple[Path, ...]]] = []

    def drained(pid: int, fifos: tuple[Path, ...]) -> None:
        waited.append((pid, fifos))
        with log.open("ab") as file:
            file.write(b"two\n")

    monkeypatch.setattr("podferry.workload.source_container.drained", drained)
    job = leaving(tmp_path, made(tmp_path / "group"), Journal(tmp_path / "journal"))
    job._running = replace(job._running, output=Output(log, (fifo,)))
    first = [(offset, data) async for _, offset, data in job.logs(last=False)]
    assert (first, waited) == ([(0, b"one\n")], []), "while it runs, nobody waits for the shim"
    last = [(offset, data) async for _, offset, data in job.logs(last=True)]
    assert (last, waited) == ([(4, b"two\n")], [(1, (fifo,))])
    await job.close()


async def test_what_a_dump_leaves_on_disk_is_in_the_ledger_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal")
    noted: list[Any] = []

    def start(*_: object, images: Path, **__: object) -> FakeHeldDump:
        noted.append(Journal(tmp_path / "journal").held("outgoing.0"))
        return FakeHeldDump(images, [], waits=True, skipping=False, broken=False)

    monkeypatch.setattr(HeldDump, "start", start)
    job = leaving(tmp_path, made(tmp_path / "group"), journal)
    job._start_dump(wait=True)
    (fact,) = noted
    directory = Path(fact["directory"])
    assert (directory / "images/files.img").exists()
    ledger = Ledger()
    ledger.add("outgoing", fact)
    assert await ledger.unwind(handlers()) == []
    assert not directory.exists()


@pytest.mark.parametrize("connected", [False, True])
def test_loopback_is_held_still_where_a_job_has_connections_and_the_ledger_knows(
    connected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal")
    noted: list[Any] = []
    here = Namespace(f"/proc/{os.getpid()}/ns/net", 7)
    monkeypatch.setattr("podferry.workload.source_container.has_connections", lambda pid: connected)
    monkeypatch.setattr(Namespace, "of", lambda spec, pid: here)
    job = leaving(tmp_path, made(tmp_path / "group"), journal)
    job.kept = frozenset({(end_of("10.0.0.5:1"), end_of("10.0.1.9:2"))})

    def lock(self: Namespace, silent: Any) -> None:
        assert silent == job.kept
        noted.append(Journal(tmp_path / "journal").held("network-lock.0"))

    monkeypatch.setattr(Namespace, "lock", lock)
    assert job._hold_loopback() == (here if connected else None)
    assert noted == ([asdict(here)] if connected else [])


async def test_a_frozen_job_of_an_agent_before_is_killed_by_what_its_journal_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cgroup = made(tmp_path / "group")
    journal = Part(Journal(tmp_path / "journal"), 0)
    journal.acquire("freeze", cgroup=cgroup.to_dict())
    killed: list[Any] = []
    monkeypatch.setattr("podferry.workload.frozen.kill_frozen", killed.append)
    one = FrozenContainer(journal, SimpleNamespace(), JOB)  # type: ignore[arg-type]
    await one.kill()
    assert killed == [journal]
    assert one.group == Cgroup.from_dict(cgroup.to_dict())
