"""Undo as a stack: what is acquired is pushed beside the line that acquires it, and taken back in reverse.

Undo goes on through its own errors (ganeti's `_ExecCleanup` does the same): each step is tried, and what failed is
reported at the end with every reason.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

Step = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Leftover:
    """An undo step that failed: what it was to do and why it could not."""

    what: str
    why: str


class UndoStack:
    """The steps that take a half-done migration back, newest first."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, Step]] = []

    def push(self, what: str, step: Step) -> None:
        """Remember how to take back what has just been acquired."""
        self._steps.append((what, step))

    def forget(self) -> None:
        """What was acquired is there to stay: after the commit nothing is taken back."""
        self._steps.clear()

    async def unwind(self) -> list[Leftover]:
        """Take everything back, newest first, through every error; what could not be is returned."""
        leftovers = []
        while self._steps:
            what, step = self._steps.pop()
            try:
                await step()
            except Exception as error:  # noqa: BLE001 - undo goes on through its own errors
                leftovers.append(Leftover(what, f"{type(error).__name__}: {error}"))
        return leftovers
