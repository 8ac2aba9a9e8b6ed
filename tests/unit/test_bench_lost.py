"""Lost work: what a job's bins tell, against hand-made ones whose loss is known; and the twins that moves are compared with."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.bench import report as pages
from podferry.bench import runner, twins
from podferry.bench.job import Job
from podferry.bench.lost import lost_ms, lost_work, series, units_between
from podferry.bench.moves import SOURCE, TARGET, Moved
from podferry.bench.scenarios import SCENARIOS
from podferry.bench.workload import Report, Workload
from podferry.lab import Lab

pytestmark = pytest.mark.unit

MS = 10**6
SECOND = 10**9


def report_of(speeds: Iterable[tuple[int, float]], gaps: Iterable[tuple[int, int]] = ()) -> Report:
    """A job that works (ms, units a ms) one after the other, in bins of 20 ms; `gaps` in ms."""
    rows, at, units = [0, 0, 0, 0, 0], 0, 0.0
    for span, speed in speeds:
        for _ in range(span // 20):
            at += 20
            units += 20 * speed
            rows += [at * MS, round(units), 0, at * MS, 0]
    found = [[start * MS, end * MS] for start, end in gaps]
    return Report.from_dict(
        {"bins": rows, "gaps": found, "written": 0, "damaged": [], "damaged_files": [], "diagnoses": []}
    )


def test_lost_work_has_its_three_parts() -> None:
    """Two seconds at full speed, one at half, a stop of 200 ms, one at three quarters, one at full speed."""
    job = report_of(
        [(2000, 10), (1000, 5), (200, 0), (1000, 7.5), (1000, 10)],
        [(3000, 3200)],
    )
    found = lost_work(job, 0, 2000 * MS, job.gap_at(3100 * MS))
    assert found is not None
    assert found.precopy_ms == pytest.approx(500)
    assert found.stop_ms == pytest.approx(200)
    assert found.after_ms == pytest.approx(250)
    assert found.total_ms == pytest.approx(950)
    assert found.window_ms == pytest.approx(3200)


def test_a_bin_with_the_stop_in_it_is_not_counted_as_slow_work() -> None:
    """The bin in which the job is stopped ends after the resume; its work was done outside the stop."""
    bins = [0, 0, 0, 0, 0]
    for end, units in ((1000, 1000), (2000, 2000), (2310, 2110), (3310, 3110)):
        bins += [end * MS, units, 0, end * MS, 0]
    job = Report.from_dict(
        {
            "bins": bins,
            "gaps": [[2050 * MS, 2250 * MS]],
            "written": 0,
            "damaged": [],
            "damaged_files": [],
            "diagnoses": [],
        }
    )
    found = lost_work(job, 0, 1000 * MS, (2050 * MS, 2250 * MS))
    assert found is not None
    assert (found.precopy_ms, found.stop_ms, found.after_ms) == pytest.approx((0, 200, 0), abs=1e-6)


def test_a_twin_at_even_speed_loses_nothing() -> None:
    found = lost_work(report_of([(5000, 3)]), 0, 2000 * MS, None)
    assert found is not None
    assert found.total_ms == pytest.approx(0)


def test_without_a_speed_before_there_is_no_figure() -> None:
    assert lost_work(report_of([(1000, 3)]), 0, 0, None) is None
    assert lost_work(report_of([(1000, 3)]), 0, 1000 * MS, None) is None
    assert lost_work(report_of([]), 0, 0, None) is None


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(0, 400), st.integers(0, 400))
def test_units_are_neither_lost_nor_counted_twice(units: list[int], one: int, other: int) -> None:
    bins = report_of([(20, each / 20) for each in units]).bins
    first, second = sorted((one, other))
    parts = (
        units_between(bins, start * MS, end * MS) for start, end in ((0, first), (first, second), (second, 10_000))
    )
    assert sum(parts) == pytest.approx(sum(each.units for each in bins))


def test_the_series_has_a_point_for_each_100_ms() -> None:
    found = series(report_of([(1000, 2), (1000, 1)]), 500 * MS, 1000 * MS)
    assert [point[0] for point in found] == [-400 + 100 * number for number in range(15)]
    assert {point[1] for point in found[:5]} == {2000}
    assert {point[1] for point in found[6:]} == {1000}


def test_a_record_carries_lost_work_of_a_move_and_of_its_twin() -> None:
    job = report_of([(2000, 10), (200, 0), (3000, 10)], [(2000, 2200)])
    moved = runner.observed(Moved("completed", 1800 * MS, 3000 * MS, 2100 * MS, 2500 * MS), job, ready=0)
    assert lost_ms(moved) == pytest.approx(200)
    assert lost_ms(moved, "stop_ms") == pytest.approx(200)
    assert moved["resumed_ms"] == pytest.approx(400)
    unmoved = runner.observed(Moved("completed", 2500 * MS, 3000 * MS, None, None), report_of([(5000, 3)]), ready=0)
    assert lost_ms(unmoved) == pytest.approx(0)
    unseen = runner.observed(Moved("completed", 2500 * MS, 3000 * MS, 2600 * MS, None), report_of([(5000, 3)]), ready=0)
    assert unseen["lost"] is None, "a stop that the job's clock does not show must not be called none"
    json.dumps([moved, unmoved])


def test_a_restart_loses_itself_and_all_that_was_computed() -> None:
    moved = Moved("completed", 5 * SECOND, 7 * SECOND, None, None, {"restart_ms": 2000.0})
    found = runner.observed(moved, report_of([(1000, 1)]), ready=1 * SECOND)
    assert (lost_ms(found), lost_ms(found, "again_ms")) == pytest.approx((6000, 4000))


def test_a_restarted_job_is_asked_on_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Mock(Lab)
    first, second = (Job(lab, node, Path(node), Mock(), Mock()) for node in (SOURCE, TARGET))
    monkeypatch.setattr(twins.jobs, "start", lambda lab, node, name, workload: first if node == SOURCE else second)
    monkeypatch.setattr(twins.containers, "holders", lambda *asked: ["node-a"])
    monkeypatch.setattr(twins.containers, "stop", stop := Mock())
    method = twins.Restart()
    started = method.start(lab, Workload(1))
    moved = method.move(started)
    assert stop.call_count == 1
    assert (started.node, started.root) == (TARGET, Path(TARGET))
    assert moved.facts["restart_ms"] > 0


def test_a_twin_is_watched_for_as_long_as_a_move_takes() -> None:
    assert twins.unmoved(Workload(1024), "1gbit").seconds == pytest.approx(8.6 + twins.SETTLING, abs=0.1)
    assert twins.unmoved(Workload(1024), "none").seconds < 6


def test_the_report_has_lost_work_beside_its_control() -> None:
    lost = {"precopy_ms": 10.0, "stop_ms": 200.0, "after_ms": 90.0, "total_ms": 300.0, "window_ms": 10_000.0}
    base = {"scenario": "lost-cpu", "run": 1, "outcome": "completed", "facts": {}}
    titles, *rows = pages.lost_rows(
        [{**base, "method": "live", "lost": lost}, {**base, "method": "unmoved", "lost": {**lost, "total_ms": 5.0}}]
    )
    assert rows[0] == ["lost-cpu", "live", "1", "10", "200", "90", "300", "3.0%"]
    assert rows[1][1:3] == ["unmoved", "1"]
    assert len(titles) == len(rows[0])


def test_lost_work_is_measured_for_every_kind_of_job() -> None:
    found = [one for name, one in SCENARIOS.items() if name.startswith("lost-")]
    assert {str(one.workload.work) for one in found if one.workload} == {"tick", "cpu", "random", "stream"}
    assert all(list(one.methods) == ["unmoved", "live", "stop", "restart"] for one in found)
