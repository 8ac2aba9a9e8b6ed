"""Whole migrations over fakes, and how they end where nothing breaks but somebody wants otherwise."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import agent_rig
import anyio
import pytest
import structlog
from agent_rig import NAME, Cut, Fault, Rig, cancel, end_by_itself, fail, order, oserror, refuse

from podferry.core.phases import SourceEvent, SourcePhase, TargetPhase
from podferry.core.precopy import Decision, Step
from podferry.engine import sending, side, target
from podferry.engine.journal import JOURNAL
from podferry.errors import Refused
from podferry.model import Mode
from podferry.node.records import Container, Opaque
from podferry.workload.offered import OfferedContainer

pytestmark = pytest.mark.unit


def test_each_line_of_the_log_names_the_migration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of helpers, too: what is bound where a half works is bound in all that it calls."""
    seen: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(
        side.metrics, "ended", lambda role, _: seen.update({role: structlog.contextvars.get_contextvars()})
    )
    rig = Rig(tmp_path).move(Mode.LIVE, monkeypatch)
    assert rig.phases("a")[-1] == "completed"
    (id,) = {one["migration"] for one in seen.values()}
    assert {role: (one["role"], one["job"]) for role, one in seen.items()} == {
        "source": ("source", NAME),
        "target": ("target", NAME),
    }
    assert id == rig.id


@pytest.mark.parametrize("mode", Mode)
def test_a_job_moves_whole(mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path).move(mode, monkeypatch)
    serve = ["serve"] if mode is Mode.POSTCOPY else []
    assert rig.phases("a") == [
        "check",
        "pre-copy",
        "prepare-target",
        "cut-over",
        "resume",
        *serve,
        "commit",
        "drain",
        "completed",
    ]
    assert rig.phases("b") == ["receive", "prepared", "ready", "resume", "fill", "done"]
    assert (rig.restarts, rig.helped) == (0, False)
    record = rig.records["a"]
    assert record["outcome"] == "completed"
    assert record["warnings"] == [f"{mode} is worth knowing"]
    assert (record["connections"], record["connections_total"]["closed"]) == ([], 0)
    assert record["differences"] == ["comm of 1/1: was a, is b"]
    assert record["downtime_ms"] is not None
    assert record["postcopy_dependency"] == (mode is Mode.POSTCOPY)
    assert (record["rounds"] > 1) == (mode is Mode.LIVE)
    assert {"freeze", "final scan", "dump", "downtime", "commit"} <= {span["name"] for span in record["spans"]}


@pytest.mark.parametrize("phase", ["pre-copy", "prepare-target", "cut-over"])
def test_a_job_that_ends_by_itself_leaves_nothing(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, [Fault("source", f"breakpoint {phase}", end_by_itself)]).move(Mode.LIVE, monkeypatch)
    assert rig.phase("a") == SourcePhase.FAILED
    assert "exit status 3" in rig.records["a"]["reason"]
    assert not rig.passed_the_right


def lose(rig: Rig) -> None:
    rig.target.lost.set()


def test_a_target_whose_wrapper_dies_while_it_waits_gives_up_before_the_freeze(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, [Fault("target", "breakpoint prepared", lose)]).move(Mode.LIVE, monkeypatch)
    assert rig.phase("a") == SourcePhase.ROLLED_BACK
    assert "nobody waits for the state" in rig.records["b"]["reason"]
    assert not rig.passed_the_right


def test_what_the_target_refuses_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, refusals=[Refused("no room", remedy="make some")]).move(Mode.LIVE, monkeypatch)
    assert (rig.phases("a"), rig.phases("b")) == (["check", "refused"], [])
    assert rig.records["a"]["error"]["remedy"] == "make some"
    assert ("source", "look") not in rig.trace


def test_the_reason_is_the_targets_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, [Fault("target", "verify", fail)]).move(Mode.LIVE, monkeypatch)
    assert "it was asked for" in rig.records["a"]["reason"]
    assert rig.phases("b")[-1] == TargetPhase.GAVE_UP


