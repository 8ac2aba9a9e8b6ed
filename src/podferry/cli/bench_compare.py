"""`podferry bench compare`: two results files beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from podferry.bench import compare, runner
from podferry.bench.compare import CONFIDENCE, FIGURES, THRESHOLD, ChangeVerdict, Comparison
from podferry.cli.terminal import print_json, stderr, stdout, words
from podferry.errors import UsageError

GOT_WORSE = 1
STYLES = {ChangeVerdict.WORSE: "red", ChangeVerdict.FAILED: "red", ChangeVerdict.BETTER: "green"}

Results = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, help="Results that `run` or `evaluate` has written.")
]


def compare_results(
    old: Results,
    new: Results,
    threshold: Annotated[
        float,
        typer.Option(min=1.0, metavar="RATIO", help="Exit with 1 where a figure got worse by more than this ratio."),
    ] = THRESHOLD,
    figure: Annotated[
        list[str] | None,
        typer.Option(
            "--figure", metavar="NAME", help=f"Compare this figure alone; may be repeated. One of {', '.join(FIGURES)}."
        ),
    ] = None,
    relative_to: Annotated[
        str | None,
        typer.Option(
            "--relative-to",
            metavar="METHOD",
            help="Divide each figure by that of this method in the same run first; so a busy machine counts less.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the comparisons as JSON.")] = False,
) -> None:
    """Say what got better and what worse between two sets of runs, and what may be chance.

    Runs are paired by scenario, method and number. Less is better in every figure. Fewer than six pairs show no difference
    at the level of 5 %. Exits with 1 where a figure got worse beyond the threshold, or a method no longer completes.

    Example: [bold]podferry bench compare before.jsonl after.jsonl --threshold 1.15[/]
    """
    if unknown := set(figure or ()) - FIGURES.keys():
        raise UsageError(f"there is no figure {min(unknown)!r}", remedy=f"there are {', '.join(FIGURES)}")
    before, after = runner.read([old]), runner.read([new])
    found = compare.compare(before, after, figures=figure or (), relative_to=relative_to)
    missing = compare.only_in(before, after)
    worse = [one for one in found if one.beyond(threshold)]
    if json:
        print_json({"comparisons": [one.to_dict() for one in found], "only_in_old": missing, "worse": len(worse)})
    else:
        if not found:
            raise UsageError(
                "no run of the second file has its counterpart in the first",
                why="runs are paired by scenario, method and number",
            )
        stdout().print(as_table(found))
        if missing:
            stderr().print(words(f"only in {old}: {'; '.join(missing)}", "dim"))
    if worse:
        raise typer.Exit(GOT_WORSE)


def as_table(found: Sequence[Comparison]) -> Table:
    """The comparisons for a person."""
    table = Table(box=None, pad_edge=False)
    for title in ("SCENARIO", "METHOD", "FIGURE", "PAIRS", "OLD", "NEW", "RATIO", f"{CONFIDENCE:.0%}", "P", ""):
        table.add_column(title, overflow="fold")
    for one in found:
        verdict = words(str(one.verdict), STYLES.get(one.verdict, ""))
        table.add_row(one.scenario, one.method, one.figure, str(one.pairs), *cells(one), verdict)
    return table


def cells(one: Comparison) -> list[str]:
    """Its numbers: old, new, ratio, interval, chance."""
    interval = "-" if one.low is None or one.high is None else f"{one.low:.2f}-{one.high:.2f}"
    return [_number(one.old), _number(one.new), _number(one.ratio, ".2f"), interval, _number(one.p, ".3f")]


def _number(value: float | None, digits: str = ".4g") -> str:
    return "-" if value is None else format(value, digits)
