"""Whatever breaks, wherever: one job, that executes on one node at a time, all of it, and nothing left behind.

The points are those that migrations pass which nothing disturbs, or one fault: each method of the ports, each line of the
journals, each thing that is taken back, each gate. A new port method is among them by itself. `Rig.check` holds the rules.
"""

from __future__ import annotations

import errno
import tempfile
from functools import cache
from pathlib import Path

import pytest
from agent_rig import Act, Cut, Fault, Rig, cancel, crash, die, fail, lose, methods, oserror, stall, stop, unique

from podferry.core.phases import SourceEvent, SourcePhase, TargetPhase
from podferry.engine import side
from podferry.engine.ports import FrozenSource, JobDied, SourceJob, TargetJob
from podferry.errors import Cancelled, PeerLost
from podferry.model import Mode

pytestmark = pytest.mark.unit

RUNS: dict[str, tuple[Mode, list[Fault], Cut | None]] = {
    "stop": (Mode.STOP, [], None),
    "live": (Mode.LIVE, [], None),
    "postcopy": (Mode.POSTCOPY, [], None),
    "undo": (Mode.LIVE, [Fault("target", "verify", fail)], None),
    "gave-up": (Mode.STOP, [Fault("target", "release", fail)], None),
    "source again": (Mode.STOP, [Fault("source", "breakpoint resume", die)], None),
    "source again, owing": (Mode.POSTCOPY, [Fault("source", "breakpoint serve", die)], None),
    "target again": (Mode.STOP, [Fault("target", "breakpoint resume", die)], None),
    "target again, filling": (Mode.POSTCOPY, [Fault("target", "breakpoint fill", die)], None),
    "died": (Mode.STOP, [Fault("target", "filled", fail)], None),
}
Point = tuple[str, str, str]


def rig_of(run: str, directory: Path, *faults: Fault, cut: Cut | None = None) -> tuple[Rig, Mode]:
    mode, first, usual = RUNS[run]
    return Rig(directory, [*first, *faults], cut or usual, resolve=SourceEvent.RESOLVED_HERE), mode


@cache
def undisturbed(run: str) -> Rig:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        rig, mode = rig_of(run, Path(directory))
        return rig.move(mode, patch)


@cache
def points() -> list[Point]:
    """Where each run passes; those with a fault of their own only where the others do not."""
    found: list[Point] = []
    for run, (_, faults, _) in RUNS.items():
        known = {(side, name) for _, side, name in found} if faults else set()
        found += [(run, *point) for point in unique(undisturbed(run).trace) if point not in known]
    return found


def awaited(*runs: str) -> list[Point]:
    return [point for point in points() if point[0] in runs and point[1:] in undisturbed(point[0]).awaited]


def test_every_method_of_the_ports_is_among_the_points() -> None:
    there = {(side, name) for _, side, name in points()}
    ports = {"source": methods(SourceJob, FrozenSource), "target": methods(TargetJob)}
    assert {(side, name) for side, names in ports.items() for name in names} - there == {
        ("source", "throttle"),
        ("source", "abandon"),  # of a pod that keeps its name: test_agent_pods
        ("target", "makes_after_go"),  # says a fact, and does nothing
    }


def move(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *faults: Fault, cut: Cut | None = None) -> Rig:
    rig, mode = rig_of(run, tmp_path, *faults, cut=cut)
    return rig.move(mode, monkeypatch)


def act_for(name: str) -> Act:
    """A full disk for what is written, a broken tool for everything else."""
    return oserror if name.startswith(("line", "record")) else fail


