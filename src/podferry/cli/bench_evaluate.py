"""`podferry bench evaluate`: a plan of runs, unattended, and the report of it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from podferry.bench import runner
from podferry.bench.evaluation import html_report, plan_runner, run_plan
from podferry.bench.evaluation.plan_runner import TimeBudget
from podferry.bench.scenarios import Scenario
from podferry.cli.terminal import stderr, stdout, steps, words
from podferry.errors import UsageError
from podferry.lab import Lab
from podferry.lab.state import require_root

RESULTS = "results.jsonl"
OUT = Path("evaluation")
MINUTES, QUICK_MINUTES = 90.0, 2.0
LabName = Annotated[
    str,
    typer.Option(
        "--lab",
        metavar="NAME",
        help="The lab to use; it is created where it does not exist, and again after a failed run.",
    ),
]


def evaluate(
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            min=0.5,
            metavar="MINUTES",
            help="Time for all runs, those of earlier sittings included. [default: 90; 2 with --quick]",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run a subset that takes two minutes.")] = False,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            file_okay=False,
            help="The directory of results and report; an evaluation continues the results in it.",
        ),
    ] = OUT,
    report: Annotated[
        bool, typer.Option("--report", help="Write the report of existing results, and run nothing.")
    ] = False,
    show_plan: Annotated[
        bool, typer.Option("--plan", help="Show one round of the plan with its times, and run nothing.")
    ] = False,
    lab: LabName = "bench",
) -> None:
    """Measure along every axis, unattended, and write one report: index.html, and the same as README.md with figures.

    Rounds of all runs are repeated as far as the time goes. Interrupted or killed, it goes on where it was when it is started
    again; a run killed in the middle is repeated. Use a machine that does nothing else.

    Example: [bold]podferry bench evaluate --budget 90 --out evaluation[/]
    """
    results = out / RESULTS
    scenarios, left_out = run_plan.carried(run_plan.quick() if quick else run_plan.full(), plan_runner.free_bytes())
    if show_plan:
        stdout().print(as_table(scenarios))
        return
    minutes = budget or (QUICK_MINUTES if quick else MINUTES)
    if not report:
        _run(Lab(lab), scenarios, results, minutes * 60)
    records = run_plan.latest(runner.read([results])) if results.exists() else []
    if not records:
        raise UsageError(f"there are no runs in {results}", remedy="run podferry bench evaluate without --report")
    command = shlex.join(["podferry", "bench", "evaluate", f"--budget={minutes:g}", *["--quick"] * quick])
    page = html_report.write(records, out, command, [why(one) for one in left_out])
    stderr().print(words(f"written: {page}"))


def why(scenario: Scenario) -> str:
    """Why a scenario was left out."""
    return f"{scenario.name} ({scenario.about}), which needs {run_plan.needed_bytes(scenario) / 2**30:.0f} GiB of free memory"


def as_table(scenarios: Sequence[Scenario]) -> Table:
    """One round, with how long each run takes about."""
    table = Table(box=None, pad_edge=False)
    for title in ("SCENARIO", "METHOD", "SECONDS", ""):
        table.add_column(title, overflow="fold")
    total = 0.0
    for step in run_plan.steps(scenarios, 1):
        total += step.estimate()
        table.add_row(step.scenario.name, step.method, f"{step.estimate():.0f}", words(step.scenario.about, "dim"))
    table.add_row("", "a round", f"{total:.0f}", "")
    return table


def _run(place: Lab, scenarios: Sequence[Scenario], results: Path, seconds: float) -> None:
    """The runs that are still to be made, in a lab that is taken down again where it was not there before."""
    require_root()
    if results.exists():
        plan_runner.repair(results)
        plan_runner.require_same_commit(runner.read([results]), results)
    found = place.exists()
    try:
        with steps() as progress:
            measure = plan_runner.measuring(place, progress)
            for record in plan_runner.evaluate(measure, scenarios, results, TimeBudget(seconds), progress):
                stdout().print(words(line(record)))
    finally:
        if not found:
            with steps() as progress:
                place.down(progress)


def line(record: dict[str, Any]) -> str:
    """One run as a line."""
    lost = (record.get("lost") or {}).get("total_ms")
    told = [(record.get("downtime_ms"), "stopped"), (lost, "lost"), (record.get("first_pull_ms"), "first pull")]
    figures = ", ".join(f"{value:.0f} ms {what}" for value, what in told if value is not None)
    return f"{record['scenario']}, {record['method']}, run {record['run']}: {record['outcome']} {figures}".rstrip()
