"""`podferry bench`: measure podferry, and what there was before it, in a lab on this machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from podferry.bench import figures, report, runner
from podferry.bench.goals import verdicts
from podferry.bench.scenarios import SCENARIOS, chosen, restricted
from podferry.cli.bench_compare import compare_results
from podferry.cli.bench_evaluate import LabName, evaluate
from podferry.cli.terminal import print_json, stderr, stdout, steps, words
from podferry.errors import UsageError
from podferry.lab import Lab
from podferry.lab.state import require_root

FIGURES = {
    "stopped": "downtime_ms",
    "first pull": "first_pull_ms",
    "second start": "second_start_ms",
    "until all have it": "all_have_it_ms",
}
RESULTS = Path("bench-results.jsonl")

app = typer.Typer(
    help="Measure moves of jobs: by podferry, by CRIU alone, and the lowest downtime that CRIU allows. Needs root.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.command("compare")(compare_results)
app.command("evaluate")(evaluate)


@app.command("list")
def list_scenarios() -> None:
    """List the scenarios and the methods that each one compares."""
    table = Table(box=None, pad_edge=False)
    for title in ("SCENARIO", "METHODS", ""):
        table.add_column(title, overflow="fold")
    for one in SCENARIOS.values():
        table.add_row(one.name, ", ".join(one.methods), words(one.about, "dim"))
    stdout().print(table)


@app.command()
def run(
    scenarios: Annotated[
        list[str], typer.Argument(metavar="SCENARIO...", help="Scenarios, as `podferry bench list` names them.")
    ],
    method: Annotated[
        list[str] | None, typer.Option("--method", metavar="NAME", help="Run this method alone; may be repeated.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, metavar="N", help="Run each method N times, in turn.")] = 1,
    results: Annotated[
        Path, typer.Option(metavar="FILE", help="Append one JSON line for each run to this file.")
    ] = RESULTS,
    json: Annotated[bool, typer.Option("--json", help="Print each run's record, too.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the lab up at the end.")] = False,
    lab: LabName = "bench",
) -> None:
    """Run scenarios and record every run; then say which goals the results meet.

    Example: [bold]podferry bench run downtime small large --repeat 10[/]
    """
    require_root()
    selected, place, records = restricted(chosen(scenarios), method or []), Lab(lab), []
    found = place.exists()
    try:
        with steps() as progress:
            for record in runner.run(place, selected, repeat, results, progress):
                records.append(record)
                if json:
                    print_json(record, indent=None)
                else:
                    stdout().print(words(_line(record)))
    finally:
        if not (found or keep):
            with steps() as progress:
                place.down(progress)
    if not json:
        _print_goals(records)
    stderr().print(words(f"written: {results}", "dim"))


@app.command("report")
def make_report(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", exists=True, help="Results that `run` has written.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Write the report there instead of the goals to stdout: FILE.md, or results.md in DIR."
        ),
    ] = None,
    made_by: Annotated[
        str | None,
        typer.Option("--made-by", metavar="COMMAND", help="The command that made the files, for the report."),
    ] = None,
) -> None:
    """Turn results into tables and figures.

    Example: [bold]podferry bench report bench-results.jsonl --out docs/benchmarks[/]
    """
    records = runner.read(files)
    if not records:
        raise UsageError("there are no runs in these files")
    if out is None:
        _print_goals(records)
        return
    page = out if out.suffix == ".md" else out / "results.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    names = sorted({record["scenario"] for record in records}, key=list(SCENARIOS).index)
    command = made_by or shlex.join(["podferry", "bench", "run", *names])
    pictures = "".join(f"\n![{path.stem}]({path.name})\n" for path in figures.draw(records, page.parent))
    page.write_text(report.markdown(records, command) + pictures)
    stderr().print(words(f"written: {page}"))


def _line(record: dict[str, object]) -> str:
    """One run as a line."""
    found = (
        f"{float(value):.0f} ms {what}"  # type: ignore[arg-type]
        for what, field in FIGURES.items()
        if (value := record.get(field)) is not None
    )
    return f"{record['scenario']}, {record['method']}, run {record['run']}: {record['outcome']} {', '.join(found)}".rstrip()


def _print_goals(records: list[dict[str, object]]) -> None:
    titles, *rows = report.goal_rows(one for one in verdicts(records) if one.measured is not None)
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title.upper(), overflow="fold")
    for row in rows:
        table.add_row(*row)
    if rows:
        stdout().print(table)
