"""Runs scenarios and writes one record for each run: a line of JSON, which `goals` and `report` read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from podferry.bench import agent_usage, machine_facts
from podferry.bench.lost import lost_work, series
from podferry.bench.moves import SOURCE, Method, Moved
from podferry.bench.pulls import Measurement
from podferry.bench.runc import floor
from podferry.bench.scenarios import Scenario
from podferry.bench.workload import Report, Speed, Workload
from podferry.errors import Bug, Failed, PodferryError
from podferry.lab import Lab

BEFORE, AFTER = 2.0, 2.2
"""Seconds for which the job is watched before the move, and after all of its memory has come."""

SECOND = 10**9
STALLS = 300
"""How many of the stalls after the resume a record keeps: all that the job does."""

ERROR = "error"
ENOUGH_ERRORS = 4
Record = dict[str, Any]
Progress = Callable[[str], None]
T = TypeVar("T")


def run(lab: Lab, scenarios: Sequence[Scenario], repeat: int, results: Path, progress: Progress) -> Iterator[Record]:
    """Run every method of every scenario in turn, `repeat` times over; append each record to `results` and yield it.

    The lab is brought up where it is not, and again, from nothing, after a run that went wrong. Raises the error of the last of
    `ENOUGH_ERRORS` such runs in a row.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    nodes = max([scenario.nodes for scenario in scenarios] + [len(lab.status().nodes) if lab.exists() else 0])
    in_a_row = 0
    for number in range(1, repeat + 1):
        for scenario in (one for one in scenarios if number <= one.most):
            for name, method in rotated(list(scenario.methods.items()), number - 1):
                progress(f"run {number} of {min(repeat, scenario.most)}: {scenario.name}, {name}")
                began = time.monotonic()
                record = measure(lab, scenario, name, method, number, progress, nodes)
                record["seconds"] = round(time.monotonic() - began, 1)
                with results.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                yield record
                in_a_row = in_a_row + 1 if record["outcome"] == ERROR else 0
                if in_a_row == ENOUGH_ERRORS:
                    raise PodferryError.from_dict(record["error"])
                if in_a_row:
                    lab.down(progress)


def rotated(methods: Sequence[T], by: int) -> list[T]:
    """The methods in the order of a later run: what one leaves behind (files to be deleted, say) must not always meet the same."""
    first = by % len(methods)
    return [*methods[first:], *methods[:first]]


def measure(
    lab: Lab,
    scenario: Scenario,
    name: str,
    method: Method | Measurement | None,
    number: int,
    progress: Progress = lambda step: None,
    nodes: int = 2,
) -> Record:
    """One run, in the lab, which is brought up with `nodes` nodes where it is not. What went wrong in it is in the record, too."""
    record: Record = {
        "scenario": scenario.name,
        "method": name,
        "run": number,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
        "link": scenario.link,
        "workload": scenario.workload.to_dict() if scenario.workload else None,
    }
    try:
        lab.up(nodes, scenario.link, progress=progress)
        record["machine"] = machine_facts.describe(lab)
        if method is None:
            return record | _floor(lab)
        if isinstance(method, Measurement):
            return record | method.measure(lab, progress)
        assert scenario.workload is not None, "a method moves a job"
        return record | _move(lab, method, scenario.workload)
    except PodferryError as error:
        return record | {"outcome": ERROR, "error": error.to_dict()}
    except Exception as error:  # noqa: BLE001 - hours of other runs are not to be lost to one
        return record | {"outcome": ERROR, "error": Bug.because("the benchmark broke", error).to_dict()}


def read(files: Sequence[Path]) -> list[Record]:
    """The records in results files. Raises `Failed` for a line that is none."""
    records = []
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                record = json.loads(line)
                record["scenario"], record["method"], record["outcome"]
            except (ValueError, KeyError, TypeError) as wrong:
                raise Failed.because(f"{path}, line {number} is no record of a run", wrong) from wrong
            records.append(record)
    return records


def _floor(lab: Lab) -> Record:
    facts = floor(lab)
    return {"outcome": "completed", "downtime_ms": sum(facts["steps"].values()), "facts": facts}


def _move(lab: Lab, method: Method, workload: Workload) -> Record:
    method.stop(lab)
    job = method.start(lab, workload)
    ready = time.time_ns()
    time.sleep(BEFORE)
    sent = agent_usage.sent_bytes(lab, SOURCE)
    moved = method.move(job)
    sent = agent_usage.sent_bytes(lab, SOURCE) - sent
    time.sleep(AFTER)
    record = observed(moved, job.report(), ready) | {"link_bytes": sent, "where": job.node}
    method.stop(lab)
    return record


def observed(moved: Moved, report: Report, ready: int) -> Record:
    """What the job saw of a move, and what moved it tells; times in ms. `ready` (ns) is when the job had begun to run."""
    facts: Mapping[str, Any] = moved.facts
    record: Record = {
        "outcome": moved.outcome,
        "total_ms": (moved.ended - moved.began) / 1e6,
        "downtime_ms": None,
        "home_ms": None,
        "stall_ms": None,
        "stalled_ms": None,
        "stalls_ms": [],
        "written_bytes": None,
        "damaged": len(report.damaged),
        "damaged_files": len(report.damaged_files),
        "diagnoses": list(report.diagnoses),
        "facts": facts,
    }
    for name in ("agents_downtime_ms", "wire_bytes", "nonzero_bytes", "rounds"):
        record[name] = facts.get(name)
    gap = report.gap_at(moved.frozen) if moved.frozen else None
    stopped, resumed = gap or (moved.ended, moved.ended)
    if gap:
        home = moved.home or moved.ended
        record["downtime_ms"] = (resumed - stopped) / 1e6
        record["home_ms"] = (home - moved.began) / 1e6
        stalls = [gap / 1e6 for gap in report.longest_gaps(resumed, max(home, resumed) + SECOND)]
        record["stall_ms"], record["stalled_ms"] = max(stalls, default=0.0), sum(stalls)
        record["stalls_ms"] = stalls[:STALLS]
    record["written_bytes"] = report.written_between(moved.began, stopped)
    record["speed"] = {
        "before": _speed(report.speed(ready, moved.began)),
        "during": _speed(report.speed(moved.began, stopped)),
        "second_after": _speed(report.speed(resumed + SECOND, resumed + 2 * SECOND)),
    }
    record["resumed_ms"] = (resumed - moved.began) / 1e6 if gap else None
    record["series"] = series(report, ready, moved.began)
    record["lost"] = _lost(moved, report, ready, gap)
    return record


def _lost(moved: Moved, report: Report, ready: int, gap: tuple[int, int] | None) -> dict[str, float] | None:
    """Lost work; where a move says that it began the job anew, that and all that was computed before."""
    if (again := moved.facts.get("restart_ms")) is not None:
        computed = (moved.began - ready) / 1e6
        parts = {"precopy_ms": 0.0, "stop_ms": again, "after_ms": 0.0, "again_ms": computed}
        return {**parts, "total_ms": again + computed, "window_ms": again}
    if moved.frozen is not None and gap is None:
        return None  # it was stopped, and its own clock does not show when
    found = lost_work(report, ready, moved.began, gap)
    return found.to_dict() if found else None


def _speed(speed: Speed | None) -> dict[str, float] | None:
    return asdict(speed) if speed else None
