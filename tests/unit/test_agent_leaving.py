"""What a leaving container holds is taken back, or said to be held still: a job must not stay frozen in silence."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from podferry.agent.config import Config
from podferry.agent.journal import Journal
from podferry.agent.leaving import Leaving, Remains, handlers
from podferry.agent.offered import Offered
from podferry.agent.ports import OriginalGone
from podferry.core.undo import Ledger
from podferry.errors import PodferryError
from podferry.memory.tracker import Kind
from podferry.node.cgroup import Cgroup, CgroupFailed, CpuQuota
from podferry.node.checkpoint import Hold
from podferry.node.containerd import ContainerdFailed, NotFound
from podferry.node.records import Container, Opaque, Status, Task

pytestmark = [pytest.mark.unit, pytest.mark.anyio]
JOB = Container("job", "image", "overlayfs", "job", Opaque("spec", b"{}"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def files(cgroup: Cgroup) -> dict[str, Path]:
    """Which file of the group each kind of entry writes to."""
    return {"freeze": cgroup.freezer / "freezer.state", "hold": cgroup.freezer / "freezer.state"} | {
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
    if kind == "hold":
        hold = Hold("job", cgroup, tmp_path / "work")
        hold.waits = True
        return hold.to_dict()
    return {"cgroup": cgroup.to_dict(), "quota": CpuQuota().to_dict()}


@pytest.mark.parametrize("kind", ["freeze", "hold", "quota"])
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


@pytest.mark.parametrize("kind", ["freeze", "hold", "quota"])
async def test_what_went_with_its_container_needs_nothing(kind: str, tmp_path: Path) -> None:
    cgroup = Cgroup(*[tmp_path / "group"] * 3)
    ledger = Ledger()
    ledger.add(kind, facts(kind, cgroup, tmp_path))
    assert await ledger.unwind(handlers()) == []


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (NotFound("no task"), OriginalGone),
        (Status.STOPPED, OriginalGone),
        (Status.RUNNING, CgroupFailed),
        (ContainerdFailed("it is not there yet"), CgroupFailed),
    ],
)
def test_an_original_that_its_node_forgot_owes_no_memory(
    said: Status | ContainerdFailed, error: type[PodferryError], tmp_path: Path
) -> None:
    """The node was switched off, say: runc has no state of it, and containerd, once it is there, no task."""

    def task(id: str) -> Task:
        if isinstance(said, ContainerdFailed):
            raise said
        return Task(id, 1, said)

    containerd = SimpleNamespace(runc_root=lambda record: tmp_path, task=task)
    with pytest.raises(error) as caught:
        Remains(Journal(tmp_path / "journal"), containerd, Offered(JOB, ())).owed()  # type: ignore[arg-type]
    assert type(caught.value) is error


def test_a_job_that_is_paused_for_a_look_is_in_the_ledger_until_it_runs_again(tmp_path: Path) -> None:
    """An agent that is killed at that moment, or a thaw that fails, must not leave it frozen."""
    cgroup = made(tmp_path / "group")
    (tmp_path / "runc/job").mkdir(parents=True)
    (tmp_path / "runc/job/state.json").write_text(json.dumps({"cgroup_paths": {"freezer": str(cgroup.freezer)}}))
    (tmp_path / "upper").mkdir()
    journal = Journal(tmp_path / "journal")
    job = Leaving(
        Config("a", "a:1", tmp_path, {}, run=tmp_path, state=tmp_path),
        SimpleNamespace(runc_root=lambda record: tmp_path / "runc"),  # type: ignore[arg-type]
        journal,
        offered=Offered(JOB, ()),
        task=Task("job", 1, Status.RUNNING),
        upper=tmp_path / "upper",
        kind=Kind.SOFT_DIRTY,
    )
    with job._paused():
        assert Journal(tmp_path / "journal").held("freeze") == {"cgroup": Cgroup(cgroup.freezer).to_dict()}
        assert files(cgroup)["freeze"].read_text() == "FROZEN"
    assert files(cgroup)["freeze"].read_text() == "THAWED"
    assert journal.held("freeze") is None
    with pytest.raises(CgroupFailed), job._paused():
        files(cgroup)["freeze"].unlink()
        files(cgroup)["freeze"].mkdir()
    assert journal.held("freeze") is not None
    assert issubclass(CgroupFailed, PodferryError)
