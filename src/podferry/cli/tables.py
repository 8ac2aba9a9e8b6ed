"""The text output of `ps`, `status` and `check`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from podferry.cli import units
from podferry.cli.agents import AgentAnswers
from podferry.cli.chart import STYLE
from podferry.cli.record import Record
from podferry.cli.terminal import print_error, stderr, stdout, words
from podferry.errors import PodferryError

CONNECTIONS = 20
"""Of those that a check lists, shown to people."""


def print_containers(answers: AgentAnswers) -> None:
    """The containers, node by node."""
    table = _table("NAME", "NODE", "STATE", "MEMORY", "MOVABLE", "IMAGE")
    for row in answers.rows:
        movable = words("yes", "green") if row.get("movable") else words(f"no: {row.get('why') or '?'}", "yellow")
        table.add_row(
            words(row.get("name", "?")),
            words(row.get("node", "?")),
            words(row.get("state", "?")),
            units.size(row.get("memory_bytes")),
            movable,
            words(row.get("image", "")),
        )
    if answers.rows:
        stdout().print(table)
    else:
        stderr().print("no containers; `podferry lab run --help` tells how to start one")
    print_down(answers)


def print_records(answers: AgentAnswers) -> None:
    """The migrations, a line each in eighty columns, the newest last; an id begins with the day and time it was made."""
    table = _table("ID", "NAME", "WAY", "STATE", "DOWNTIME", "TOTAL")
    for record in map(Record.from_dict, answers.rows):
        table.add_row(
            words(record.id),
            words(record.name),
            words(f"{record.source} > {record.target}"),
            words(record.outcome, STYLE[record.outcome]) if record.outcome else words(record.phase, "cyan"),
            units.duration(record.downtime_ms) if record.downtime_ms is not None else "",
            units.duration(record.total_ms) if record.total_ms is not None else "",
        )
    if answers.rows:
        stdout().print(table)
    else:
        stderr().print("no migrations yet")
    print_down(answers)


def print_down(answers: AgentAnswers) -> None:
    """A line for every node that did not answer."""
    for node, error in answers.down:
        stderr().print(words(error if node in str(error) else f"{node}: {error}", "yellow"))


def print_check(result: dict[str, Any]) -> None:
    """What a move would meet."""
    console = stdout()
    way = f"{result.get('name')} from {result.get('source')} to {result.get('target')}"
    if result.get("movable"):
        console.print(words(f"{way} can move.", "bold green"))
    else:
        console.print(words(f"{way} cannot move.", "bold yellow"))
    for refusal in result.get("refusals") or []:
        print_error(PodferryError.from_dict(refusal))
    for warning in result.get("warnings") or []:
        console.print(words(f"mind: {warning}", "yellow"))
    print_connections(result.get("connections") or [])
    _rehearsal(console, result.get("rehearsal") or {})
    _facts(console, result)


def print_connections(found: list[dict[str, Any]]) -> None:
    """What a move makes of each connection, as `podferry.core.connections` lists them: those that it costs come first."""
    if not found:
        return
    table = _table("", "LOCAL", "PEER", "WITH", "FATE")
    for one in found[:CONNECTIONS]:
        peer = one["remote"] + (f" ({one['backend']})" if one["backend"] else "")
        style = "" if one["fate"] == "lives" else "yellow"
        table.add_row(
            words(one["protocol"]), words(one["local"]), words(peer), words(one["peer"]), words(one["fate"], style)
        )
    stdout().print(table)
    for why in dict.fromkeys(f"{one['fate']}: {one['why']}" for one in found):
        stdout().print(words(f"  {why}", "dim"))
    if len(found) > CONNECTIONS:
        stdout().print(words(f"  and {len(found) - CONNECTIONS} more; --json lists them", "dim"))


def _rehearsal(console: Console, rehearsal: dict[str, Any]) -> None:
    if (stood := rehearsal.get("stood_still_ms")) is not None:
        console.print(words(f"It was rehearsed, and stood still for {units.duration(stood)}."))
    if (forecast := rehearsal.get("forecast_ms")) is not None:
        console.print(
            words(f"In a move it would stand still for about {units.duration(forecast)}, and what its last pages take.")
        )


def _facts(console: Console, result: dict[str, Any]) -> None:
    memory, upper = units.size(result.get("memory_bytes")), units.size(result.get("upper_bytes"))
    console.print(words(f"memory {memory}, changed files {upper}", "dim"))
    if tracker := result.get("tracker"):
        reason = result.get("tracker_reason")
        console.print(words(f"written pages are found by {tracker}{f' ({reason})' if reason else ''}", "dim"))


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        right = title in ("MEMORY", "DOWNTIME", "TOTAL")
        table.add_column(
            title,
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=title in ("ID", "STATE", "DOWNTIME", "TOTAL", "MEMORY"),
        )
    return table
