"""`kubectl podferry`: the commands. kubectl finds the program `kubectl-podferry` on the PATH and hands it what was typed.

The file is long because most of it is the options of each command with their help; what a command does is in `kubectl_*.py`.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Annotated, Any

import typer

from podferry import __version__
from podferry.cli import kubectl_drain as draining
from podferry.cli import kubectl_look as looking
from podferry.cli import kubectl_moves as moves
from podferry.cli import kubectl_preview as previewing
from podferry.cli import kubectl_resources as resourcing
from podferry.cli import kubectl_tables as tables
from podferry.cli import kubectl_verify as verifying
from podferry.cli.exits import OF_OUTCOME, Exit
from podferry.cli.kubectl_moves import ClusterOptions
from podferry.cli.kubectl_options import (
    Context,
    Json,
    Kubeconfig,
    MayClose,
    MigrationName,
    Namespace,
    PodName,
    do,
    offering,
)
from podferry.cli.running import run_program
from podferry.cli.terminal import print_error, print_json, stderr, stdout
from podferry.cli.units import parse_rate
from podferry.cli.views import choose
from podferry.core.drain import DrainPhase
from podferry.core.migration import OUTCOME_OF_END
from podferry.errors import UsageError
from podferry.kube.client import NODES
from podferry.model import Mode

EXIT_CODES = """Exit codes: 0 done, 1 a bug, 2 wrong usage, 3 refused, 4 rolled back, 5 failed, 6 cancelled,
7 no API server answers, 130 left with Ctrl-C."""

REHEARSED_TTL = 3600
"""Seconds for which the Migration of a rehearsal stays."""

app = typer.Typer(
    name="kubectl podferry",
    help="Move running pods between nodes, with their memory and files, stopped for a fraction of a second.",
    epilog="A pod can move if it was started with runtimeClassName: podferry. Begin with `kubectl podferry check POD`.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def podferry(context: typer.Context) -> None:
    """Move running pods between nodes, with their memory and files, stopped for a fraction of a second."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(epilog=EXIT_CODES)
