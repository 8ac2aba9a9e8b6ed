"""From what a job and an agent say to a record, from records to goals, from goals to a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from podferry.bench import figures, report, runner
from podferry.bench.goals import GoalVerdict, store_and_job, total_over_allowance, verdicts, wire_over_need
from podferry.bench.load import PAGE
from podferry.bench.moves import Moved
from podferry.bench.scenarios import SCENARIOS, chosen, restricted
from podferry.bench.workload import Report
from podferry.errors import Failed, UsageError
from podferry.lab import Lab

pytestmark = pytest.mark.unit

MS = 10**6
MACHINE = {
    "cpu": "a processor",
    "cpus": 2,
    "memory_bytes": 24 << 30,
    "kernel": "6.18",
    "criu": "4.1.1",
    "runc": "1.1",
    "containerd": "1.7",
    "podferry": "0",
    "commit": "abc",
}


def record(scenario: str = "downtime", method: str = "live", **fields: Any) -> dict[str, Any]:
    """A record of a run that completed."""
    base = {
        "scenario": scenario,
        "method": method,
        "run": 1,
        "load": 0.5,
        "link": "1gbit",
        "outcome": "completed",
        "machine": MACHINE,
        "facts": {},
        "damaged": 0,
        "damaged_files": 0,
    }
    return {**base, **fields}


def verdict(records: list[dict[str, Any]], words: str) -> GoalVerdict:
    """The one goal that has `words` in its name."""
    (found,) = (one for one in verdicts(records) if words in one.goal)
    return found


# -- the job's report ---------------------------------------------------------------------------------------------


def rows(*bins: tuple[int, int, int, int]) -> list[int]:
    """Bins of (end in ms, units, pages written, ms of processor time), each as the job writes it."""
    return [value for end, units, written, cpu in bins for value in (end * MS, units, written, cpu * MS, 0)]


@pytest.fixture
def seen() -> Report:
    """A job at 1 unit a ms, stopped from 100 to 300 ms; its processor time begins anew after that."""
    bins = rows((0, 0, 0, 10), (50, 50, 5, 35), (100, 100, 10, 60), (300, 101, 10, 1), (350, 151, 15, 26))
    bins += rows((1350, 1151, 115, 526), (2290, 2091, 209, 996))
    return Report.from_dict(
        {
            "bins": bins,
            "gaps": [[100 * MS, 300 * MS], [400 * MS, 420 * MS], [2200 * MS, 2290 * MS]],
            "written": 209,
            "damaged": [3],
            "damaged_files": [],
            "diagnoses": ["page 3: zeros instead of version 1"],
        }
    )


def test_each_method_is_first_in_some_run() -> None:
    orders = [runner.rotated(["a", "b", "c"], number) for number in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


@pytest.mark.parametrize(("outcomes", "downs"), [(["completed"] * 4, 0), (["completed", "error"] * 2, 2)])
def test_a_lab_is_made_anew_after_a_failure_alone(
    outcomes: list[str], downs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lab may be one that somebody works in."""
    left = list(outcomes)
    monkeypatch.setattr(runner, "measure", lambda *arguments: {"outcome": left.pop(0)})
    lab = Mock(Lab)
    lab.exists.return_value = False
    ran = list(runner.run(lab, chosen(["crowd"]), 2, tmp_path / "results", print))
    assert [one["outcome"] for one in ran] == outcomes
    assert lab.down.call_count == downs


def test_methods_may_be_chosen_too() -> None:
    both = chosen(["images", "crowd"])
    assert restricted(both, []) == both
    assert [list(one.methods) for one in restricted(both, ["erofs", "overlayfs"])] == [
        ["overlayfs", "erofs"],
        ["erofs"],
    ]
    assert list(SCENARIOS["images"].methods) == ["overlayfs", "erofs", "dir"]
    with pytest.raises(UsageError, match="no method 'live'"):
        restricted(both, ["erofs", "live"])
    with pytest.raises(UsageError, match="no method is left of scenario 'crowd'"):
        restricted(both, ["overlayfs"])


def test_a_report_tells_gaps_speeds_and_writes(seen: Report) -> None:
    assert seen.gap_at(150 * MS) == (100 * MS, 300 * MS)
    assert seen.gap_at(350 * MS) is None
    assert seen.longest_gaps(300 * MS + 1, 3000 * MS) == [90 * MS, 20 * MS]
    before = seen.speed(0, 100 * MS)
    assert before is not None
    assert before.wall == pytest.approx(1000)
    assert before.cpu == pytest.approx(2000)
    assert seen.speed(100 * MS, 290 * MS) is None
    assert seen.written_between(0, 100 * MS) == 10 * PAGE


