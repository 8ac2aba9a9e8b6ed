"""`kubectl podferry list --watch`: the migrations as they change, until Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable

import anyio
from rich.console import Group
from rich.live import Live
from rich.text import Text

from podferry.cli.kubectl_moves import ClusterOptions
from podferry.cli.kubectl_tables import migrations_table
from podferry.cli.terminal import print_json, stdout, words
from podferry.kube.client import MIGRATIONS, Api
from podferry.kube.migration import Migration
from podferry.kube.watch import follow

Show = Callable[[Migration, bool], None]
"""What is done with a Migration that has changed; True: it is there no more."""
ENDED_SHOWN = 10
"""Migrations that have ended, the newest, that a live table shows beside all others."""


async def watch(where: ClusterOptions, *, everywhere: bool, json: bool) -> None:
    """Until Ctrl-C. On a terminal a table that changes; else a line for each change of phase; as JSON an object for each change."""
    async with where.open() as (api, namespace):
        within = "" if everywhere else namespace
        if json:
            await _follow(api, within, lambda one, _: print_json(one.to_json(), indent=None))
        elif not stdout().is_terminal:
            await _follow(api, within, _Lines(namespaces=everywhere))
        else:
            with Live(Text("no migrations"), console=stdout(), refresh_per_second=4) as live:
                await _follow(api, within, _LiveTable(live, namespaces=everywhere))


async def _follow(api: Api, namespace: str, show: Show) -> None:
    async with anyio.create_task_group() as tasks:

        async def until_interrupt() -> None:
            with anyio.open_signal_receiver(signal.SIGINT) as signals:
                async for _ in signals:
                    tasks.cancel_scope.cancel()
                    return

        tasks.start_soon(until_interrupt)
        async for what, body in follow(api, MIGRATIONS, namespace):
            show(Migration.from_json(body), what == "DELETED")


class _Lines:
    """A line where a Migration's phase is another, or its end is known."""

    def __init__(self, *, namespaces: bool) -> None:
        self._said: dict[str, str] = {}
        self._namespaces = namespaces

    def __call__(self, one: Migration, gone: bool) -> None:
        """Say what is new."""
        status = one.status
        new = "deleted" if gone else str(status.phase)
        if self._said.get(one.uid) == new or (gone and one.ended):
            return
        self._said[one.uid] = new
        name = f"{one.namespace}/{one.name}" if self._namespaces else one.name
        way = f"{status.source_node or '?'} > {status.target_node or '?'}"
        why = (status.ending.message if status.ending else status.message) or ""
        stdout().print(words(f"{name}  {one.spec.pod_name}  {way}  {new}  {why}".rstrip()))


class _LiveTable:
    """All that have not ended, and the newest of those that have."""

    def __init__(self, live: Live, *, namespaces: bool) -> None:
        self._live, self._namespaces = live, namespaces
        self._known: dict[str, Migration] = {}

    def __call__(self, one: Migration, gone: bool) -> None:
        """Show it as it is now."""
        if gone:
            self._known.pop(one.uid, None)
        else:
            self._known[one.uid] = one
        ordered = sorted(self._known.values(), key=lambda each: str(each.metadata.get("creationTimestamp")))
        ended = [each for each in ordered if each.ended]
        shown = [*ended[-ENDED_SHOWN:], *(each for each in ordered if not each.ended)]
        hidden = len(ended) - len(ended[-ENDED_SHOWN:])
        more = [Text(f"{hidden} more have ended", style="dim")] if hidden else []
        table = migrations_table(shown, namespaces=self._namespaces)
        self._live.update(Group(*more, table) if shown else Text("no migrations"))
