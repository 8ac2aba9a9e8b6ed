"""A rehearsal over fakes: the job stands still for its dump alone and goes on, whatever breaks; nothing ever runs on the target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from agent_rig import LIFE, NAME, Cut, Fault, Rig, die, end_by_itself, fail, stall, unique

from podferry.core.phases import SOURCE_ENDS, SourcePhase, TargetPhase
from podferry.engine.order import Order
from podferry.engine.ports import Images
from podferry.engine.rehearsal import REHEARSAL, SMALL, Rehearsal, RehearsalAlone, forecast, told, without_memory
from podferry.errors import PodferryError
from podferry.model import Mode
from podferry.wire.messages import Go

pytestmark = pytest.mark.unit


class Stage(Rig):
    """Two agents, and a job that is rehearsed where others are moved."""

    half: type[Rehearsal] = Rehearsal

    async def _ask(self, order: Order) -> None:
        agent = self.agents["a"]
        LIFE.set(agent.life)
        try:
            agent._set_out(NAME, "b", order, self.half)
        except (OSError, PodferryError):
            self.told()


def rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *faults: Fault, **more: Any) -> Stage:
    stage = Stage(tmp_path, list(faults), order=REHEARSAL, **more)
    stage.move(Mode.STOP, monkeypatch)
    return stage


def test_a_job_goes_on_before_its_images_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = rehearse(tmp_path, monkeypatch)
    record = stage.records["a"]
    assert (record["outcome"], stage.records["b"]["outcome"]) == ("rehearsed", "rehearsed")
    assert stage.phases("b") == ["receive", "prepared", "ready", "giving-up", "gave-up"]
    assert (record["memory_bytes"], record["upper_bytes"], record["downtime_ms"]) == (0, 0, None)
    steps = [span["name"] for span in record["spans"]]
    assert steps.index("freeze") < steps.index("dump") < steps.index("go on") < steps.index("send images")
    answer = told(record)
    assert set(answer) == {"rehearsal"}
    assert {"stood_still_ms", "forecast_ms", "written_bytes", "image_bytes"} <= set(answer["rehearsal"])
    assert stage.source.executing
    assert ("source", "Go") not in stage.messages


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    with pytest.MonkeyPatch.context() as patch:
        return rehearse(tmp_path_factory.mktemp("pilot"), patch)


@pytest.mark.parametrize("act", [fail, die, stall, end_by_itself], ids=lambda act: act.__name__)
def test_whatever_breaks_the_job_runs_on(
    act: Callable[[Rig], Any], pilot: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every point that a rehearsal passes, on both sides. The rig's rules hold: it ends, and leaves nothing behind."""
    points = unique(pilot.trace)
    assert len(points) > 30
    for number, (side, name) in enumerate(points):
        if act is stall and (side, name) not in pilot.awaited:
            continue
        if act is not die and (name.startswith(("undo", "line")) or name in ("record", "close")):
            continue
        stage = rehearse(tmp_path / str(number), monkeypatch, Fault(side, name, act))
        if act is not end_by_itself:
            assert stage.source.executing, (side, name)
        assert not stage.target.running
        assert stage.phase("a") in {*SOURCE_ENDS, ""} - {SourcePhase.COMPLETED}, (side, name)


def test_a_pod_is_rehearsed_without_anything_on_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stage, "half", RehearsalAlone)
    stage = rehearse(tmp_path, monkeypatch)
    assert stage.records["a"]["outcome"] == "rehearsed"
    assert told(stage.records["a"])["rehearsal"]["forecast_ms"] >= 0
    assert stage.phases("b") == []
    assert stage.source.executing
    assert [name for _, name in stage.messages] == ["Offer", "Accept", "Abort", "GaveUp"]


def test_a_cut_link_is_the_reason_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 4):
        stage = rehearse(tmp_path / str(number), monkeypatch, cut=Cut("source", number))
        assert stage.was_cut
        assert stage.source.executing
        assert (stage.phase("a"), told(stage.records["a"])["movable"]) == (SourcePhase.ROLLED_BACK, False)


def test_a_dump_that_fails_is_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = rehearse(tmp_path, monkeypatch, Fault("source", "dump", fail))
    answer = told(stage.records["a"])
    assert answer["movable"] is False
    assert answer["refusals"][0]["what"] == "a fault of the test's"
    assert answer["rehearsal"]["outcome"] == "rolled-back"
    assert stage.records["b"]["outcome"] == "rolled-back"


def test_the_target_takes_no_go_of_a_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go(self: Rehearsal, inbox: Any) -> None:
        await real(self, inbox)
        await inbox.channel.send(Go(self.record.id))
        await anyio.sleep(1.0)

    real = Rehearsal._have_judged
    monkeypatch.setattr(Rehearsal, "_have_judged", go)
    stage = rehearse(tmp_path, monkeypatch)
    assert not stage.target.running
    assert "resume" not in stage.phases("b")
    assert stage.phase("b") == TargetPhase.GAVE_UP


def test_memory_that_the_job_shares_stays(tmp_path: Path) -> None:
    large = tmp_path / "pages-shmem-7.img"
    large.write_bytes(bytes(SMALL + 1))
    files = tmp_path / "files.img"
    files.write_bytes(bytes(SMALL + 1))
    images: Images = {(0, large.name): large, (0, files.name): files, (0, "ghost-file-1.img"): b"small"}
    assert set(without_memory(images)) == {(0, "files.img"), (0, "ghost-file-1.img")}


def test_a_forecast_counts_a_restore_as_a_dump() -> None:
    assert forecast({"freeze": 5, "dump": 60, "send images": 10, "go on": 40}) == 135
