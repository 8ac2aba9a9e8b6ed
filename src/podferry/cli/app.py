"""`podferry`: the commands, and the one place where errors become text and exit codes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from podferry import __version__
from podferry.cli import chart, complete, tables
from podferry.cli.agents import AgentOptions, Fleet
from podferry.cli.bench import app as bench_commands
from podferry.cli.demo import demo
from podferry.cli.doctor import doctor
from podferry.cli.exits import OF_OUTCOME, Exit
from podferry.cli.images import app as image_commands
from podferry.cli.install import install, uninstall
from podferry.cli.lab import app as lab_commands
from podferry.cli.migrate import Follower
from podferry.cli.pki import app as pki_commands
from podferry.cli.record import Record
from podferry.cli.running import run_program
from podferry.cli.terminal import print_error, print_json, stderr, stdout, words
from podferry.cli.units import parse_rate
from podferry.cli.views import choose
from podferry.errors import Bug, UsageError
from podferry.model import Connections, Mode

EXIT_CODES = """Exit codes: 0 done, 1 a bug, 2 wrong usage, 3 refused, 4 rolled back, 5 failed, 6 cancelled,
7 no agent answers, 130 left with Ctrl-C."""

app = typer.Typer(
    name="podferry",
    help="Move running jobs between nodes, with their memory and files, stopped for a fraction of a second.",
    epilog="Start with `podferry lab demo`: it builds a small cluster here and moves a computing job in it.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="The container, as `podferry ps` names it.", autocompletion=complete.containers
    ),
]
Id = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="The migration, as `podferry status` names it.", autocompletion=complete.migrations
    ),
]
To = Annotated[str, typer.Option("--to", metavar="NODE", help="The node to move it to.", autocompletion=complete.nodes)]
MayClose = Annotated[
    Connections,
    typer.Option(
        "--connections",
        case_sensitive=False,
        help="What may become of connections whose other end stays: Close, or Require: no move where one would be lost. Preserve "
        "is for pods: kubectl podferry migrate.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, as docs/cli.md specifies it.")]
Lab = Annotated[
    str | None, typer.Option("--lab", metavar="NAME", help="The lab to use (env PODFERRY_LAB, or 'default').")
]
Agent = Annotated[
    Path | None,
    typer.Option("--agent", metavar="SOCKET", help="Ask the agent at this socket alone (env PODFERRY_AGENT)."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
]


@app.callback(invoke_without_command=True)
def podferry(context: typer.Context, lab: Lab = None, agent: Agent = None, _: Version = False) -> None:
    """Move running jobs between nodes, with their memory and files, stopped for a fraction of a second."""
    context.obj = AgentOptions(lab, agent)
    if lab and context.invoked_subcommand == "lab":
        os.environ["PODFERRY_LAB"] = lab  # where the lab's own commands look for their default
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _fleet(context: typer.Context, lab: str | None, agent: Path | None) -> Fleet:
    return Fleet.find(AgentOptions(lab, agent).over(context.obj or AgentOptions()).settle())


@app.command()
def ps(context: typer.Context, json: Json = False, lab: Lab = None, agent: Agent = None) -> None:
    """List the containers that podferry sees, and whether they can move.

    Example: [bold]podferry ps[/]
    """
    answers = _fleet(context, lab, agent).containers()
    if json:
        print_json({"containers": answers.rows, "nodes_down": answers.down_dicts()})
    else:
        tables.print_containers(answers)


@app.command()
def check(
    context: typer.Context,
    *,
    name: Name,
    to: To,
    rehearse: Annotated[
        bool,
        typer.Option(
            "--rehearse",
            help="Rehearse the move: CRIU dumps the container without its memory, and the target checks the images. "
            "The job stands still for about 0.1 s and goes on; its `exec` sessions end, as in a move.",
        ),
    ] = False,
    connections: MayClose = Connections.CLOSE,
    json: Json = False,
    lab: Lab = None,
    agent: Agent = None,
) -> None:
    """Check whether a container can move, and list the reasons why not. Changes nothing without --rehearse.

    Exit code 0 means that the container can move, 3 that it cannot.

    Examples:

    [bold]podferry check train --to node-b[/]

    [bold]podferry check train --to node-b --rehearse[/]
    """
    asked: dict[str, Any] = {"name": name, "to": to, "rehearse": rehearse, "connections": connections.value}
    result = _fleet(context, lab, agent).holder(name).call("check", timeout=None, **asked)
    if json:
        print_json(result)
    else:
        tables.print_check(result)
    if not result.get("movable"):
        raise typer.Exit(Exit.REFUSED)


@app.command(epilog=EXIT_CODES)
def migrate(
    context: typer.Context,
    *,
    name: Name,
    to: To,
    mode: Annotated[
        Mode, typer.Option(help="live copies memory while the job runs; stop and postcopy freeze it first.")
    ] = Mode.LIVE,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="S", min=0, help="Roll the migration back if it is not done after S seconds."),
    ] = None,
    max_downtime: Annotated[
        float | None,
        typer.Option(
            metavar="MS", min=0, help="Freeze the job only when the expected downtime is below MS milliseconds."
        ),
    ] = None,
    max_freeze: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=0.1,
            help="Thaw the job and roll back when it has been frozen for S seconds before the switchover. Default: 5 s beyond "
            "--max-downtime; in mode stop, when nothing could be sent for 2 min.",
        ),
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(metavar="RATE", help="Send at most RATE: 100mbit, 50MiB, ...")
    ] = None,
    allow_postcopy: Annotated[
        bool,
        typer.Option(
            "--allow-postcopy", help="Switch to post-copy where the job writes memory faster than the link carries it."
        ),
    ] = False,
    connections: MayClose = Connections.CLOSE,
    json: Json = False,
    lab: Lab = None,
    agent: Agent = None,
) -> None:
    """Move a running container to another node.

    Ctrl-C rolls the migration back: the job runs on at the source. After a second Ctrl-C the agent finishes alone.

    Examples:

    [bold]podferry migrate train --to node-b[/]

    [bold]podferry migrate train --to node-b --max-downtime 300 --bandwidth 500mbit --timeout 600[/]

    [bold]podferry migrate train --to node-b --json | tail -n 1 | jq .downtime_ms[/]
    """
    rate = None if bandwidth is None else parse_rate(bandwidth)
    record = Follower(_fleet(context, lab, agent).holder(name), choose(json)).run(
        name=name,
        to=to,
        mode=mode.value,
        timeout_s=timeout,
        max_downtime_ms=max_downtime,
        max_freeze_s=max_freeze,
        bandwidth=rate,
        allow_postcopy=allow_postcopy,
        connections=connections.value,
    )
    if json:
        print_json({"type": "result", **record.raw}, indent=None)
    else:
        stdout().print(chart.summary(record))
        if record.error is not None:
            print_error(record.error)
    if record.outcome is None:
        raise Bug("the agent ended a migration without an outcome", why=f"it is in phase '{record.phase}'")
    raise typer.Exit(OF_OUTCOME[record.outcome])


@app.command()
def status(
    context: typer.Context,
    *,
    id: Annotated[
        str | None,
        typer.Argument(
            metavar="[ID]", help="The migration to show; all of them if omitted.", autocompletion=complete.migrations
        ),
    ] = None,
    json: Json = False,
    lab: Lab = None,
    agent: Agent = None,
) -> None:
    """Show the migrations under way and past ones, or one of them.

    Example: [bold]podferry status[/]
    """
    fleet = _fleet(context, lab, agent)
    if id is None:
        answers = fleet.records()
        if json:
            print_json({"migrations": answers.rows, "nodes_down": answers.down_dicts()})
        else:
            tables.print_records(answers)
    else:
        _show(fleet.record(id), json)


@app.command()
def cancel(context: typer.Context, id: Id, json: Json = False, lab: Lab = None, agent: Agent = None) -> None:
    """Cancel a migration that is under way: the job runs on at the source.

    Example: [bold]podferry cancel 7f3a[/]
    """
    fleet = _fleet(context, lab, agent)
    record = fleet.record(id)
    _show(Record.from_dict(fleet.first_of([record.source, record.target]).call("cancel", id=id)), json)


@app.command()
def resolve(
    context: typer.Context,
    *,
    id: Id,
    run_on: Annotated[
        str,
        typer.Option(
            "--run-on", metavar="NODE", help="The node that is to run the job.", autocompletion=complete.nodes
        ),
    ],
    json: Json = False,
    lab: Lab = None,
    agent: Agent = None,
) -> None:
    """Decide where a job runs whose nodes lost contact in the middle of a migration.

    Needed only when a migration is in phase [bold]lost-contact[/] and the nodes cannot reach each other again: the source
    is frozen and does not know whether the target runs the job. First make sure that the [bold]other[/] node is down for
    good: podferry cannot undo a job that ran twice.

    Example: [bold]podferry resolve 7f3a --run-on node-a[/]
    """
    fleet = _fleet(context, lab, agent)
    record = fleet.record(id)
    nodes = [record.source, record.target]
    if run_on not in nodes:
        raise UsageError(
            f"{run_on} is neither the source nor the target of {id}", remedy=f"choose {' or '.join(nodes)}"
        )
    loser = record.target if run_on == record.source else record.source
    if silent := fleet.stand_down(loser, id=id, run_on=run_on):
        stderr().print(words(f"{loser} could not be told, so it is yours to keep it down: {silent}", "yellow"))
    _show(Record.from_dict(fleet.at(run_on).call("resolve", id=id, run_on=run_on)), json)


@app.command()
def explain(
    context: typer.Context,
    *,
    id: Id,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a self-contained HTML page to FILE instead; - for stdout."),
    ] = None,
    lab: Lab = None,
    agent: Agent = None,
) -> None:
    """Explain one migration: what happened when, and where the downtime went.

    Examples:

    [bold]podferry explain 7f3a[/]

    [bold]podferry explain 7f3a --html report.html[/]
    """
    record = _fleet(context, lab, agent).record(id)
    if html is None:
        stdout().print(chart.explained(record))
        return
    from podferry.cli.page import page

    if str(html) == "-":
        typer.echo(page(record))
        return
    try:
        html.write_text(page(record), encoding="utf-8")
    except OSError as unwritable:
        raise UsageError(f"cannot write {html}", why=unwritable.strerror or str(unwritable)) from unwritable
    stderr().print(words(f"written: {html}"))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"podferry {__version__}")


def _show(record: Record, json: bool) -> None:
    if json:
        print_json(record.raw)
    else:
        stdout().print(chart.summary(record))


app.command()(doctor)
app.command()(install)
app.command()(uninstall)
lab_commands.command("demo")(demo)
app.add_typer(lab_commands, name="lab")
app.add_typer(bench_commands, name="bench")
app.add_typer(pki_commands, name="pki")
app.add_typer(image_commands, name="images")


def run(argv: list[str]) -> int:
    """Run one command to its end and return its exit code; every error has been printed by then."""
    return run_program(app, "podferry", argv)
