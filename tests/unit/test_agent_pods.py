"""Pods of fake containers: they move whole or not at all, whatever breaks in one of them."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest
from agent_pods import PodRig
from agent_rig import Act, Fault, cancel, die, end_by_itself, fail, unique

from podferry.core.phases import SourceEvent, SourcePhase
from podferry.model import Mode

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("mode", Mode)
def test_a_pod_moves_whole(mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = PodRig(tmp_path)
    rig.move(mode, monkeypatch)
    assert rig.phase("a") == SourcePhase.COMPLETED
    assert rig.handed_over == ["m"]
    assert rig.given_back == []
    assert all(node.marked for node in rig.target.nodes)  # type: ignore[attr-defined]


def test_where_the_second_container_cannot_be_restored_the_first_is_killed_before_the_word_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = PodRig(tmp_path, [Fault("target", "1 release", fail)])
    rig.move(Mode.LIVE, monkeypatch)
    assert rig.phase("a") == SourcePhase.ROLLED_BACK
    assert rig.passed_the_right
    assert len(rig.given_back) == 1


def test_one_container_that_ends_ends_the_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = PodRig(tmp_path, [Fault("source", "breakpoint prepare-target", end_by_itself)])
    rig.move(Mode.LIVE, monkeypatch)
    assert "container 1: exit status 3" in rig.records["a"]["reason"]


def test_a_container_that_cannot_have_its_memory_has_crashed_and_the_pod_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = PodRig(tmp_path, [Fault("target", "1 filled", fail)])
    rig.move(Mode.LIVE, monkeypatch)
    assert rig.phase("a") == SourcePhase.COMPLETED
    assert [node.running for node in rig.target.nodes] == [True, False]  # type: ignore[attr-defined]
    assert rig.given_back == []
    assert "asked for" in rig.records["b"]["fill"]["containers"][1]["failed"]


@cache
def points(mode: Mode, *, keeps: bool = False) -> list[tuple[str, str]]:
    """Where a pod's move passes that a container's does not."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        rig = PodRig(Path(directory), keeps=keeps)
        rig.move(mode, patch)
        return [
            (side, name)
            for side, name in unique(rig.trace)
            if name.startswith("1 ")
            or name in ("target_pod", "hand_over", "release", "commit", "freeze", "dump", "make_ready", "make_late")
        ]


EVERYWHERE = [(mode, side, name) for mode in (Mode.LIVE, Mode.POSTCOPY) for side, name in points(mode)]


@pytest.mark.parametrize("act", [fail, die, cancel], ids=lambda act: act.__name__)
@pytest.mark.parametrize(("mode", "side", "name"), EVERYWHERE)
@pytest.mark.parametrize("when", ["before", "after"])
def test_whatever_breaks_all_of_it_runs_on_one_node(
    mode: Mode, side: str, name: str, when: str, act: Act, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = PodRig(tmp_path, [Fault(side, name, act, when)], resolve=SourceEvent.RESOLVED_HERE)
    rig.move(mode, monkeypatch)


# A pod that keeps its name: the target's is made after GO, when the source's object is gone.


def test_a_pod_that_keeps_its_name_is_made_after_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = PodRig(tmp_path, keeps=True)
    rig.move(Mode.LIVE, monkeypatch)
    assert rig.phase("a") == SourcePhase.COMPLETED
    assert rig.was_replaced
    passed = unique(rig.trace)
    assert (
        passed.index(("target", "verify"))
        < passed.index(("target", "target_pod"))
        < passed.index(("target", "release"))
    )
    assert not list(rig.configs["b"].incoming.iterdir()), "podferry-runc still finds a way in"


@pytest.mark.parametrize("point", ["make_late", "release", "1 release"])
def test_what_cannot_run_there_any_more_is_killed_here_once_its_object_is_gone(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = PodRig(tmp_path, [Fault("target", point, fail, "after" if point == "make_late" else "before")], keeps=True)
    rig.move(Mode.LIVE, monkeypatch)
    assert rig.phase("a") == SourcePhase.FAILED
    assert rig.was_replaced
    assert not rig.source.alive
    assert "the job is lost" in rig.records["a"]["reason"]
    assert len(rig.given_back) == 1


def test_a_job_goes_on_where_its_object_is_still_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = PodRig(tmp_path, [Fault("target", "make_late", fail)], keeps=True)
    rig.move(Mode.LIVE, monkeypatch)
    assert rig.phase("a") == SourcePhase.ROLLED_BACK
    assert rig.passed_the_right
    assert not rig.was_replaced
    assert rig.source.executing


@pytest.mark.parametrize("act", [fail, die, cancel], ids=lambda act: act.__name__)
@pytest.mark.parametrize(("side", "name"), points(Mode.LIVE, keeps=True))
@pytest.mark.parametrize("when", ["before", "after"])
def test_whatever_breaks_a_pod_that_keeps_its_name_runs_on_one_node_or_none(
    side: str, name: str, when: str, act: Act, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = PodRig(tmp_path, [Fault(side, name, act, when)], resolve=SourceEvent.RESOLVED_HERE, keeps=True)
    rig.move(Mode.LIVE, monkeypatch)
    runs = rig.source.executing or rig.target.executing
    assert runs or rig.was_replaced, "before its object is gone no failure may end the job"
