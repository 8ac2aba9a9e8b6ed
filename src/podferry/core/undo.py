"""Undo as a ledger: what is acquired is written down beside the line that acquires it, and taken back in reverse.

An entry is plain data, so that the journal can hold it: an agent that was killed reads the same ledger at its next start and
takes back the same things by the same handlers as one that merely met an error. Entries are written *before* the thing is
acquired; a handler must therefore bear that it never came to be.

Undo goes on through its own errors (ganeti's `_ExecCleanup` does the same): each step is tried, and what could not be taken
back is reported at the end with every reason, and stays in the ledger for another try.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from podferry.errors import Bug

Handler = Callable[[Mapping[str, Any]], Awaitable[object]]
"""Takes back one kind of thing, given the facts that were written down. May be called again where it failed."""


@dataclass(frozen=True)
class Acquired:
    """One thing that must be taken back: its kind names the handler, its facts say which one it is."""

    kind: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Leftover:
    """A thing that could not be taken back, and why."""

    kind: str
    why: str


class Ledger:
    """The resources that a migration holds at this moment, the oldest first. Of a job of several containers, the resources of
    container N have the kind `KIND.N`."""

    def __init__(self, entries: list[Acquired] | None = None) -> None:
        self.entries = list(entries or [])

    def add(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Write down what is about to be acquired. A later entry of the same kind replaces the facts of the first."""
        self.entries = [entry for entry in self.entries if entry.kind != kind]
        self.entries.append(Acquired(kind, dict(facts)))

    def remove(self, kind: str) -> None:
        """Strike out what was given back in the ordinary course; that of every container, where none is named."""
        self.entries = [entry for entry in self.entries if kind not in (entry.kind, handled_as(entry.kind))]

    def facts(self, kind: str) -> Mapping[str, Any] | None:
        """The facts of an entry, or None where nothing of that kind is held."""
        return next((entry.facts for entry in self.entries if entry.kind == kind), None)

    async def unwind(self, handlers: Mapping[str, Handler]) -> list[Leftover]:
        """Take everything back, newest first, through every error. Returns what could not be, which is still held."""
        leftovers = []
        for entry in reversed(self.entries):
            try:
                if (kind := handled_as(entry.kind)) not in handlers:
                    raise Bug(f"there is no undo step for '{entry.kind}'")
                await handlers[kind](entry.facts)
            except Exception as error:  # noqa: BLE001 - undo goes on through its own errors
                leftovers.append(Leftover(entry.kind, f"{type(error).__name__}: {error}"))
            else:
                self.remove(entry.kind)
        return leftovers


def handled_as(kind: str) -> str:
    """The kind whose handler takes an entry back: without the container's number."""
    return kind.partition(".")[0]
