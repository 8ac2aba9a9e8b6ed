"""The evaluation: what it plans, that it goes on where it was interrupted, and what it writes of it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from bench_records import quick, record_of, whole
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from podferry.bench import machine_facts, runner
from podferry.bench.evaluation import html_report, plan_runner, regression_guard, run_plan
from podferry.bench.evaluation.charts import Bars, Chart, Scale, Series, Waterfall, ticks
from podferry.bench.evaluation.plan_runner import TimeBudget
from podferry.bench.evaluation.run_plan import PlannedRun
from podferry.bench.evaluation.sections import sections
from podferry.bench.evaluation.utilization import fill_rate, link_share
from podferry.cli.app import app
from podferry.errors import Failed, PodferryError, UsageError
from podferry.node.process import run

pytestmark = pytest.mark.unit

GIB = 1 << 30
EXPECTED = {
    "downtime-memory",
    "downtime-dirty",
    "downtime-link",
    "downtime-methods",
    "lost-memory",
    "lost-dirty",
    "lost-link",
    "lost-downtime",
    "lost-work-cpu",
    "lost-work-random",
    "lost-work-stream",
    "waterfall-downtime",
    "waterfall-stop-downtime",
    "stalls",
    "speed-downtime",
    "speed-work-cpu",
    "images-first_pull",
    "images-second_start",
    "kinds-downtime",
    "files-total",
    "sharing-downtime",
}


class Clock:
    """Time that goes by with the runs alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# -- the plan -----------------------------------------------------------------------------------------------------


def test_the_plan_has_every_axis() -> None:
    jobs = [one.workload for one in run_plan.full() if one.workload]
    assert {64, 256, 1024, 4096, 8192} <= {job.memory for job in jobs}
    assert {0, 50, 100, 200, 400} <= {job.dirty for job in jobs}
    assert {job.processes for job in jobs} == {1, 8, 64}
    assert {job.shared for job in jobs} == {False, True}
    assert {"100mbit", "1gbit", "10gbit", "none"} <= {one.link for one in run_plan.full()}
    assert {0, 128, 1024} <= {job.upper for job in jobs}
    assert max(job.small_files for job in jobs) == 100_000
    assert {str(job.work) for job in jobs} == {"tick", "cpu", "random", "stream"}
    methods = {name for one in run_plan.full() for name in one.methods}
    assert {"floor", "live", "stop", "postcopy", "criu", "criu-lazy", "unmoved", "restart", "overlayfs"} <= methods


def test_names_are_unique() -> None:
    for scenarios in (run_plan.full(), run_plan.quick()):
        assert len({one.name for one in scenarios}) == len(scenarios)


def test_several_rounds_fit_into_90_minutes_and_two_minutes() -> None:
    assert sum(step.estimate() for step in run_plan.steps(run_plan.full(), 4)) < 90 * 60
    assert sum(step.estimate() for step in run_plan.steps(run_plan.quick(), 1)) < 110


def test_what_the_memory_does_not_carry_is_left_out_and_said() -> None:
    fits, left = run_plan.carried(run_plan.full(), 12 * GIB)
    assert [one.name for one in left] == ["memory-8192"]
    assert "large" in {one.name for one in fits}
    assert run_plan.carried(run_plan.full(), 1 << 50)[1] == []


def test_a_round_has_every_run_once_and_begins_with_another_method() -> None:
    every = list(run_plan.steps(run_plan.full(), 2))
    assert len({step.key for step in every}) == len(every)
    first = [
        [step.method for step in every if step.scenario.name == "downtime" and step.number == number]
        for number in (1, 2)
    ]
    assert sorted(first[0]) == sorted(first[1])
    assert first[0][0] != first[1][0]


def test_estimates_learn_from_what_was_run() -> None:
    step = next(run_plan.steps(run_plan.quick()))
    assert step.estimate([record_of(step) | {"seconds": seconds} for seconds in (7.0, 9.0, 400.0)]) == 9.0


# -- the loop -----------------------------------------------------------------------------------------------------


def carry_out(results: Path, seconds: float, *, each: float = 10.0, stop_at: int = 10_000) -> list[PlannedRun]:
    """Carry out the quick plan, each run of so many seconds; the run number `stop_at` is killed in the middle."""
    clock, ran = Clock(), list[PlannedRun]()

    def measure(step: PlannedRun) -> dict[str, Any]:
        if len(ran) == stop_at:
            raise KeyboardInterrupt
        ran.append(step)
        clock.now += each
        return {key: value for key, value in record_of(step).items() if key != "seconds"}

    list(plan_runner.evaluate(measure, run_plan.quick(), results, TimeBudget(seconds, clock), lambda step: None))
    return ran


def test_it_ends_within_its_budget(tmp_path: Path) -> None:
    ran = carry_out(tmp_path / "results", 123)
    assert len(ran) == 12
    assert len(runner.read([tmp_path / "results"])) == 12