def test_processor_time_that_begins_anew_is_not_negative(seen: Report) -> None:
    assert [one.cpu // MS for one in seen.bins][:3] == [25, 25, 1]


@pytest.mark.parametrize("damage", [{"bins": [1, 2, 3]}, {"gaps": [[1]]}, {"written": None}])
def test_a_report_that_is_none_is_an_error(damage: dict[str, Any]) -> None:
    whole = {"bins": [], "gaps": [], "written": 0, "damaged": [], "damaged_files": [], "diagnoses": []}
    assert Report.from_dict(whole).bins == ()
    with pytest.raises(Failed, match="report"):
        Report.from_dict({**whole, **damage})


def test_what_is_observed_of_a_move(seen: Report) -> None:
    facts = {"agents_downtime_ms": 190.0, "wire_bytes": 7, "nonzero_bytes": 5, "rounds": 2}
    moved = Moved("completed", 50 * MS, 500 * MS, frozen=120 * MS, home=450 * MS, facts=facts)
    found = runner.observed(moved, seen, ready=0)
    assert found["downtime_ms"] == 200
    assert found["total_ms"] == 450
    assert found["home_ms"] == 400
    assert found["stall_ms"] == 20
    assert found["stalls_ms"] == [20]
    assert found["written_bytes"] == 5 * PAGE
    assert found["damaged"] == 1
    assert found["speed"]["before"]["wall"] == pytest.approx(1000)
    assert found["speed"]["second_after"] is not None
    assert found["wire_bytes"] == 7
    json.dumps(found)


def test_a_move_that_did_not_happen_has_no_downtime(seen: Report) -> None:
    found = runner.observed(Moved("rolled-back", 50 * MS, 90 * MS, None, None), seen, ready=0)
    assert found["downtime_ms"] is None
    assert found["outcome"] == "rolled-back"


# -- goals --------------------------------------------------------------------------------------------------------


def test_the_downtime_goal_is_a_ratio_of_medians() -> None:
    lives = [record(downtime_ms=value) for value in (100.0, 200.0, 9000.0)]
    floors = [record(method="floor", downtime_ms=value) for value in (90.0, 160.0, 8000.0)]
    found = verdict([*lives, *floors], "against the floor")
    assert found.measured == pytest.approx(200 / 160)
    assert (found.kept, found.runs) == (True, 3)
    assert found.margin == pytest.approx((1.5 - 1.25) / 1.5)


def test_a_goal_that_is_missed_says_by_how_much() -> None:
    found = verdict([record(downtime_ms=300.0), record(method="floor", downtime_ms=100.0)], "against the floor")
    assert found.kept is False
    assert found.margin == pytest.approx(-1)


def test_a_goal_without_runs_is_neither_kept_nor_missed() -> None:
    for one in verdicts([]):
        assert (one.measured, one.kept, one.margin, one.runs) == (None, None, None, 0)


def test_runs_that_did_not_complete_do_not_count() -> None:
    runs = [record(downtime_ms=100.0), record(downtime_ms=None, outcome="error")]
    runs.append(record(method="stop", downtime_ms=3000.0))
    found = verdict(runs, "shorter than that of stop")
    assert (found.measured, found.kept, found.runs) == (30, True, 1)


def test_sizes_need_all_three() -> None:
    runs = [record("small", downtime_ms=100.0), record(downtime_ms=110.0)]
    assert verdict(runs, "64 MiB, 1 GiB, 4 GiB").measured is None
    runs.append(record("large", downtime_ms=131.0))
    assert verdict(runs, "64 MiB, 1 GiB, 4 GiB").measured == pytest.approx(1.31)
    assert verdict(runs, "64 MiB, 1 GiB, 4 GiB").kept is False


@pytest.mark.parametrize(
    ("words", "field", "limit"),
    [("downtime against", "downtime_ms", 0.8), ("home", "home_ms", 0.6), ("stall", "stall_ms", 0.5)],
)
def test_against_lazy_migration(words: str, field: str, limit: float) -> None:
    for share, kept in ((limit, True), (limit * 1.01, False)):
        runs = [record() | {field: share * 1000}, record(method="criu-lazy") | {field: 1000.0}]
        assert verdict(runs, words).kept is kept


def test_total_time_and_wire_bytes_are_judged_by_each_run() -> None:
    one = record(wire_bytes=125_000_000, total_ms=2250.0, nonzero_bytes=100_000_000, written_bytes=25_000_000)
    assert total_over_allowance(one) == pytest.approx(1)
    assert wire_over_need(one) == pytest.approx(1)
    assert total_over_allowance({**one, "link": "none"}) is None
    assert wire_over_need({**one, "wire_bytes": None}) is None


def test_speeds_are_compared_with_before() -> None:
    speed = {
        "before": {"wall": 100.0, "cpu": 200.0},
        "during": {"wall": 96.0, "cpu": 180.0},
        "second_after": {"wall": 90.0, "cpu": 200.0},
    }
    runs = [record("cpu", speed=speed), record("random", speed=speed)]
    assert verdict(runs, "during pre-copy").kept is True
    assert "0.900" in verdict(runs, "during pre-copy").detail
    assert verdict(runs, "second after").kept is False


def test_the_store_must_shrink_as_the_job_grows() -> None:
    def drained(samples: list[list[int]]) -> dict[str, Any]:
        return record("drain", facts={"samples": samples, "agent_bytes": {"node-a": 50 << 20, "node-b": 100 << 20}})

    shrinking = drained([[0, 100, 60 << 20, 0], [1, 60, 9, 41], [2, 0, 9, 100]])
    keeping = drained([[0, 100, 9, 0], [1, 100, 9, 50], [2, 100, 9, 100]])
    assert store_and_job(shrinking) == pytest.approx(1.01)
    assert store_and_job(keeping) == 2
    assert verdict([keeping], "page store and job").kept is False
    assert verdict([shrinking], "larger agent").measured == 160


def test_a_storm_must_end_as_the_options_say() -> None:
    gave_up = {"reason": "cannot converge: the job writes 400 MB/s"}
    runs = [
        record("storm", "throttle"),
        record("storm", "postcopy-allowed", facts={"postcopy": True}),
        record("storm", "neither", outcome="rolled-back", facts=gave_up),
    ]
    assert [one.kept for one in verdicts(runs) if one.goal.startswith("400 MB/s")] == [True, True, True]
    runs += [record("storm", method, outcome="failed") for method in ("throttle", "postcopy-allowed", "neither")]
    assert [one.measured for one in verdicts(runs) if one.goal.startswith("400 MB/s")] == [0.5, 0.5, 0.5]


def test_one_damaged_page_in_any_run_is_a_missed_goal() -> None:
    assert verdict([record(), record(damaged=1, damaged_files=1)], "intact").measured == 2
    assert verdict([record(), record(damaged=1)], "intact").kept is False


# -- results and reports ------------------------------------------------------------------------------------------


@pytest.fixture
def records() -> list[dict[str, Any]]:
    spans = [{"name": "freeze", "where": "source", "start_ms": 1.0, "end_ms": 8.0}]
    samples = [[0, 100 << 20, 5 << 20, 0], [10**9, 60 << 20, 5 << 20, 50 << 20], [2 * 10**9, 0, 0, 100 << 20]]
    return [
        record(method="floor", downtime_ms=140.0),
        record(downtime_ms=180.0, facts={"spans": spans}),
        record("small", downtime_ms=170.0),
        record("drain", facts={"samples": samples, "agent_bytes": {"node-a": 1, "node-b": 2}}),
        record(method="criu", outcome="error", error={"what": "no | CRIU", "why": "it is gone"}),
    ]


def test_a_report_has_goals_runs_spans_and_errors(records: list[dict[str, Any]]) -> None:
    text = report.markdown(records, "podferry bench run downtime")
    assert "podferry bench run downtime" in text
    assert "| downtime | live | 1 | 180 |" in text
    assert "kept by 14%" in text
    assert "no / CRIU: it is gone" in text
    assert "CRIU 4.1.1" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| downtime | live | 7")}
    assert widths == {len(report.SPANS) + 3}


def test_figures_are_pictures(records: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = figures.draw(records, tmp_path)
    assert [path.name for path in made] == ["downtime.png", "sizes.png", "drain.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in made)
    assert figures.draw([], tmp_path) == []


def test_results_come_back_as_they_were_written(records: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in records))
    assert runner.read([file]) == records


@pytest.mark.parametrize("line", ["{", "[]", '{"scenario": "downtime"}'])
def test_a_line_that_is_no_record_is_an_error(line: str, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(record()) + "\n" + line + "\n")
    with pytest.raises(Failed, match="line 2"):
        runner.read([file])


def test_scenarios_are_found_by_name() -> None:
    assert [one.name for one in chosen(["small", "large"])] == ["small", "large"]
    assert all(name == one.name and one.methods for name, one in SCENARIOS.items())
    with pytest.raises(UsageError, match="storms"):
        chosen(["storms"])
