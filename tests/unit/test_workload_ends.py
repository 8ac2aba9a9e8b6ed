"""Both ends of a move: how an original is frozen, killed and forgotten, and how containerd makes the one that follows it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from test_agent_source_container import JOB, files, leaving, made

from podferry.core.undo import Ledger
from podferry.criu.processes import Process
from podferry.engine.journal import Journal, Part
from podferry.engine.ports import OriginalGone
from podferry.errors import Bug, Failed, Refused
from podferry.memory.ranges import Runs
from podferry.memory.tracking.tracker import AddressSpaceRound, DirtyScan
from podferry.node.cgroup import Cgroup, CgroupFailed, CpuQuota
from podferry.node.containerd_errors import ContainerdAlreadyExists, ContainerdFailed, ContainerdNotFound
from podferry.node.records import SnapshotMount, Stdio, Task, TaskStatus
from podferry.node.runtime import ContainerNotFound
from podferry.wire.frames import Drop
from podferry.workload import frozen, helpers, source_container, source_memory, starter
from podferry.workload.config import Config
from podferry.workload.frozen import FrozenContainer, kill_frozen, signal_of
from podferry.workload.helpers import gathered, runs
from podferry.workload.makers import containerd as maker_module
from podferry.workload.makers.containerd import ContainerdContainer, ContainerdOwner, target_handlers
from podferry.workload.numbers import address_space_of
from podferry.workload.offered import OfferedContainer
from podferry.workload.source_container import SourceContainer
from podferry.workload.source_memory import SourceMemory

pytestmark = [pytest.mark.unit, pytest.mark.anyio]
EMPTY = Runs()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# The source.


@pytest.fixture
def job(tmp_path: Path) -> SourceContainer:
    cgroup = made(tmp_path / "group")
    found = leaving(tmp_path, cgroup, Journal(tmp_path / "journal"), number=1)
    found.cgroup = cgroup
    return found


def state(job: SourceContainer) -> str:
    return files(job.cgroup)["freeze"].read_text()


def test_a_pause_is_in_the_ledger_as_long_as_it_lasts(job: SourceContainer) -> None:
    job.cgroup.thaw()
    with suppress(ZeroDivisionError), job._paused():
        assert (state(job), job.journal.held("freeze") is not None) == ("FROZEN", True)
        1 / 0  # noqa: B018 - whatever becomes of the look
    assert state(job) == "THAWED"
    with job._paused():
        pass
    assert (state(job), job.journal.held("freeze")) == ("THAWED", None)


async def test_a_job_that_was_slowed_down_is_not_while_criu_works_in_it(
    job: SourceContainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_container, "exec_sessions", lambda *_: ())
    monkeypatch.setattr(
        source_container.SourceContainer, "_freeze_apart_from_vfork", lambda self, timeout: self.cgroup.freeze(1)
    )
    monkeypatch.setattr(Cgroup, "cpu_seconds", lambda self: 1.0)
    files(job.cgroup)["quota"].write_text("-1")
    before = CpuQuota.from_dict(job.cgroup.cpu_quota().to_dict())
    job._cpu_used.append((time.monotonic() - 1.0, 0.0))
    await job.throttle(0.5)
    assert job.journal.held("quota") == {"cgroup": job.cgroup.to_dict(), "quota": before.to_dict()}
    slowed = files(job.cgroup)["quota"].read_text()
    await job.throttle(0.25)
    assert files(job.cgroup)["quota"].read_text() != slowed
    await job.freeze()
    assert (state(job), job.journal.held("quota")) == ("FROZEN", None)
    assert job.cgroup.cpu_quota() == before
    entries = len(job.journal._journal.ledger.entries)
    await job.thaw_again()
    assert state(job) == "THAWED"
    await job.freeze()
    assert len(job.journal._journal.ledger.entries) == entries, "a second freeze is in the ledger already"


async def test_nobody_comes_in_once_the_lock_is_written_down(
    job: SourceContainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(source_container, "terminate", lambda first, pids: ended.append(first) or 0)
    await job.lock_exec()
    held = job.journal.held("exec-lock")
    assert held == {"path": str(job._exec_lock)}
    assert (job._exec_lock.read_text(), ended) == ("", [1])
    frozen.unlock_exec(held)
    assert not job._exec_lock.exists()


async def test_files_that_lose_their_names_are_waited_for(
    job: SourceContainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = False
    monkeypatch.setattr(source_container, "names_gone", lambda pids: gone)
    with anyio.fail_after(120):
        await job.names_settled()
    gone = True
    with anyio.move_on_after(0.05) as scope:
        await job.names_settled()
    assert scope.cancel_called, "CRIU has not named them yet"
    job._linked.set()
    with anyio.fail_after(120):
        await job.names_settled()


@pytest.mark.parametrize(
    ("status", "says"), [(3, "exit status 3"), (Failed("nothing answers"), "its exit status is not known")]
)
async def test_a_job_that_ends_by_itself_is_told_with_its_status(
    status: int | Failed, says: str, job: SourceContainer
) -> None:
    def wait_task(id: str, timeout: float) -> int:
        assert (id, timeout) == ("job", 5.0)
        if isinstance(status, Failed):
            raise status
        return status

    job.runtime = cast(Any, SimpleNamespace(wait_task=wait_task))
    child = os.fork()
    if not child:
        os._exit(0)
    job._task = Task("job", child, TaskStatus.RUNNING)
    with anyio.fail_after(120):
        assert await job.ended() == says
    os.waitpid(child, 0)
    with anyio.fail_after(120):
        assert await job.ended() == says, "one that is gone has ended, too"


def test_memory_of_processes_that_end_is_forgotten_on_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def number_inside(pid: int) -> int:
        if pid == 12:
            raise ProcessLookupError("it came and went")
        return pid - 9

    monkeypatch.setattr(source_memory, "number_inside", number_inside)
    monkeypatch.setattr(source_memory, "worth_skipping", lambda runs: runs.size > 8192)
    memory = SourceMemory.__new__(SourceMemory)
    memory._number, memory._sent, memory._pids, memory._readers, memory._left = 1, {}, {}, {}, None
    memory.address_spaces, memory.skippable = {}, {}
    one, two = address_space_of(1, 1), address_space_of(1, 2)

    def scan(spaces: dict[int, AddressSpaceRound], gone: Collection[int] = ()) -> Any:
        return memory.found(DirtyScan(spaces, frozenset(), frozenset(gone), {}))

    def seen(written: Runs, dropped: Runs = EMPTY, *, fresh: bool = False) -> AddressSpaceRound:
        return AddressSpaceRound((), written, dropped, EMPTY, fresh)

    first = scan(
        {10: seen(Runs.of(0, 4096), fresh=True), 11: seen(Runs.of(0, 16384), fresh=True), 12: seen(Runs())} | {}
    )
    assert (first.written, memory.address_spaces) == (
        {one: Runs.of(0, 4096), two: Runs.of(0, 16384)},
        {10: one, 11: two},
    )
    assert memory.skippable == {10: False, 11: True}
    closed: list[int] = []
    memory._readers = {two: cast(Any, SimpleNamespace(close=lambda: closed.append(two)))}
    memory._sent = {one: Runs.of(0, 4096), two: Runs.of(0, 16384)}
    later = scan({10: seen(EMPTY, Runs.of(0, 4096))}, gone=[11, 99])
    assert later.dropped == {two: Runs.of(0, 16384), one: Runs.of(0, 4096)}
    assert closed == [two]
    assert [(frame.address_space, frame.runs) for frame in memory.read(later, 2) if isinstance(frame, Drop)] == [
        (two, ((0, 16384),)),
        (one, ((0, 4096),)),
    ]
    assert [(total.address_space, total.pages) for total in memory.totals()] == [(one, 0), (two, 0)]
    with pytest.raises(Bug, match="nothing was left"):
        _ = memory.left


def test_what_is_left_for_later_is_what_the_living_wrote() -> None:
    memory = SourceMemory.__new__(SourceMemory)
    one, two, other = address_space_of(1, 1), address_space_of(1, 2), address_space_of(2, 1)
    memory._number, memory._pids, memory._readers, memory._left = 1, {one: 10, two: 11}, {}, None
    memory._sent, memory.address_spaces = {one: Runs.of(0, 8192), two: Runs.of(0, 4096)}, {10: one}
    dirty: Any = SimpleNamespace(
        written={one: Runs.of(4096, 8192), two: Runs.of(0, 4096), other: Runs.of(0, 4096)},
        dropped={one: Runs.of(0, 4096)},
    )
    forgotten = {frame.address_space: frame.runs for frame in memory.leave(dirty)}
    assert forgotten == {one: ((0, 8192),), two: ((0, 4096),)}
    assert memory.left.runs == {one: Runs.of(4096, 8192)}
    memory._pids = {}
    with pytest.raises(OriginalGone):
        list(memory.leave(dirty))


# The frozen original.


def test_a_frozen_original_has_all_its_memory_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = {10: SimpleNamespace(written=Runs.of(0, 4096))}
    monkeypatch.setattr(frozen, "Cgroup", SimpleNamespace(of_container=lambda root, id: SimpleNamespace(pids=None)))
    monkeypatch.setattr(
        frozen, "create", lambda kind, pids: SimpleNamespace(final=lambda: SimpleNamespace(address_spaces=written))
    )
    monkeypatch.setattr(frozen, "number_inside", lambda pid: pid - 9)
    original = FrozenContainer(
        Part(Journal(tmp_path / "j"), 2), cast(Any, SimpleNamespace(runc_root=lambda r: "")), JOB
    )
    left = original.left()
    assert (left.pids, left.runs) == ({address_space_of(2, 1): 10}, {address_space_of(2, 1): Runs.of(0, 4096)})
    written.clear()
    with pytest.raises(OriginalGone):
        original.left()


async def test_a_killed_original_holds_nothing_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroup, journal, said = made(tmp_path / "group"), Part(Journal(tmp_path / "j"), 0), list[str]()
    runc = Process(1 << 22, 1)
    held = SimpleNamespace(commit=lambda: said.append("committed"), runc=runc)
    monkeypatch.setattr(frozen, "HeldDump", SimpleNamespace(from_dict=lambda facts: held))
    monkeypatch.setattr(frozen, "reap", lambda process: said.append("reaped" if process is runc else "?"))
    monkeypatch.setattr(frozen, "Namespace", lambda **facts: SimpleNamespace(unlock=lambda: said.append("unlocked")))
    monkeypatch.setattr(frozen, "unlock_exec", lambda facts: said.append(f"open {facts['path']}"))
    original = FrozenContainer(journal, cast(Any, None), JOB)
    assert not original.executing(), "what was never frozen is not known to execute"
    await original.kill()
    assert (said, original.group) == ([], None)
    journal.acquire("freeze", cgroup=cgroup.to_dict())
    for kind, facts in (
        ("held-dump", {}),
        ("quota", {}),
        ("exec-lock", {"path": "/lock"}),
        ("network-lock", {"path": "x"}),
    ):
        journal.acquire(kind, **facts)
    assert not original.executing(), "it is frozen"
    await original.kill()
    assert said == ["unlocked", "committed", "reaped", "open /lock"]
    assert original.group == cgroup
    assert journal._journal.ledger.entries == []
    kill_frozen(journal)  # again: nothing is left to do
    assert len(said) == 4


def test_a_thawed_group_with_processes_executes_and_one_that_is_gone_does_not(tmp_path: Path) -> None:
    cgroup = made(tmp_path / "group")
    assert not frozen.executes(cgroup)
    files(cgroup)["freeze"].write_text("THAWED")
    assert not frozen.executes(cgroup), "nobody is in it"
    (cgroup.freezer / "cgroup.procs").write_text(f"{os.getpid()}\n")
    assert frozen.executes(cgroup)
    assert not frozen.executes(Cgroup(*[tmp_path / "gone"] * 3))


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("15", signal.SIGTERM),
        ("TERM", signal.SIGTERM),
        ("sigterm", signal.SIGTERM),
        ("999", None),
        ("NO", None),
        ("", None),
    ],
)
def test_signals_are_named_as_runc_names_them(word: str, found: signal.Signals | None) -> None:
    assert signal_of(word) is found


@pytest.mark.parametrize(
    ("status", "so"),
    [(TaskStatus.RUNNING, True), (TaskStatus.STOPPED, False), (ContainerNotFound("x"), False), (Failed("busy"), True)],
)
def test_a_container_runs_unless_its_runtime_says_that_it_does_not(status: TaskStatus | Exception, so: bool) -> None:
    def task(id: str) -> Task:
        if isinstance(status, Exception):
            raise status
        return Task(id, 1, status)

    assert runs(cast(Any, SimpleNamespace(task=task)), "job") is so


async def test_the_first_error_of_several_ends_the_others() -> None:
    ended = []

    async def forever() -> int:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("ended")
        return 0

    async def fails() -> int:
        await anyio.lowlevel.checkpoint()
        raise Failed("one of them")

    async def gives(value: int) -> int:
        return value

    assert await gathered(lambda: gives(1), lambda: gives(2)) == [1, 2]
    with pytest.raises(ExceptionGroup):
        await gathered(forever, fails)
    assert ended == ["ended"]


# containerd makes the one that follows.


class Containerd:
    """Notes what it is asked. It knows nothing of what is in `lacks`, and has a container of the name already if `taken`."""

    def __init__(self, *lacks: str, taken: bool = False) -> None:
        self.said: list[str] = []
        self._lacks, self._taken = lacks, taken

    def _call(self, name: str, *args: Any) -> None:
        self.said.append(" ".join(map(str, [name, *args])))
        if name in self._lacks:
            raise ContainerdNotFound(name)

    def create_container(self, record: Any) -> None:
        self._call("create_container", record.id)
        if self._taken:
            raise ContainerdAlreadyExists(record.id)

    def prepare(self, snapshotter: str, key: str, layers: Any, *, image: str, node: str) -> list[SnapshotMount]:
        self._call("prepare", snapshotter, key, layers, image, node)
        return [SnapshotMount("overlay", "overlay", (f"upperdir={self.upper}",))]

    upper = ""

    def task(self, id: str) -> Task:
        self._call("task", id)
        return Task(id, 1, TaskStatus.RUNNING)

    def kill_task(self, id: str, signal: int, *, everyone: bool) -> None:
        self._call("kill_task", id, int(signal), everyone)

    def wait_task(self, id: str, timeout: float) -> None:
        self._call("wait_task", id)

    def delete_task(self, id: str) -> None:
        self._call("delete_task", id)

    def delete_container(self, id: str) -> None:
        self._call("delete_container", id)

    def remove_snapshot(self, snapshotter: str, key: str) -> None:
        self._call("remove_snapshot", snapshotter, key)


@pytest.mark.parametrize("lacks", [(), ("kill_task", "wait_task", "delete_container", "remove_snapshot")])
async def test_a_job_that_has_moved_leaves_neither_records_nor_log(lacks: tuple[str, ...], tmp_path: Path) -> None:
    log, group, containerd = tmp_path / "job.log", list[str](), Containerd(*lacks)
    log.touch()
    killed: Any = SimpleNamespace(record=JOB, group=SimpleNamespace(remove=lambda: group.append("removed")))
    await ContainerdOwner(cast(Any, containerd), log).after_commit([killed])
    assert containerd.said == [
        "task job",
        "kill_task job 9 True",
        "wait_task job",
        "delete_task job",
        "delete_container job",
        "remove_snapshot overlayfs job",
    ]
    assert (group, log.exists()) == (["removed"], False)
    killed.group = None
    await ContainerdOwner(cast(Any, Containerd("task")), None).after_commit([killed])


async def test_a_task_that_is_gone_is_not_killed_and_one_that_cannot_be_killed_is_still_deleted() -> None:
    gone, stubborn = Containerd("task"), Containerd()
    stubborn.kill_task = lambda *_, **__: (_ for _ in ()).throw(ContainerdFailed("it has ended"))  # type: ignore[method-assign]
    helpers.remove_task(cast(Any, gone), "job")
    helpers.remove_task(cast(Any, stubborn), "job")
    assert (gone.said, stubborn.said) == (["task job"], ["task job", "wait_task job", "delete_task job"])


@pytest.fixture
def preparing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A container of a target that is being prepared."""
    monkeypatch.setattr(maker_module, "is_own", lambda spec: True)
    monkeypatch.setattr(maker_module, "CRIU_CONF", tmp_path / "criu.conf")
    (tmp_path / "criu.conf").write_text("conf")
    (tmp_path / "logs").mkdir()
    said: list[str] = []
    return SimpleNamespace(
        journal=Part(Journal(tmp_path / "m"), 0),
        upper=None,
        log_file=-1,
        said=said,
        expect_restore=lambda *, network, criu_conf: said.append(f"expected {network} {criu_conf}"),
        belongs_in=lambda record: said.append(f"in the group of {record.id}"),
    )


