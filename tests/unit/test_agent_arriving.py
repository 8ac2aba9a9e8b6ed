"""What an arriving container makes of what the page feeder and containerd say of it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from podferry.agent.arriving import FEEDER_STATUS, LOOK_AT_JOB_EVERY, Arriving
from podferry.agent.config import Config
from podferry.agent.journal import Journal
from podferry.agent.offered import Offered
from podferry.errors import Failed
from podferry.node.checkpoint import Process
from podferry.node.containerd import NotFound
from podferry.node.records import Container, Opaque, Status, Task

pytestmark = [pytest.mark.unit, pytest.mark.anyio]
JOB = Container("job", "image", "overlayfs", "job", Opaque("spec", b"{}"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Containerd:
    """Knows a task of this status, or none."""

    status: Status | None

    def task(self, id: str) -> Task:
        if self.status is None:
            raise NotFound(f"no task {id}")
        return Task(id, 1, self.status)


def arriving(tmp_path: Path, status: Status | None, *, postcopy: bool) -> tuple[Arriving, Journal]:
    """A container whose page feeder is done, since it put every page in place, or since nobody is left to lack any."""
    journal = Journal(tmp_path / "m1")
    journal.note(postcopy=postcopy)
    for kind in ("container", "snapshot", "task", "log", "restored", "feeder"):
        journal.acquire(kind, pid=1, started=-1)
    config = Config("b", "b:1", tmp_path, {}, run=tmp_path, state=tmp_path)
    job = Arriving(config, Containerd(status), journal, Offered(JOB, ()))  # type: ignore[arg-type]
    job.scratch.mkdir(parents=True)
    (job.scratch / FEEDER_STATUS).write_text(json.dumps({"state": "done", "faults": 3}))
    return job, journal


@pytest.mark.parametrize("status", [Status.RUNNING, Status.STOPPED])
async def test_a_job_that_has_all_its_memory_or_ended_by_itself_is_containerds(status: Status, tmp_path: Path) -> None:
    job, journal = arriving(tmp_path, status, postcopy=True)
    assert await job.filled() == {"faults": 3}
    assert [entry.kind for entry in journal.ledger.entries] == ["feeder"]


async def test_a_job_that_is_gone_before_it_has_all_its_memory_has_died(tmp_path: Path) -> None:
    """Its shim was killed, say. Nothing of it is let go of: the ledger takes all of it back."""
    job, journal = arriving(tmp_path, None, postcopy=True)
    with pytest.raises(Failed, match="had not all its memory"):
        await job.filled()
    assert len(journal.ledger.entries) == 6
    assert "filled" not in journal.facts


@pytest.mark.parametrize("status", [None, Status.STOPPED])
async def test_a_job_that_ends_while_nobody_sends_its_pages_is_not_waited_for(
    status: Status | None, tmp_path: Path
) -> None:
    """The page feeder only notices that when it has a page to give."""
    job, journal = arriving(tmp_path, Status.RUNNING, postcopy=True)
    (job.scratch / FEEDER_STATUS).write_text(json.dumps({"state": "filling"}))
    this = Process.of(os.getpid())
    assert this is not None
    journal.acquire("feeder", pid=this.pid, started=this.started)
    with pytest.raises(TimeoutError), anyio.fail_after(2 * LOOK_AT_JOB_EVERY):
        await job.filled()
    job._containerd.status = status  # type: ignore[attr-defined]
    if status is None:
        with pytest.raises(Failed, match="had not all its memory"):
            await job.filled()
    else:
        assert await job.filled() == {}
        assert [entry.kind for entry in journal.ledger.entries] == ["feeder"]


async def test_where_all_memory_came_before_the_resume_a_job_that_is_gone_died_as_any_job_does(tmp_path: Path) -> None:
    job, journal = arriving(tmp_path, None, postcopy=False)
    assert await job.filled() == {"faults": 3}
    assert [entry.kind for entry in journal.ledger.entries] == ["feeder"]
