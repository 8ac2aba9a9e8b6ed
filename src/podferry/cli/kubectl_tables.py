"""The text output of `kubectl podferry`."""

from __future__ import annotations

import datetime
from typing import Any

from rich.table import Table

from podferry.cli import units
from podferry.cli.kubectl_moves import event_time
from podferry.cli.tables import print_connections
from podferry.cli.terminal import stderr, stdout, words
from podferry.core.migration import MIGRATION_ENDS, MigrationPhase
from podferry.kube.migration import Migration

Json = dict[str, Any]

NOT_MOVED = frozenset({MigrationPhase.REHEARSED, MigrationPhase.REFUSED, MigrationPhase.ROLLED_BACK})
"""Ends at which people want to know what a move would make of the pod's connections: after a move `closedConnections` says it."""

STYLE = {
    MigrationPhase.COMPLETED: "bold green",
    MigrationPhase.REHEARSED: "bold green",
    MigrationPhase.REFUSED: "bold yellow",
    MigrationPhase.ROLLED_BACK: "bold yellow",
    MigrationPhase.CANCELLED: "bold yellow",
    MigrationPhase.FAILED: "bold red",
}


def print_migrations(found: list[Migration], *, namespaces: bool) -> None:
    """A line each."""
    if not found:
        stderr().print("no migrations")
        return
    stdout().print(migrations_table(found, namespaces=namespaces))


def migrations_table(found: list[Migration], *, namespaces: bool) -> Table:
    """A line for each."""
    titles = [
        *(["NAMESPACE"] if namespaces else []),
        "NAME",
        "POD",
        "FROM",
        "TO",
        "PHASE",
        "PROGRESS",
        "DOWNTIME",
        "AGE",
    ]
    table = Table(*titles, box=None, pad_edge=False, header_style="bold")
    for one in found:
        status = one.status
        table.add_row(
            *([words(one.namespace)] if namespaces else []),
            words(one.name),
            words(one.spec.pod_name),
            words(status.source_node or ""),
            words(status.target_node or ""),
            words(status.phase, STYLE.get(status.phase, "cyan")),
            words(status.progress.summary if status.progress else ""),
            words(status.downtime or ""),
            words(_age(str(one.metadata.get("creationTimestamp")))),
        )
    return table


def print_end(migration: Migration) -> None:
    """How it ended, or how far it is."""
    console, status = stdout(), migration.status
    way = f"{migration.spec.pod_name}: {status.source_node or '?'} > {status.target_node or '?'}"
    console.print(words(f"{way}  {status.phase}", STYLE.get(status.phase, "bold cyan")))
    facts: list[tuple[str, str | None]] = [
        ("downtime", status.downtime),
        ("downtime of a move", status.forecast),
        ("sent", units.size(status.progress.bytes) if status.progress and status.progress.bytes else None),
        ("rounds", str(status.progress.rounds) if status.progress and status.progress.rounds else None),
        ("new pod", status.target_pod.name if status.target_pod and status.phase == MigrationPhase.COMPLETED else None),
        ("belongs to", f"{status.owner.kind} {status.owner.name}" if status.owner and status.owner.kind else None),
        ("policy", status.settings.policy if status.settings else None),
        ("took", _took(migration)),
    ]
    for name, value in facts:
        if value:
            console.print(words(f"  {name:<11} {value}"))
    if status.phase in NOT_MOVED:
        print_connections(_connections(migration))
    for warning in status.warnings:
        console.print(words(f"  mind: {warning}", "yellow"))
    if status.closed_connections:
        console.print(words(f"  closed: {', '.join(status.closed_connections)}", "yellow"))
    end = status.ending
    if end is not None and status.phase not in (MigrationPhase.COMPLETED, MigrationPhase.REHEARSED):
        console.print(words(f"  {end.reason}: {end.message}{f' [{end.code}]' if end.code else ''}"))
        if end.remedy:
            console.print(words(f"  what to do: {end.remedy}"))
    elif status.message and status.phase not in MIGRATION_ENDS:
        console.print(words(f"  {status.message}"))


def _connections(migration: Migration) -> list[Json]:
    """The pod's connections, each with whose the other end is, as far as the controller has said."""
    known = {one.address: str(one) for one in migration.status.peers}
    return [
        {**one.model_dump(mode="json"), "peer": known.get(one.address or "", str(one.peer))}
        for one in migration.status.connections
    ]


def print_explanation(migration: Migration, events: list[Json]) -> None:
    """Conditions and events in the order of time, then the end."""
    lines: list[tuple[str, str, str]] = [
        (one.last_transition_time, f"{one.type}={one.status}", f"{one.reason} {one.message}".strip())
        for one in migration.status.conditions
        if one.status == "True" or one.type not in ("Completed", "Failed", "Cancelled")
    ]
    lines += [
        (event_time(one), f"{one['regarding']['kind'].lower()} event", f"{one['reason']}: {one.get('note', '')}")
        for one in events
    ]
    table = Table(box=None, pad_edge=False, show_header=False)
    for when, what, how in sorted(lines, key=lambda line: _when(line[0])):
        table.add_row(words(_when(when).strftime("%H:%M:%S"), "dim"), words(what, "cyan"), words(how))
    stdout().print(table)
    print_end(migration)


def _when(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)


def _age(since: str) -> str:
    seconds = max(0, int((datetime.datetime.now(datetime.UTC) - _when(since)).total_seconds()))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _took(migration: Migration) -> str | None:
    begin, end = migration.status.start_time, migration.status.completion_time
    if begin is None or end is None:
        return None
    return units.duration((_when(end) - _when(begin)).total_seconds() * 1e3)
