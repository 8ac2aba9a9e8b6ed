"""Who makes containers on the target, and what becomes of a wait for it that is broken off."""

from __future__ import annotations

import errno
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from podferry.criu.processes import Process
from podferry.engine.journal import Journal, Part
from podferry.errors import Failed
from podferry.node.records import Container, Opaque
from podferry.workload import lazypages_process
from podferry.workload.config import Config
from podferry.workload.helpers import start_helper
from podferry.workload.makers import containerd
from podferry.workload.makers.containerd import ContainerdContainer
from podferry.workload.makers.kubelet import STAND_IN, KubeletContainer, KubeletMaker, KubeletOwner
from podferry.workload.offered import OfferedContainer, PodPart

pytestmark = pytest.mark.unit
JOB = Container("job", "image", "overlayfs", "job", Opaque("spec", b"{}"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Incoming:
    """Nobody calls podferry-runc."""

    def __init__(self) -> None:
        self.abandoned = threading.Event()

    def wait_prepared(self, timeout: float) -> None:
        assert self.abandoned.wait(timeout)
        raise Failed("podferry-runc is not there")

    def abandon(self, reason: Exception | None = None) -> None:
        self.abandoned.set()


def test_a_helper_that_cannot_be_written_down_is_ended(tmp_path: Path) -> None:
    """On a full disk. It would go on after all else was taken back, and have containerd make the task then."""

    def no_room(kind: str, *, pid: int, started: int) -> None:
        found.append(Process(pid, started))
        raise OSError(errno.ENOSPC, "No space left on device")

    found: list[Process] = []
    journal: Any = SimpleNamespace(acquire=no_room)
    with pytest.raises(OSError, match="No space"):
        start_helper(journal, tmp_path, "starter", [sys.executable, "-c", "import time; time.sleep(60)"])
    assert [one.alive() for one in found] == [False]


@pytest.mark.anyio
@pytest.mark.parametrize("kubelet", [False, True])
async def test_a_wait_that_is_broken_off_is_no_failure_and_leaves_no_thread(
    kubelet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: int
) -> None:
    """Whoever broke it off knows why. An error in its place would be told as the reason: podferry-runc is not there."""
    journal, config = Part(Journal(tmp_path / "m"), 0), Config("b", "b:1", tmp_path, run=tmp_path, state=tmp_path)
    container: Any = SimpleNamespace(adopted=False, incoming=Incoming(), journal=journal, scratch=tmp_path)
    maker: Any = KubeletContainer(config, None, journal, PodPart("main", "c0", ()))  # type: ignore[arg-type]
    if not kubelet:
        monkeypatch.setattr(containerd, "start_helper", lambda *_: Process.of(process))
        maker = ContainerdContainer(config, None, OfferedContainer(JOB))  # type: ignore[arg-type]
    with anyio.move_on_after(0.1) as scope:
        await maker.make(container, 60.0)
    assert scope.cancelled_caught
    assert container.incoming.abandoned.is_set()
    assert maker.made_already is None


@pytest.mark.anyio
@pytest.mark.parametrize("postcopy", [False, True])
async def test_a_page_daemon_is_told_of_pages_that_come_afterwards_in_postcopy_only(
    postcopy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: int
) -> None:
    """Without its socket it would take what has not come for zeros; with one it would wait for what never comes."""
    started: list[list[Any]] = []
    this = Process.of(process)
    assert this is not None

    def start(journal: Part, scratch: Path, kind: str, argv: list[Any]) -> Process:
        started.append(argv)
        (scratch / "feeder.json").write_text('{"state": "listening"}')
        return this

    monkeypatch.setattr(lazypages_process, "start_helper", start)
    daemon = lazypages_process.LazyPagesProcess(Part(Journal(tmp_path / "m"), 0), tmp_path)
    incoming: Any = SimpleNamespace(work=tmp_path / "work", images=tmp_path / "images")
    await daemon.start(incoming, postcopy=postcopy)
    (argv,) = started
    assert ("--source" in argv) is postcopy
    assert (daemon.socket in argv) is postcopy


def test_a_pod_without_volumes_has_no_places_for_them(tmp_path: Path) -> None:
    journal, config = Journal(tmp_path / "m"), Config("b", "b:1", tmp_path, run=tmp_path, state=tmp_path)
    journal.note(target_pod="uid")
    maker = KubeletMaker(config, journal, None)  # type: ignore[arg-type]
    assert maker.places(JOB) == {}


@pytest.mark.anyio
@pytest.mark.parametrize("known", [False, True])
async def test_a_restored_container_of_a_pod_crashes_by_its_cgroup(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kubelet then does what it does for a container that crashed. One that was never made has nothing to kill."""
    killed: list[str] = []
    of = SimpleNamespace(of_container=lambda root, id: SimpleNamespace(kill=lambda: killed.append(f"{root}/{id}")))
    monkeypatch.setattr("podferry.workload.makers.kubelet.Cgroup", of)
    runtime: Any = SimpleNamespace(container=lambda id: id, runc_root=lambda record: "/run/runc")
    journal = Part(Journal(tmp_path / "m"), 0)
    if known:
        journal.note(container="c0ffee")
    config = Config("b", "b:1", tmp_path, run=tmp_path, state=tmp_path)
    await KubeletContainer(config, runtime, journal, PodPart("main", "c0", ())).crash()
    assert killed == (["/run/runc/c0ffee"] if known else [])


def test_a_lazy_pages_daemon_tells_when_the_tasks_ran_in_seconds_and_nothing_before(tmp_path: Path) -> None:
    daemon = lazypages_process.LazyPagesProcess(Part(Journal(tmp_path / "m"), 0), tmp_path)
    assert daemon.resumed_at() == 0.0
    status = tmp_path / lazypages_process.DAEMON_STATUS
    for text, seconds in (("{", 0.0), ('{"state": "listening"}', 0.0), ('{"resumed_ns": 2500000000}', 2.5)):
        status.write_text(text)
        assert daemon.resumed_at() == seconds


@pytest.mark.anyio
async def test_a_container_that_the_kubelet_made_is_in_the_journal_before_files_move_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that is killed in between must know which container's mark to remove, and that it was made."""
    monkeypatch.setattr("podferry.workload.makers.kubelet.refresh_root", lambda root: order.append(f"refreshed {root}"))
    order: list[str] = []
    journal = Part(Journal(tmp_path / "m"), 0)

    def move_to(upper: str) -> None:
        kept = Part(Journal(tmp_path / "m"), 0)
        order.append(f"moved to {upper}: {kept.held('restored')}, {kept.facts.get('container')}")

    runtime: Any = SimpleNamespace(container=lambda id: JOB, upper=lambda record: "upper", root=lambda record: "root")
    config = Config("b", "b:1", tmp_path, run=tmp_path, state=tmp_path)
    maker = KubeletContainer(config, runtime, journal, PodPart("main", "c0", ()))
    receiver = object()
    maker._staged = SimpleNamespace(move_to=move_to, receiver=receiver)  # type: ignore[assignment]
    incoming = SimpleNamespace(wait_prepared=lambda timeout: None, container="c0ffee")
    container: Any = SimpleNamespace(adopted=False, incoming=incoming, belongs_in=lambda record: None, upper=None)
    assert await maker.make(container, 60.0) is JOB
    assert order == ["moved to upper: {'key': 'c0ffee'}, c0ffee", "refreshed root"]
    assert (maker.made_already, container.upper) == (JOB, receiver)


@pytest.mark.anyio
async def test_a_container_whose_podferry_runc_ended_with_the_agent_before_is_not_waited_for(tmp_path: Path) -> None:
    config = Config("b", "b:1", tmp_path, run=tmp_path, state=tmp_path)
    maker = KubeletContainer(config, None, Part(Journal(tmp_path / "m"), 0), PodPart("main", "c0", ()))  # type: ignore[arg-type]
    with pytest.raises(Failed, match="the agent was restarted"):
        await maker.make(SimpleNamespace(adopted=True), 60.0)  # type: ignore[arg-type]


@pytest.mark.anyio
@pytest.mark.parametrize("stands_in", [False, True])
async def test_nobody_answers_probes_for_a_pod_that_has_moved(
    stands_in: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its entry goes, so that a later start of the agent does not kill another process for it."""
    killed: list[Any] = []
    monkeypatch.setattr("podferry.workload.makers.kubelet.kill_helper", killed.append)
    journal = Journal(tmp_path / "m")
    if stands_in:
        journal.acquire(STAND_IN, pid=7, started=8)
    owner: Any = SimpleNamespace(_journal=journal)
    await KubeletOwner.after_commit(owner, [])
    assert killed == ([{"pid": 7, "started": 8}] if stands_in else [])
    assert Journal(tmp_path / "m").held(STAND_IN) is None
