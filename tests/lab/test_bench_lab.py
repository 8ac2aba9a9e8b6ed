"""The benchmark against a real lab: every kind of method makes a valid record, and damage in a moved job shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from podferry.bench import job, runner
from podferry.bench.evaluation import html_report, plan_runner
from podferry.bench.goals import verdicts
from podferry.bench.load import PAGE
from podferry.bench.moves import SOURCE, TARGET
from podferry.bench.runc import Runc
from podferry.bench.scenarios import CRIU, FLOOR, LIVE, STOP, Scenario
from podferry.bench.twins import Restart, Unmoved
from podferry.bench.workload import JobWork, Workload
from podferry.lab import Lab, containers

pytestmark = pytest.mark.lab

SMALL = Scenario(
    "smoke",
    "whether it works",
    Workload(16, 2, files=2),
    {FLOOR: None, "live": LIVE, "stop": STOP, "criu": CRIU, "criu-lazy": Runc(lazy=True)},
)


@pytest.mark.parametrize("name", list(SMALL.methods))
def test_a_run_makes_a_whole_record(lab: Lab, name: str) -> None:
    scenario = SMALL if not name.startswith("criu") else Scenario("smoke", "", Workload(16, 2), SMALL.methods)
    record = runner.measure(lab, scenario, name, scenario.methods[name], 1)
    assert record["outcome"] == "completed", record.get("error")
    assert record["downtime_ms"] > 0
    assert all(record["machine"][program] != "unknown" for program in ("criu", "runc", "containerd"))
    if name != FLOOR:
        assert record["where"] == TARGET
        assert (record["damaged"], record["damaged_files"]) == (0, 0)
        assert record["total_ms"] >= record["home_ms"] >= record["downtime_ms"] > 0
        assert record["link_bytes"] > 0
        assert record["speed"]["before"]["wall"] > 0
        assert record["speed"]["second_after"]["wall"] > 0
    if name in ("live", "stop"):
        assert record["wire_bytes"] >= record["nonzero_bytes"] // 2
        assert record["agents_downtime_ms"] > 0
        assert record["lost"]["stop_ms"] == pytest.approx(record["downtime_ms"])
        assert record["lost"]["total_ms"] > 0
        assert record["series"]
    list(verdicts([json.loads(json.dumps(record))]))


def test_a_twin_that_stays_and_one_that_begins_again_tell_their_lost_work(lab: Lab) -> None:
    workload = Workload(16, 2, work=JobWork.STREAM)
    stayed, again = (
        runner.measure(lab, Scenario("lost", "", workload, {name: method}), name, method, 1)
        for name, method in (("unmoved", Unmoved(1.0)), ("restart", Restart()))
    )
    for record, where in ((stayed, SOURCE), (again, TARGET)):
        assert record["outcome"] == "completed", record.get("error")
        assert (record["where"], record["downtime_ms"], record["damaged"]) == (where, None, 0)
    assert stayed["lost"]["stop_ms"] == 0
    assert again["lost"]["total_ms"] == pytest.approx(again["facts"]["restart_ms"] + again["lost"]["again_ms"])
    assert again["lost"]["again_ms"] > 0


def test_a_job_of_several_processes_with_shared_memory_and_files_of_its_own_moves_whole(lab: Lab) -> None:
    workload = Workload(32, 2, processes=3, shared=True, upper=2, small_files=20)
    record = runner.measure(lab, Scenario("smoke", "", workload, {"live": LIVE}), "live", LIVE, 1)
    assert record["outcome"] == "completed", record.get("error")
    assert (record["where"], record["damaged"], record["damaged_files"]) == (TARGET, 0, 0)


def test_an_evaluation_of_little_runs_once_and_writes_its_report(lab: Lab, tmp_path: Path) -> None:
    methods = {FLOOR: None, "unmoved": Unmoved(1.0), "live": LIVE}
    scenarios = [Scenario("quick", "", Workload(16, 2), methods, most=1)]
    results = tmp_path / "results.jsonl"

    def carried_out() -> list[dict[str, Any]]:
        measure, budget = plan_runner.measuring(lab, lambda step: None), plan_runner.TimeBudget(3600)
        return list(plan_runner.evaluate(measure, scenarios, results, budget, lambda step: None))

    assert [one["outcome"] for one in carried_out()] == ["completed"] * len(methods)
    assert carried_out() == []
    page = html_report.write(runner.read([results]), tmp_path, "podferry bench evaluate").read_text()
    for figure in ("downtime-quick", "lost-quick", "waterfall-quick", "waterfall-stop-quick"):
        assert f'<figure id="{figure}">' in page


def test_a_page_that_is_damaged_in_a_running_job_shows(lab: Lab) -> None:
    damaged = 100
    running = job.start(lab, SOURCE, "bench-damage", Workload(16))
    try:
        assert running.report().damaged == ()
        pid = int((lab.root(SOURCE) / job.BUNDLES / "bench-damage" / "init.pid").read_text())
        poke(lab.root(SOURCE) / "proc" / str(pid), damaged)
        assert running.report().damaged == (damaged,)
    finally:
        containers.stop(lab, "bench-damage")


def poke(process: Path, page: int) -> None:
    """Flip a byte in the job's pattern, where page number `page` is found by its header and that of the next."""
    for line in (process / "maps").read_text().splitlines():
        span, mode = line.split()[:2]
        start, end = (int(word, 16) for word in span.split("-"))
        if mode != "rw-p" or end - start < 16 << 20:
            continue
        with (process / "mem").open("r+b", buffering=0) as memory:
            for base in range(start, end - (page + 1) * PAGE, PAGE):
                memory.seek(base + page * PAGE)
                head = memory.read(8)
                memory.seek(base)
                if memory.read(8) == bytes(8) and head == page.to_bytes(4, "little") + bytes(4):
                    memory.seek(base + page * PAGE + 2000)
                    byte = memory.read(1)[0]
                    memory.seek(base + page * PAGE + 2000)
                    memory.write(bytes([byte ^ 1]))
                    return
    raise AssertionError("the job's pattern was not found in its memory")