def maker(tmp_path: Path, containerd: Containerd, log: Path | None) -> ContainerdContainer:
    stdio = Stdio(stdout=f"file://{log}", stderr=f"file://{log}") if log else Stdio()
    config = Config("b", "b:1", tmp_path, {}, run=tmp_path, state=tmp_path, logs=tmp_path / "logs")
    containerd.upper = str(tmp_path / "upper")
    (tmp_path / "upper").mkdir(exist_ok=True)
    return ContainerdContainer(config, cast(Any, containerd), OfferedContainer(JOB, ("sha256:low",), stdio))


def held(container: Any) -> list[str]:
    return [entry.kind for entry in container.journal._journal.ledger.entries]


def test_containerd_has_record_and_snapshot_before_podferry_runc_is_awaited(tmp_path: Path, preparing: Any) -> None:
    containerd = Containerd()
    maker(tmp_path, containerd, tmp_path / "logs/job.log").prepare(preparing)
    assert containerd.said == ["create_container job", "prepare overlayfs job ('sha256:low',) image b"]
    assert preparing.said == ["expected True conf", "in the group of job"]
    assert held(preparing) == ["container.0", "snapshot.0", "restored.0", "log.0"]
    assert preparing.journal.held("snapshot") == {"snapshotter": "overlayfs", "key": "job"}
    assert preparing.upper is not None
    preparing.upper.close()
    os.close(preparing.log_file)
    assert (tmp_path / "logs/job.log").exists()