def test_a_job_that_writes_too_fast_is_slowed_down_and_given_back_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, order=order(max_downtime=1e-6, max_rounds=3)).move(Mode.LIVE, monkeypatch)
    assert ("source", "throttle") in rig.trace
    assert rig.phase("a") == SourcePhase.ROLLED_BACK
    assert "cannot converge" in rig.records["a"]["reason"]
    assert rig.source.quota == 1.0


@pytest.mark.parametrize("how", [fail, refuse])
def test_a_job_that_cannot_be_slowed_down_goes_by_postcopy_where_that_is_allowed(
    how: Callable[[Rig], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container without a cpu controller, say: that is no reason to go back."""
    policy = order(max_downtime=1e-6, max_rounds=3, postcopy=True)
    rig = Rig(tmp_path, [Fault("source", "throttle", how)], order=policy).move(Mode.LIVE, monkeypatch)
    assert [one.name for one in rig.fired] == ["throttle"]
    assert rig.phase("a") == SourcePhase.COMPLETED
    assert SourcePhase.SERVE in rig.phases("a")


def test_a_job_that_writes_too_fast_goes_by_postcopy_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = order(max_downtime=1e-6, max_rounds=3, throttle=False, postcopy=True)
    rig = Rig(tmp_path, order=policy).move(Mode.LIVE, monkeypatch)
    assert SourcePhase.SERVE in rig.phases("a")
    assert rig.records["a"]["postcopy_dependency"]


@pytest.mark.parametrize(
    ("verdict", "end"),
    [(SourceEvent.RESOLVED_HERE, SourcePhase.ROLLED_BACK), (SourceEvent.RESOLVED_THERE, SourcePhase.COMPLETED)],
)
def test_a_person_resolves(
    verdict: SourceEvent, end: SourcePhase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link never comes back: here before GO arrived, there after it did."""
    number = 4
    when = "before" if verdict is SourceEvent.RESOLVED_HERE else "after"
    rig = Rig(tmp_path, cut=Cut("source", number, when, seconds=1e9), resolve=verdict).move(Mode.STOP, monkeypatch)
    assert rig.messages.count(("source", "Go")) == 1
    assert (rig.phase("a"), rig.helped) == (end, True)


@pytest.mark.parametrize(
    ("steps", "end", "asked"),
    [
        ([Step.CUT_OVER, Step.GO_ON, Step.THROTTLE, Step.CUT_OVER], SourcePhase.COMPLETED, [False]),
        ([Step.CUT_OVER, Step.GO_ON, Step.POSTCOPY], SourcePhase.COMPLETED, [False, True]),
        ([Step.POSTCOPY], SourcePhase.COMPLETED, [True]),
        ([Step.CUT_OVER, Step.GO_ON, Step.GIVE_UP], SourcePhase.ROLLED_BACK, [False]),
    ],
)
def test_it_is_decided_again_once_the_target_is_poised(
    steps: list[Step], end: SourcePhase, asked: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job may have written any amount while the target got ready: all that was possible before is so now."""
    left = list(steps)
    monkeypatch.setattr("podferry.engine.rounds.decide", lambda *_, quota, **__: Decision(left.pop(0), "so", quota / 2))
    rig = Rig(tmp_path).move(Mode.LIVE, monkeypatch)
    assert (left, rig.phase("a")) == ([], end), rig.records["a"]["reason"]
    assert rig.messages.count(("source", "PrepareTarget")) == len(asked)
    assert rig.records["a"]["postcopy_dependency"] == asked[-1]
    assert rig.target.postcopy == (asked[-1] and end is SourcePhase.COMPLETED)
    assert rig.source.quota == 1.0


def test_nobody_resolves_to_a_target_that_still_needs_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Post-copy: the verdict would kill the frozen original, which alone has the memory that the job lacks there."""
    cut = Cut("source", 4, "after", seconds=1e9)
    rig = Rig(tmp_path, cut=cut, resolve=SourceEvent.RESOLVED_THERE).move(Mode.POSTCOPY, monkeypatch)
    assert "lack pages" in rig.refused
    assert rig.phases("a")[5:] == ["lost-contact", "serve", "commit", "drain", "completed"]
    assert rig.phase("b") == TargetPhase.DONE


@pytest.mark.parametrize(
    ("mode", "fault", "end"),
    [
        *((mode, None, SourcePhase.COMPLETED) for mode in Mode),
        (Mode.LIVE, Fault("source", "dump", fail), SourcePhase.ROLLED_BACK),
        (Mode.LIVE, Fault("source", "final_scan", oserror), SourcePhase.ROLLED_BACK),
        (Mode.LIVE, Fault("target", "verify", fail), SourcePhase.ROLLED_BACK),
        (Mode.LIVE, Fault("target", "release", fail), SourcePhase.ROLLED_BACK),
        (Mode.LIVE, Fault("source", "breakpoint prepare-target", cancel), SourcePhase.CANCELLED),
    ],
)
def test_what_a_migration_needed_goes_with_its_end_and_its_record_stays(
    mode: Mode, fault: Fault | None, end: SourcePhase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists of pages, buffers and connections, of which an agent that lives for months would have ever more."""
    rig = Rig(tmp_path, [fault] if fault else []).move(mode, monkeypatch)
    assert rig.phase("a") == end
    assert len(rig.used) >= 3  # the job, and both ends of one connection
    assert rig.kept() == []
    for node in ("a", "b"):
        [record] = anyio.run(rig.agents[node].op_status, None, rig.id)
        assert record == rig.records[node]
        assert record["outcome"]
        assert bool(record["error"]) == (fault is not None)
    with pytest.raises(Refused, match="cannot be cancelled any more"):
        anyio.run(rig.agents["a"].op_cancel, None, rig.id)
    with pytest.raises(Refused, match="nothing to resolve"):
        anyio.run(rig.agents["a"].op_resolve, None, rig.id, "a")


def test_a_state_of_more_files_than_a_message_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CRIU writes two files for each shared anonymous mapping: a job with 6000 of them once made a message too large to travel."""
    monkeypatch.setattr(sending, "MOST_SUMS", 1)
    rig = Rig(tmp_path).move(Mode.LIVE, monkeypatch)
    assert rig.records["a"]["outcome"] == "completed"
    assert rig.phases("b")[-1] == "done"


def test_a_source_that_announces_files_for_ever_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "MOST_SUMS", 1)
    monkeypatch.setattr(target, "MOST_PARTS", 1)
    rig = Rig(tmp_path).move(Mode.LIVE, monkeypatch)
    assert rig.records["a"]["outcome"] == "rolled-back"
    assert "more files and address spaces" in rig.records["a"]["reason"]


def test_no_environment_variable_stays_in_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold passwords, and a journal is kept for months. The target has them all the same: it makes the container of them."""
    spec = {"process": {"env": ["PASSWORD=hunter2"], "args": ["train"]}}
    record = Container(NAME, "image", "overlayfs", NAME, Opaque("spec", json.dumps(spec).encode()))
    monkeypatch.setattr(agent_rig, "RECORD", record)
    given: list[OfferedContainer] = []
    target_of = Rig.target_of

    def noted(rig: Rig, journal: Any, name: str, offered: OfferedContainer, *more: Any) -> Any:
        given.append(offered)
        return target_of(rig, journal, name, offered, *more)

    monkeypatch.setattr(Rig, "target_of", noted)
    rig = Rig(tmp_path).move(Mode.LIVE, monkeypatch)
    for node in ("a", "b"):
        kept = OfferedContainer.from_dict(rig.journal_of(node).facts["offered"], NAME)
        assert kept.record.spec_json() == {"process": {"args": ["train"]}}
        raw = (rig.configs[node].migrations / rig.id / JOURNAL).read_bytes()
        encoded = [
            base64.b64decode(word + b"==", validate=False) for word in re.findall(rb"(?:[A-Za-z0-9+/]{4}){4,}", raw)
        ]
        assert not any(b"hunter2" in one for one in (raw, *encoded))
    assert given[0].record.spec_json() == spec