def test_interrupted_it_goes_on_and_a_run_that_was_killed_is_repeated(tmp_path: Path) -> None:
    results = tmp_path / "results"
    with pytest.raises(KeyboardInterrupt):
        carry_out(results, 123, stop_at=4)
    again = carry_out(results, 123)
    whole_run = carry_out(tmp_path / "other", 123)
    assert [step.key for step in again] == [step.key for step in whole_run[4:]]
    assert [one["run"] for one in runner.read([results])] == [one["run"] for one in runner.read([tmp_path / "other"])]
    assert carry_out(results, 123) == [], "what is done is done"


def test_a_line_that_was_not_written_to_its_end_is_run_again(tmp_path: Path) -> None:
    results = tmp_path / "results"
    carry_out(results, 45)
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:-1]) + lines[-1][:40])
    again = carry_out(results, 45)
    assert [step.key for step in again] == [
        (record := json.loads(lines[-1]))["scenario"] and (record["scenario"], record["method"], 1)
    ]
    assert len(runner.read([results])) == len(lines)


def test_what_the_benchmark_could_not_do_is_tried_again_and_counted_once(tmp_path: Path) -> None:
    results = tmp_path / "results"
    carry_out(results, 45)
    first, *others = runner.read([results])
    results.write_text("".join(json.dumps(one) + "\n" for one in ({**first, "outcome": runner.ERROR}, *others)))
    again = carry_out(results, 90)
    assert again[0].key == (first["scenario"], first["method"], first["run"])
    latest = run_plan.latest(runner.read([results]))
    assert len(latest) == len({(one["scenario"], one["method"], one["run"]) for one in latest})
    assert all(one["outcome"] == "completed" for one in latest)


def test_errors_in_a_row_end_it(tmp_path: Path) -> None:
    def measure(step: PlannedRun) -> dict[str, Any]:
        return record_of(step) | {"outcome": runner.ERROR, "error": Failed("no lab").to_dict()}

    with pytest.raises(PodferryError, match="no lab"):
        list(
            plan_runner.evaluate(
                measure, run_plan.quick(), tmp_path / "results", TimeBudget(1e6, Clock()), lambda step: None
            )
        )
    assert len(runner.read([tmp_path / "results"])) == runner.ENOUGH_ERRORS


def test_results_of_another_commit_are_not_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_facts, "commit", lambda: "def")
    with pytest.raises(UsageError, match="commit abc"):
        plan_runner.require_same_commit(list(quick()), Path("results"))
    monkeypatch.setattr(machine_facts, "commit", lambda: "abc")
    plan_runner.require_same_commit(list(quick()), Path("results"))


# -- the report ---------------------------------------------------------------------------------------------------


def test_the_report_has_all_its_figures_and_every_one_is_xml() -> None:
    made = [figure for section in sections(whole()) for figure in section.figures]
    assert {figure.name for figure in made} >= EXPECTED
    assert len({figure.name for figure in made}) == len(made)
    for figure in made:
        assert "nan" not in figure.svg
        ElementTree.fromstring(figure.svg)
        ElementTree.fromstring(html_report.alone(figure))


@pytest.mark.parametrize("keep", ["none", "quick", "failed", "one"])
def test_whatever_there_is_makes_a_report(keep: str, tmp_path: Path) -> None:
    records: dict[str, list[dict[str, Any]]] = {
        "none": [],
        "quick": list(quick(1)),
        "failed": [{**one, "outcome": "failed", "facts": {}} for one in whole(1)],
        "one": whole(1)[:1],
    }
    page = html_report.write(records[keep], tmp_path, "podferry bench evaluate", ["memory-8192, which needs more"])
    assert "memory-8192" in page.read_text()
    assert (tmp_path / "README.md").exists()


def test_the_markdown_shows_every_figure_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "of-an-earlier-report.svg").write_text("")
    page = html_report.write(whole(1), tmp_path, "podferry bench evaluate")
    shown = (tmp_path / "README.md").read_text()
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {line.split("figures/")[1][:-1] for line in shown.splitlines() if line.startswith("![")}
    assert "http" not in page.read_text().replace("http://www.w3.org/2000/svg", "")
    assert "Against the physical limit" in shown


