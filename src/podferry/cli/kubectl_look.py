"""The commands of `kubectl podferry` that look and change nothing: list, status, explain, report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from podferry.cli import kubectl_moves as moves
from podferry.cli import kubectl_report as reporting
from podferry.cli import kubectl_tables as tables
from podferry.cli import kubectl_watch as watching
from podferry.cli.exits import Exit
from podferry.cli.kubectl_moves import ClusterOptions
from podferry.cli.kubectl_options import Context, Json, Kubeconfig, MigrationName, Namespace, do
from podferry.cli.terminal import print_json, stdout


def list_(
    *,
    all_namespaces: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="Show the objects of every namespace.")
    ] = False,
    watch: Annotated[
        bool,
        typer.Option("--watch", "-w", help="Show the Migrations that have not ended, and every change, until Ctrl-C."),
    ] = False,
    json: Json = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """List the migrations, the newest last.

    Examples:

    [bold]kubectl podferry list -A[/]

    [bold]kubectl podferry list -A --watch[/]
    """
    where = ClusterOptions(namespace, context, kubeconfig)
    if watch:
        do(partial(watching.watch, where, everywhere=all_namespaces, json=json))
        raise typer.Exit(Exit.LEFT)
    found = do(partial(moves.migrations, where, everywhere=all_namespaces))
    if json:
        print_json({"migrations": [one.to_json() for one in found]})
    else:
        tables.print_migrations(found, namespaces=all_namespaces)


def status(
    *,
    migration: MigrationName,
    json: Json = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show one migration.

    Example: [bold]kubectl podferry status move-train-x7k2p-4f2a[/]
    """
    found = do(partial(moves.get, ClusterOptions(namespace, context, kubeconfig), migration))
    if json:
        print_json(found.to_json())
    else:
        tables.print_end(found)


def explain(
    *,
    migration: MigrationName,
    json: Json = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Explain one migration: its conditions and events in order, how it ended and what to do about it.

    Example: [bold]kubectl podferry explain move-train-x7k2p-4f2a[/]
    """
    found, events = do(partial(moves.explanation, ClusterOptions(namespace, context, kubeconfig), migration))
    if json:
        print_json({"migration": found.to_json(), "events": events})
    else:
        tables.print_explanation(found, events)


def report(
    *,
    migration: MigrationName,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Default: podferry-report-MIGRATION.tar.gz.")
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Write what a bug report about one migration needs into a file: the Migration, its events, its pods and nodes.

    Values of the environment, commands, arguments and annotations of the pods are left out. Look through it before you send it.

    Example: [bold]kubectl podferry report move-train-x7k2p-4f2a[/]
    """
    into = output or Path(f"podferry-report-{migration}.tar.gz")
    files = do(partial(reporting.collect, ClusterOptions(namespace, context, kubeconfig), migration))
    reporting.write(files, into)
    stdout().print(f"{into}: {', '.join(sorted(files))}", markup=False)


COMMANDS: dict[str, Callable[..., None]] = {"list": list_, "status": status, "explain": explain, "report": report}
