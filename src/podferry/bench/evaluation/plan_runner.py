"""Carries out a plan: unattended, within a time, and on from where it was interrupted. The results file says what is done."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from podferry.bench import machine_facts, runner
from podferry.bench.evaluation import run_plan
from podferry.bench.evaluation.run_plan import PlannedRun
from podferry.bench.scenarios import Scenario
from podferry.errors import PodferryError, UsageError
from podferry.lab import Lab

Record = dict[str, Any]
Progress = Callable[[str], None]
Measure = Callable[[PlannedRun], Record]


@dataclass(frozen=True)
class TimeBudget:
    """Seconds for all runs, those of earlier sittings included."""

    seconds: float
    clock: Callable[[], float] = time.monotonic


def evaluate(
    measure: Measure, scenarios: Sequence[Scenario], results: Path, budget: TimeBudget, progress: Progress
) -> Iterator[Record]:
    """Run what the results file does not have yet, until there is no step left for which the time is enough.

    Each record is appended as soon as it is there; a run that is killed leaves none, and is run again the next time. Raises the
    error of the last of `runner.ENOUGH_ERRORS` runs in a row that the benchmark could not do.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    repair(results)
    records = runner.read([results]) if results.exists() else []
    before, began = run_plan.spent(records), budget.clock()
    there = run_plan.done(records)
    rounds = max((key[2] for key in there), default=0) + run_plan.ROUNDS
    in_a_row, left_out = 0, 0
    for step in run_plan.steps(scenarios, rounds):
        if step.key in there:
            continue
        used = before + budget.clock() - began
        if used + step.estimate(records) > budget.seconds:
            left_out += 1
            if left_out > sum(len(one.methods) for one in scenarios):
                return  # a whole round without one that is short enough
            continue
        left_out = 0
        progress(
            f"{used / 60:.0f} of {budget.seconds / 60:.0f} min: round {step.number}, {step.scenario.name}, {step.method}"
        )
        since = budget.clock()
        record = measure(step) | {"seconds": round(budget.clock() - since, 1)}
        append(results, record)
        records.append(record)
        yield record
        in_a_row = in_a_row + 1 if record["outcome"] == runner.ERROR else 0
        if in_a_row == runner.ENOUGH_ERRORS:
            raise PodferryError.from_dict(record["error"])


def measuring(lab: Lab, progress: Progress) -> Measure:
    """A step's run in `lab`, which is made anew after one that went wrong."""

    def measure(step: PlannedRun) -> Record:
        method = step.scenario.methods[step.method]
        nodes = max(step.scenario.nodes, len(lab.status().nodes) if lab.exists() else 0)
        record = runner.measure(lab, step.scenario, step.method, method, step.number, progress, nodes)
        if record["outcome"] == runner.ERROR:
            lab.down(progress)
        return record

    return measure


def append(results: Path, record: Record) -> None:
    """One more line, on the disk before the next run begins."""
    with results.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def repair(results: Path) -> None:
    """Cut off a last line that was not written to its end."""
    if results.exists():
        whole = results.read_bytes()
        if (end := whole.rfind(b"\n") + 1) < len(whole):
            with results.open("r+b") as file:
                file.truncate(end)


def require_same_commit(records: Sequence[Record], results: Path) -> None:
    """Refuse to go on in results of another commit: medians over both would say nothing of either. Raises `UsageError`."""
    here = machine_facts.commit()
    others = {one["machine"]["commit"] for one in records if "machine" in one} - {here}
    if others:
        raise UsageError(
            f"{results} has runs of commit {min(others)}, and this is {here}",
            remedy="write to another directory with --out, or remove the file",
        )


def free_bytes() -> int:
    """Memory that the machine has to give."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10