def test_shares_of_the_physical_limit() -> None:
    record = {
        "link": "1gbit",
        "wire_bytes": 125_000_000,
        "home_ms": 2000.0,
        "method": "live",
        "nonzero_bytes": GIB,
        "resumed_ms": 1000.0,
    }
    assert link_share(record) == pytest.approx(0.5)
    assert link_share({**record, "link": "none"}) is None
    assert fill_rate(record) == pytest.approx(GIB)
    assert fill_rate({**record, "method": "stop"}) is None
    for more in ({"processes": 8}, {"shared": True}):
        assert fill_rate({**record, "workload": more}) is None


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_inside(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert len(found) <= 12
    assert all(low - span * 1e-6 <= value <= low + span * (1 + 1e-6) for value in found)


@given(st.floats(1e-3, 1e5), st.floats(1.01, 1e6))
def test_logarithmic_ticks_are_inside(low: float, factor: float) -> None:
    assert all(low * (1 - 1e-9) <= value <= low * factor * (1 + 1e-6) for value in ticks(low, low * factor, log=True))


def test_a_scale_keeps_what_lies_outside_at_its_edge() -> None:
    scale = Scale(10, 1000, 0, 100, log=True)
    assert [scale(value) for value in (1, 10, 100, 1000, 5000)] == pytest.approx([0, 0, 50, 100, 100])
    assert Scale(5, 5, 0, 100)(5) == 50


@pytest.mark.parametrize(
    "chart",
    [
        Chart("a < b", "x & y", "y", [Series("<one>", [(1, 0), (1, 0)])], log_x=True, band=(1, 1)),
        Bars("a", "x", [("<row>", 0.0, [0.0])]),
        Bars("a", "x", [("row", 5.0, [5.0, 900.0])], log=True, emphasised=frozenset({"row"})),
        Waterfall("a", "ms", [("<step>", 0, 0, 1)]),
    ],
)
def test_a_chart_of_little_is_still_one(chart: Chart | Bars | Waterfall) -> None:
    svg = chart.svg()
    ElementTree.fromstring(svg)
    assert "nan" not in svg


# -- the guard ----------------------------------------------------------------------------------------------------


def slower(records: list[dict[str, Any]], factor: float, *, floor: float = 1.0) -> list[dict[str, Any]]:
    """The same runs with other downtimes."""
    return [
        {
            **one,
            "downtime_ms": one["downtime_ms"] and one["downtime_ms"] * (floor if one["method"] == "floor" else factor),
        }
        for one in records
    ]


def test_the_guard_says_what_looks_worse() -> None:
    reference = list(quick(6))
    said = regression_guard.said(reference, slower(list(quick(2)), 2.0))
    assert any(line.startswith("WORSE? quick, live: downtime_ms") for line in said)
    assert not any("unmoved" in line for line in said)


def test_the_guard_does_not_mind_a_slow_machine_or_a_little_noise() -> None:
    reference = list(quick(6))
    for records in (slower(list(quick(2)), 3.0, floor=3.0), slower(list(quick(2)), 1.1)):
        assert not [
            line for line in regression_guard.said(reference, records) if "downtime_ms" in line and "WORSE" in line
        ]


def test_the_guard_says_what_did_not_complete_and_what_it_cannot_compare() -> None:
    broken = [{**one, "outcome": "failed"} for one in quick(1)]
    said = regression_guard.said(list(quick(2)), broken)
    assert sum(line.startswith("did not complete") for line in said) == len(broken)
    assert "no figure" in said[-1]
    assert regression_guard.said([], list(quick(1))) == []


REGRESSIONS = Path(__file__).parents[2] / "scripts/regressions"


def regressions(directory: Path, script: str) -> str:
    """What scripts/regressions says with this in place of podferry; it ends with 0 whatever happens."""
    program = directory / "venv/bin/podferry"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    done = run([sys.executable, REGRESSIONS, directory / "venv"], cwd=directory)
    return done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: without it nothing is measured")
def test_make_test_says_what_looks_worse_and_does_not_fail(tmp_path: Path) -> None:
    reference = tmp_path / "docs/evaluation/quick.jsonl"
    reference.parent.mkdir(parents=True)
    lines = ("".join(json.dumps(one) + "\n" for one in records) for records in (quick(6), slower(list(quick(2)), 2.0)))
    reference.write_text(next(lines))
    (tmp_path / "now").write_text(next(lines))
    script = f'while [ "$1" != --out ]; do shift; done\nexec cp {tmp_path}/now "$2/results.jsonl"'
    assert "regressions: WORSE? quick, live: downtime_ms" in regressions(tmp_path, script)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: without it nothing is measured")
def test_make_test_says_where_nothing_was_measured(tmp_path: Path) -> None:
    said = regressions(tmp_path, "echo no such lab >&2; exit 5")
    assert "ended with 5" in said
    assert "no such lab" in said


# -- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in quick()))
    yield tmp_path


def test_the_command_writes_a_report_of_what_is_there(there: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "evaluate", "--quick", "--report", "--out", str(there)])
    assert done.exit_code == 0, done.output
    assert "downtime-quick" in (there / "index.html").read_text()


def test_without_any_runs_there_is_no_report(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "evaluate", "--report", "--out", str(tmp_path)], standalone_mode=False)
    assert "no runs" in str(done.exception)


def test_the_command_shows_its_plan() -> None:
    done = CliRunner().invoke(app, ["bench", "evaluate", "--plan", "--quick"])
    assert done.exit_code == 0
    assert "quick-cpu" in done.stdout
