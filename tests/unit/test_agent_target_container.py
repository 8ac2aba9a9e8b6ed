"""What an arriving container makes of what the lazy-pages daemon and containerd say of it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from podferry.criu.processes import Process
from podferry.engine.journal import Journal, Part
from podferry.errors import Failed
from podferry.node.containerd_errors import ContainerdNotFound, ContainerdUnreachable
from podferry.node.records import Container, Opaque, Task, TaskStatus
from podferry.workload import helpers
from podferry.workload.config import Config
from podferry.workload.lazypages_process import DAEMON_STATUS
from podferry.workload.makers.containerd import ContainerdContainer
from podferry.workload.offered import OfferedContainer
from podferry.workload.target_container import POLL_JOB_INTERVAL, TargetContainer

pytestmark = [pytest.mark.unit, pytest.mark.anyio]
JOB = Container("job", "image", "overlayfs", "job", Opaque("spec", b"{}"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Containerd:
    """Knows a task of this status, or none. It does not answer `away` times."""

    status: TaskStatus | None
    away: int = 0

    def task(self, id: str) -> Task:
        if self.away:
            self.away -= 1
            raise ContainerdUnreachable("nothing answers")
        if self.status is None:
            raise ContainerdNotFound(f"no task {id}")
        return Task(id, 1, self.status)


def held(journal: Part) -> list[str]:
    return [entry.kind for entry in journal._journal.ledger.entries]


def arriving(tmp_path: Path, status: TaskStatus | None, *, postcopy: bool) -> tuple[TargetContainer, Part]:
    """A container whose lazy-pages daemon is done, since it put every page in place, or since nobody is left to lack any."""
    journal = Part(Journal(tmp_path / "m1"), 0)
    journal.note(postcopy=postcopy)
    for kind in ("container", "snapshot", "task", "log", "restored", "lazy-pages-daemon"):
        journal.acquire(kind, pid=1, started=-1)
    config = Config("b", "b:1", tmp_path, {}, run=tmp_path, state=tmp_path)
    maker = ContainerdContainer(config, Containerd(status), OfferedContainer(JOB, ()))  # type: ignore[arg-type]
    job = TargetContainer(config, Containerd(status), journal, maker)  # type: ignore[arg-type]
    job.scratch.mkdir(parents=True)
    (job.scratch / DAEMON_STATUS).write_text(json.dumps({"state": "done", "faults": 3}))
    return job, journal


@pytest.mark.parametrize("status", [TaskStatus.RUNNING, TaskStatus.STOPPED])
async def test_a_job_that_has_all_its_memory_or_ended_by_itself_is_containerds(
    status: TaskStatus, tmp_path: Path
) -> None:
    job, journal = arriving(tmp_path, status, postcopy=True)
    assert await job.filled() == {"faults": 3}
    job.entrust()
    assert held(journal) == ["lazy-pages-daemon.0"]


async def test_a_job_that_is_gone_before_it_has_all_its_memory_has_died(tmp_path: Path) -> None:
    """Its shim was killed, say. Nothing of it is let go of: the ledger takes all of it back."""
    job, journal = arriving(tmp_path, None, postcopy=True)
    with pytest.raises(Failed, match="before all of its memory had arrived"):
        await job.filled()
    assert len(held(journal)) == 6
    assert "filled" not in journal.facts


async def test_a_job_of_which_containerd_says_nothing_is_not_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restarted agent asks for it, and containerd starts anew, too: what runs here is the only copy."""
    monkeypatch.setattr(helpers, "ASK_AGAIN", 0.0)
    job, _ = arriving(tmp_path, TaskStatus.RUNNING, postcopy=True)
    (job.scratch / DAEMON_STATUS).write_text(json.dumps({"state": "done", "resumed_ns": 5_000_000_000}))
    job.maker._containerd.away = 3  # type: ignore[attr-defined]
    assert await job.resumed() == 5.0
    job.maker._containerd.away = 3  # type: ignore[attr-defined]
    assert (await job.filled())["resumed_ns"] == 5_000_000_000
    job.maker._containerd.away, job.maker._containerd.status = 3, None  # type: ignore[attr-defined]
    with pytest.raises(Failed, match="is gone"):
        await job.resumed()


@pytest.mark.parametrize("status", [None, TaskStatus.STOPPED])
async def test_a_job_that_ends_while_nobody_sends_its_pages_is_not_waited_for(
    status: TaskStatus | None, tmp_path: Path
) -> None:
    """The lazy-pages daemon only notices that when it has a page to give."""
    job, journal = arriving(tmp_path, TaskStatus.RUNNING, postcopy=True)
    (job.scratch / DAEMON_STATUS).write_text(json.dumps({"state": "filling"}))
    this = Process.of(os.getpid())
    assert this is not None
    journal.acquire("lazy-pages-daemon", pid=this.pid, started=this.started)
    with pytest.raises(TimeoutError), anyio.fail_after(2 * POLL_JOB_INTERVAL):
        await job.filled()
    job.maker._containerd.status = status  # type: ignore[attr-defined]
    if status is None:
        with pytest.raises(Failed, match="before all of its memory had arrived"):
            await job.filled()
    else:
        assert await job.filled() == {}
        job.entrust()
        assert held(journal) == ["lazy-pages-daemon.0"]


async def test_where_all_memory_came_before_the_resume_a_job_that_is_gone_died_as_any_job_does(tmp_path: Path) -> None:
    job, journal = arriving(tmp_path, None, postcopy=False)
    assert await job.filled() == {"faults": 3}
    job.entrust()
    assert held(journal) == ["lazy-pages-daemon.0"]


def restored(tmp_path: Path, log: str, started: dict[str, object]) -> TargetContainer:
    """A container that was released, whose restore is over: CRIU has left `log`, containerd's answer was `started`."""
    job, journal = arriving(tmp_path, TaskStatus.STOPPED, postcopy=False)
    journal.note(released=True)
    work = tmp_path / "incoming/job/work"
    work.mkdir(parents=True)
    (work / "restore.log").write_text(log)
    (job.scratch / DAEMON_STATUS).write_text(json.dumps({"state": "done", "resumed_ns": 5_000_000_000}))
    (job.scratch / "started.json").write_text(json.dumps(started))
    return job


REFUSED_TO_START = {"error": Failed("cannot start a stopped process").to_dict()}
BEGUN = "(0.1) Running pre-restore scripts\n"
RESUMED = BEGUN + "(0.2) Running pre-resume scripts\n"


async def test_a_job_that_ended_before_containerd_could_start_it_has_run(tmp_path: Path) -> None:
    """By what CRIU says, not by whether it is still there: else the source would run it a second time."""
    assert await restored(tmp_path, RESUMED, REFUSED_TO_START).release() == 5.0


async def test_a_job_whose_agent_and_starter_died_as_it_resumed_has_run(tmp_path: Path) -> None:
    job = restored(tmp_path, RESUMED, {})
    (job.scratch / "started.json").unlink()
    assert await job.release() == 5.0


async def test_a_job_that_criu_did_not_let_go_of_has_not_run(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="the restore of job failed"):
        await restored(tmp_path, BEGUN, REFUSED_TO_START).release()