def migrate(
    *,
    pod: PodName,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="NODE", help="Default: the scheduler chooses.", autocompletion=offering(NODES)),
    ] = None,
    selector: Annotated[
        list[str] | None,
        typer.Option("--node-selector", metavar="KEY=VALUE", help="A label that the target node must have."),
    ] = None,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="live copies memory while the job runs; stop and postcopy freeze it first. "
            "Default: that of the pod's MigrationPolicy, or live."
        ),
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Roll the Migration back if it is not done after this time. Default: that of the pod's MigrationPolicy, or 1h.",
        ),
    ] = None,
    max_downtime: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Freeze the job only when the expected downtime is below this, e.g. 300ms."),
    ] = None,
    max_freeze: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Thaw the job and roll back when it has been frozen for so long before the switchover. "
            "Default: 5s beyond --max-downtime; in mode stop, when nothing could be sent for 2m.",
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
    allow_throttle: Annotated[
        bool,
        typer.Option(
            "--allow-throttle",
            help="Throttle the job's CPU time where it writes memory faster than the link carries it.",
        ),
    ] = False,
    connections: MayClose = None,
    requests: Annotated[
        list[str] | None,
        typer.Option(
            "--requests",
            metavar=resourcing.FORM,
            help="Have a container ask for this on the target instead, e.g. main:cpu=2,memory=4Gi.",
        ),
    ] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--limits", metavar=resourcing.FORM, help="Limit a container to this on the target instead, as --requests."
        ),
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(
            "--verify",
            metavar=verifying.FORM,
            help="What must hold of the job on the target; where it does not, the move fails (it cannot be taken back by then).",
        ),
    ] = None,
    verify_container: Annotated[
        str | None, typer.Option(metavar="NAME", help="The container that --verify asks. Default: the pod's first.")
    ] = None,
    verify_timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long after the resume that may take. Default: 30s.")
    ] = None,
    ttl: Annotated[
        str | None,
        typer.Option(
            "--ttl", metavar="TIME", help="Delete the Migration this long after its end, e.g. 1h; default: keep it."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="The Migration's name; default: move-POD and a random suffix."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")] = False,
    json: Json = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Move a running pod to another node.

    Ctrl-C cancels the Migration: the job runs on at the source. After a second Ctrl-C the cluster finishes alone.

    Examples:

    [bold]kubectl podferry migrate train-x7k2p[/]

    [bold]kubectl podferry migrate train-x7k2p --to node-b --max-downtime 300ms[/]

    [bold]kubectl podferry migrate train-x7k2p --json | tail -n 1 | jq -r .status.downtime[/]
    """
    where = ClusterOptions(namespace, context, kubeconfig)
    spec: dict[str, Any] = {
        "podName": pod,
        "targetNode": to,
        "nodeSelector": moves.labels(selector or []) or None,
        "mode": mode and mode.value,
        "timeout": timeout,
        "maxDowntime": max_downtime,
        "maxFreeze": max_freeze,
        "bandwidth": None if bandwidth is None else str(int(parse_rate(bandwidth))),
        "allowPostCopy": allow_postcopy or None,
        "allowAutoConverge": allow_throttle or None,
        "connections": connections and connections.value,
        "ttlSecondsAfterFinished": None if ttl is None else moves.whole_seconds(ttl),
    }
    if requests or limits:
        spec["resources"] = do(partial(resourcing.resources, where, pod, requests or [], limits or []))
    if verify is not None:
        spec["verify"] = verifying.parse(verify, verify_container, verify_timeout)
    body = moves.body(pod, name, {key: value for key, value in spec.items() if value is not None})
    if detach:
        made = do(partial(moves.create, where, body))
        print_json(made.to_json()) if json else stdout().print(f"migration/{made.name} created", markup=False)
        return
    end = do(partial(moves.follow_to_the_end, where, body, choose(json)))
    if json:
        print_json(end.to_json(), indent=None)
    else:
        tables.print_end(end)
    raise typer.Exit(OF_OUTCOME[OUTCOME_OF_END[end.status.phase]])


@app.command()
def check(
    *,
    pod: PodName,
    rehearse: Annotated[
        bool,
        typer.Option(
            "--rehearse",
            help="Rehearse the move: a node is chosen, and CRIU dumps the pod without its memory. "
            "The pod stands still for about 0.1 s.",
        ),
    ] = False,
    connections: MayClose = None,
    json: Json = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """List the reasons why a pod cannot move. Changes nothing without --rehearse.

    The agents check the node's side (kernel, CRIU, open files of the processes) at the start of a migration, also before
    they change anything. Their warnings from the pod's last move or rehearsal are shown. A rehearsal shows all of it, and what
    a move makes of each connection of the pod. Exit code 0 means that
    there is no reason, 3 that there is one. A rehearsal is a Migration with spec.dryRun, and has the exit code of one.

    Examples:

    [bold]kubectl podferry check train-x7k2p[/]

    [bold]kubectl podferry check train-x7k2p --rehearse[/]
    """
    if connections is not None and not rehearse:
        raise UsageError("--connections needs --rehearse", why="which connections a pod has only its node knows")
    where = ClusterOptions(namespace, context, kubeconfig)
    found, policy, warnings = do(partial(moves.obstacles, where, pod))
    if rehearse and not found:
        spec: dict[str, Any] = {"podName": pod, "dryRun": True, "ttlSecondsAfterFinished": REHEARSED_TTL}
        body = moves.body(pod, None, spec | ({"connections": connections.value} if connections else {}))
        end = do(partial(moves.follow_to_the_end, where, body, choose(json)))
        print_json(end.to_json(), indent=None) if json else tables.print_end(end)
        raise typer.Exit(OF_OUTCOME[OUTCOME_OF_END[end.status.phase]])
    refusals = [{**one.to_dict(), "reason": one.reason} for one in found]
    if json:
        said = {"policy": policy.name, "refusals": refusals, "warnings": warnings}
        print_json({"pod": pod, "movable": not found, **said})
    elif not found:
        stdout().print(f"{pod} can move.", style="bold green", markup=False)
    else:
        stdout().print(f"{pod} cannot move.", style="bold yellow", markup=False)
        for one in found:
            print_error(one)
    for warning in [] if json else warnings:
        stdout().print(f"  mind: {warning}", style="yellow", markup=False)
    if not json and policy.name:
        stdout().print(f"MigrationPolicy {policy.name} applies to it.", markup=False)
    elif not json and policy.hidden:
        stdout().print(
            "Whether a MigrationPolicy applies to it you may not read; its Migration will say.", markup=False
        )
    if found:
        raise typer.Exit(Exit.REFUSED)


@app.command(epilog=EXIT_CODES)
def drain(
    *,
    node: Annotated[str, typer.Argument(metavar="NODE", help="The node to empty.", autocompletion=offering(NODES))],
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show for each pod whether it would move, to which nodes, and how long that would take. Changes nothing.",
        ),
    ] = False,
    evict_others: Annotated[
        bool,
        typer.Option(
            "--evict-others",
            help="Evict the pods that cannot move. Their PodDisruptionBudgets are kept; the work they have computed is lost.",
        ),
    ] = False,
    parallel: Annotated[
        int,
        typer.Option(
            "--parallel", metavar="N", min=1, max=50, help="The number of moves out of the node at the same time."
        ),
    ] = 2,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="live copies memory while the job runs; stop and postcopy freeze it first. "
            "Default: that of each pod's MigrationPolicy, or live."
        ),
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Roll a move back if it is not done after this time. Default: that of each pod's MigrationPolicy, or 1h.",
        ),
    ] = None,
    allow_postcopy: Annotated[
        bool,
        typer.Option(
            "--allow-postcopy", help="Switch to post-copy where a job writes memory faster than the link carries it."
        ),
    ] = False,
    allow_throttle: Annotated[
        bool,
        typer.Option(
            "--allow-throttle", help="Throttle a job's CPU time where it writes memory faster than the link carries it."
        ),
    ] = False,
    within: Annotated[
        str | None,
        typer.Option(
            "--within",
            metavar="TIME",
            help="The node goes away in TIME, e.g. 10m. Moves that save most computed work until then go first.",
        ),
    ] = None,
    stop: Annotated[
        bool, typer.Option("--stop", help="Begin no further move; moves under way go on. Run `drain` again to resume.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Do not wait for the end; the controller goes on with the drain.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON: a NodeDrain object on each change.")] = False,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Empty a node: cordon it and move its pods, those that have computed longest first.

    A pod's annotation podferry.dev/priority (a number) puts it before others. Pods that cannot move stay, unless you evict them.
    The drain is an object in the cluster: it goes on when you close the terminal; run the command again to watch it again.

    Exit code 0 means that the node is empty, 5 that pods are left.

    Examples:

    [bold]kubectl podferry drain node-a --dry-run[/]

    [bold]kubectl podferry drain node-a --parallel 4[/]

    [bold]kubectl podferry drain node-a --stop[/]
    """
    where = ClusterOptions(None, context, kubeconfig)
    if dry_run:
        rows = do(partial(previewing.preview, where, node, evict_others=evict_others))
        print_json({"node": node, "pods": rows}) if json else previewing.print_preview(node, rows)
        return
    if stop:
        stopped = do(partial(draining.stop, where, node))
        message = f"{node}: no further move begins; resume with kubectl podferry drain {node}"
        print_json(stopped.to_json()) if json else stdout().print(message, markup=False)
        return
    wishes = {
        "evictOthers": evict_others,
        "parallel": parallel,
        "mode": mode and mode.value,
        "timeout": timeout,
        "allowPostCopy": allow_postcopy or None,
        "allowAutoConverge": allow_throttle or None,
    }
    if timeout is not None:
        moves.whole_seconds(timeout)
    if within is not None:
        wishes["deadline"] = draining.deadline(moves.whole_seconds(within))
    spec = {name: value for name, value in wishes.items() if value is not None}
    begun = do(partial(draining.begin, where, node, spec))
    if detach:
        print_json(begun.to_json()) if json else stdout().print(f"nodedrain/{begun.name} created", markup=False)
        return
    try:
        end = do(partial(draining.to_the_end, where, begun, json=json))
    except draining.Interrupted:
        stderr().print(f"left; {node} is drained without you: kubectl podferry drain {node} --stop stops it")
        raise typer.Exit(Exit.LEFT) from None
    if not json:
        draining.print_end(end)
    if end.status.phase is DrainPhase.INCOMPLETE:
        raise typer.Exit(Exit.FAILED)


@app.command()
def cancel(
    *,
    migration: MigrationName,
    json: Json = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Cancel a migration before its point of no return: the job runs on at the source.

    Exit code 0 means that it was cancelled; other codes say how it ended instead.

    Example: [bold]kubectl podferry cancel move-train-x7k2p-4f2a[/]
    """
    end = do(partial(moves.cancel_and_wait, ClusterOptions(namespace, context, kubeconfig), migration))
    if json:
        print_json(end.to_json())
    else:
        tables.print_end(end)
    code = OF_OUTCOME[OUTCOME_OF_END[end.status.phase]]
    raise typer.Exit(Exit.OK if code is Exit.CANCELLED else code or Exit.FAILED)


for name, command in looking.COMMANDS.items():
    app.command(name=name)(command)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"kubectl-podferry {__version__}")


def main() -> None:
    """The program `kubectl-podferry`."""
    sys.exit(run_program(app, "kubectl podferry", sys.argv[1:]))


def complete() -> None:
    """The program `kubectl_complete-podferry`, which kubectl asks for completions: a name a line, then a directive (cobra's)."""
    os.environ |= {
        "_KUBECTL_PODFERRY_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["kubectl-podferry", *sys.argv[1:]]),
        "COMP_CWORD": str(max(1, len(sys.argv) - 1)),
    }
    from typer._completion_classes import (
        completion_init,
    )  # what an app with `add_completion` calls; the options are not for a plugin

    completion_init()
    try:
        typer.main.get_command(app).main([], prog_name="kubectl-podferry", complete_var="_KUBECTL_PODFERRY_COMPLETE")
    finally:
        sys.stdout.write(":4\n")  # no files