@pytest.mark.parametrize(("run", "side", "name"), points())
def test_an_agent_dies_before(run: str, side: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = move(run, tmp_path, monkeypatch, Fault(side, name, die))
    assert not rig.helped


@pytest.mark.parametrize(("run", "side", "name"), awaited("live", "postcopy"))
def test_an_agent_dies_after(run: str, side: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = move(run, tmp_path, monkeypatch, Fault(side, name, die, "after"))
    assert not rig.helped


def effects() -> list[Point]:
    """All but the breakpoints, where nothing can fail."""
    return [point for point in points() if point[0] != "stop" and not point[2].startswith("breakpoint")]


@pytest.mark.parametrize(("run", "side", "name"), effects())
def test_an_effect_fails(run: str, side: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written down past GO waits for the agent's next start; a job that died on the target for a person."""
    rig = move(run, tmp_path, monkeypatch, Fault(side, name, act_for(name)))
    cannot_write = name.startswith(("line", "record")) and rig.passed_the_right
    assert not rig.helped or cannot_write or rig.phase("b") == TargetPhase.DIED


def test_what_the_target_breaks_off_is_not_said_to_be_cancelled_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_off(rig: Rig) -> None:
        raise Cancelled("nobody waits any more")

    rig = move("live", tmp_path, monkeypatch, Fault("target", "make_ready", broken_off))
    assert (rig.phase("a"), rig.records["a"]["outcome"]) == (SourcePhase.ROLLED_BACK, "rolled-back")


@pytest.mark.parametrize(
    ("side", "name"), [("source", "dump"), ("target", "verify"), ("source", "line acquire freeze.0")]
)
def test_a_full_disk_is_told_as_such(side: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no bug of ours, and whose it is can do something about it."""

    def no_room(rig: Rig) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/var/lib/podferry")

    rig = move("live", tmp_path, monkeypatch, Fault(side, name, no_room))
    assert rig.fired, name
    said = rig.records["a"]["error"]
    assert said["what"] == f"a file system of the {side}'s node has no room"
    assert "make room" in said["remedy"]


def test_a_job_that_has_run_to_an_end_on_the_target_is_not_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One container of a pod ended, say, and another could not be restored: only a person may run it a second time."""

    def died(rig: Rig) -> None:
        raise JobDied("it ran, and cannot go on")

    rig = move("stop", tmp_path, monkeypatch, Fault("target", "release", died))
    assert (rig.phase("b"), rig.records["b"]["outcome"]) == (TargetPhase.DIED, "failed")
    assert SourcePhase.LOST in rig.phases("a")
    assert rig.helped


HALF_FILLED = [("source", "breakpoint serve"), ("target", "breakpoint fill"), ("target", "filled")]


@pytest.mark.parametrize(("side", "name"), HALF_FILLED)
def test_a_job_dies_on_the_target_before_it_has_all_its_memory(
    side: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the lazy-pages daemon owes it nothing more does not mean that it runs. Only a person can take it back to where
    it was frozen."""
    rig = move("postcopy", tmp_path, monkeypatch, Fault(side, name, crash))
    assert (rig.phase("b"), rig.records["b"]["outcome"]) == (TargetPhase.DIED, "failed")
    assert "before all of its memory had arrived" in rig.records["b"]["reason"]
    assert SourcePhase.LOST in rig.phases("a")
    assert (rig.phase("a"), rig.helped) == (SourcePhase.ROLLED_BACK, True)
    assert not [error for error in rig.agents["b"].errors if not isinstance(error, PeerLost)]


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("source", "breakpoint serve", lose)],
        [Fault("target", "breakpoint fill", lose)],
        [Fault("source", "breakpoint serve", lose), Fault("source", "breakpoint serve", die)],
        [Fault("source", "breakpoint serve", die), Fault("source", "breakpoint lost-contact", lose)],
        [Fault("source", "breakpoint serve", lose), Fault("target", "filled", die)],
        [
            Fault("source", "breakpoint serve", die),
            Fault("source", "breakpoint lost-contact", lose),
            Fault("target", "filled", crash),
        ],
    ],
    ids=["serve", "fill", "with its agent", "before its agent is back", "both agents", "both jobs"],
)
def test_the_frozen_original_ends_before_the_target_has_all_memory(
    faults: list[Fault], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node was switched off and is back, say. The job dies of it, on both nodes and without a person: what it lacks must not
    be taken for zeros."""
    rig = move("postcopy", tmp_path, monkeypatch, *faults)
    assert (rig.phase("a"), rig.phase("b"), rig.helped) == (SourcePhase.FAILED, TargetPhase.DIED, False)
    assert [rig.records[node]["outcome"] for node in ("a", "b")] == ["failed", "failed"]
    assert "died on the target" in rig.records["a"]["reason"]
    assert not rig.target.executing


@pytest.mark.parametrize("kind", ["freeze", "held-dump"])
def test_what_cannot_be_taken_back_is_said_and_tried_again_at_the_next_start(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that stays frozen since the cgroup cannot be thawed, say, until somebody has seen to it."""
    tries = 1 + len(side.UNDO_PAUSES)
    broken = [Fault("source", f"undo {kind}", fail, nth=nth + 1) for nth in range(tries)]
    rig = move("undo", tmp_path, monkeypatch, *broken, Fault("source", "line phase failed", die, "after"))
    assert not rig.helped
    assert rig.phase("a") == SourcePhase.FAILED
    assert rig.passed["source", f"undo {kind}", "before"] == tries + 1
    assert rig.source.executing
    assert rig.records["a"]["leftovers"] == []


@pytest.mark.parametrize(("run", "side", "name"), awaited("live", "postcopy"))
def test_an_agent_is_stopped(run: str, side: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = move(run, tmp_path, monkeypatch, Fault(side, name, stop))
    assert not rig.helped


@pytest.mark.parametrize(("run", "side", "name"), [point for point in points() if point[0] == "live"])
def test_somebody_cancels(run: str, side: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = move(run, tmp_path, monkeypatch, Fault(side, name, cancel))
    assert rig.phase("a") == (SourcePhase.COMPLETED if rig.passed_the_right else SourcePhase.CANCELLED)
    assert not rig.helped


@pytest.mark.parametrize(("run", "side", "name"), awaited("live", "postcopy"))
def test_an_effect_never_ends(run: str, side: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before GO a deadline ends it; after it, only the end of the agent does."""
    rig = move(run, tmp_path, monkeypatch, Fault(side, name, stall))
    assert not rig.helped or rig.passed_the_right


MESSAGES = [
    (run, side, number + 1)
    for run in ("stop", "live", "postcopy")
    for side in ("source", "target")
    for number in range(undisturbed(run).count(side))
]


@pytest.mark.parametrize(("run", "side", "number"), MESSAGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_link_is_cut(
    run: str, side: str, number: int, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = move(run, tmp_path, monkeypatch, cut=Cut(side, number, when))
    assert rig.was_cut
    assert not rig.helped
    if rig.passed_the_right and rig.phase("b") != TargetPhase.GAVE_UP:
        assert rig.phase("a") == SourcePhase.COMPLETED