def test_a_container_of_that_name_is_not_ours_to_remove(tmp_path: Path, preparing: Any) -> None:
    with pytest.raises(Refused, match="a container named job here already"):
        maker(tmp_path, Containerd(taken=True), None).prepare(preparing)
    assert held(preparing) == []


def test_a_log_that_was_there_before_is_not_in_the_ledger(
    tmp_path: Path, preparing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "logs/job.log"
    log.write_text("somebody else's")
    with pytest.raises(Refused):
        maker(tmp_path, Containerd(), log).prepare(preparing)
    assert "log.0" not in held(preparing)
    log.unlink()

    def faster(logs: Path, path: Path) -> int:
        assert "log.0" in held(preparing)
        raise Refused("somebody has made it just now")

    monkeypatch.setattr(maker_module, "create_new", faster)
    with pytest.raises(Refused, match="just now"):
        maker(tmp_path, Containerd(), log).prepare(preparing)
    assert "log.0" not in held(preparing)


async def test_what_containerd_forgot_needs_no_undoing(tmp_path: Path) -> None:
    config = Config("b", "b:1", tmp_path, {}, run=tmp_path, state=tmp_path)
    (tmp_path / "job.log").touch()
    for containerd in (Containerd(), Containerd("delete_container", "remove_snapshot", "task")):
        ledger = Ledger()
        ledger.add("container", {"id": "job"})
        ledger.add("snapshot", {"snapshotter": "overlayfs", "key": "job"})
        ledger.add("log", {"path": str(tmp_path / "job.log")})
        ledger.add("task", {"id": "job"})
        assert await ledger.unwind(target_handlers(config, cast(Any, containerd))) == []
        assert containerd.said[0] == "task job"
        assert containerd.said[-2:] == ["remove_snapshot overlayfs job", "delete_container job"]
    assert not (tmp_path / "job.log").exists()


@pytest.mark.parametrize(
    ("status", "here", "ended"),
    [(TaskStatus.RUNNING, True, False), (TaskStatus.STOPPED, True, True), (None, False, True)],
)
async def test_a_container_is_here_as_long_as_containerd_has_a_task_of_it(
    status: TaskStatus | None, here: bool, ended: bool, tmp_path: Path
) -> None:
    def task(id: str) -> Task:
        if status is None:
            raise ContainerdNotFound(id)
        return Task(id, 1, status)

    one = maker(tmp_path, Containerd(), None)
    one._containerd = cast(Any, SimpleNamespace(task=task))
    assert (await one.is_here(), await one.has_ended()) == (here, ended)


# The starter.


class StarterContainerd(Containerd):
    """What the starter speaks with."""

    def __enter__(self) -> StarterContainerd:
        return self

    def __exit__(self, *_: object) -> None:
        self.said.append("closed")

    def container(self, id: str) -> Any:
        self._call("container", id)
        return JOB

    def mounts(self, snapshotter: str, key: str) -> str:
        self._call("mounts", snapshotter, key)
        return "mounts"

    def create_task(self, id: str, mounts: str, stdio: Stdio, *, timeout: float) -> None:
        self._call("create_task", id, mounts, stdio.stdout, timeout)

    def start_task(self, id: str) -> int:
        self._call("start_task", id)
        if "broken" in self._lacks:
            raise RuntimeError("not one of ours")
        return 77


@pytest.mark.parametrize(
    ("lacks", "answer"),
    [((), {"pid": 77}), (("container",), "PF"), (("broken",), "the starter failed")],
)
def test_the_starter_says_how_it_ended(
    lacks: tuple[str, ...], answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    containerd = StarterContainerd(*lacks)
    monkeypatch.setattr(starter, "Containerd", lambda socket, namespace: containerd)
    request, result = tmp_path / "start.json", tmp_path / "started.json"
    stdio = {"stdin": "", "stdout": "file:///log", "stderr": "", "terminal": False}
    request.write_text(
        json.dumps({"socket": "/s", "namespace": "default", "id": "job", "stdio": stdio, "timeout": 60.0})
    )
    monkeypatch.setattr("sys.argv", ["starter", str(request), str(result)])
    with pytest.raises(SystemExit) as ended:
        starter.main()
    told = json.loads(result.read_text())
    if lacks:
        assert answer in json.dumps(told["error"])
        assert ended.value.code
    else:
        assert (told, not ended.value.code) == (answer, True)
        assert containerd.said == [
            "container job",
            "mounts overlayfs job",
            "create_task job mounts file:///log 60.0",
            "start_task job",
            "closed",
        ]


def test_a_group_that_cannot_be_thawed_is_still_owed(tmp_path: Path) -> None:
    cgroup = made(tmp_path / "group")
    with pytest.raises(CgroupFailed), frozen.unless_gone(cgroup):
        raise CgroupFailed("busy")
    with frozen.unless_gone(Cgroup(*[tmp_path / "gone"] * 3)):
        raise CgroupFailed("gone")
