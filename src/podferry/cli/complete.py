"""Shell completion of containers, nodes and migrations. Offers nothing where no agent answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from podferry.cli.agents import AgentOptions, Fleet
from podferry.errors import PodferryError

Names = Callable[[Fleet], list[str]]


def _offering(names: Names) -> Callable[[typer.Context], list[str]]:
    def offer(context: typer.Context) -> list[str]:
        try:
            return names(Fleet.find(_where(context)))
        except (PodferryError, OSError):
            return []

    return offer


def _where(context: typer.Context) -> AgentOptions:
    """The options so far, the command's before those ahead of it; the commands themselves have not run."""
    given: list[AgentOptions] = []
    here: typer.Context | None = context
    while here is not None:
        agent = here.params.get("agent")
        given.append(AgentOptions(here.params.get("lab"), Path(agent) if agent else None))
        here = here.parent  # type: ignore[assignment]
    return next((where for where in given if where.lab or where.agent), AgentOptions()).settle()


def _rows(key: str, rows: list[dict[str, object]]) -> list[str]:
    return [str(row[key]) for row in rows if row.get(key)]


containers = _offering(lambda fleet: _rows("name", fleet.containers().rows))
migrations = _offering(lambda fleet: _rows("id", fleet.records().rows))
nodes = _offering(lambda fleet: [endpoint.node for endpoint in fleet.endpoints if endpoint.node])
