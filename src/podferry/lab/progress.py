"""How long work says what it is doing: one line of text for each step."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str], None]
"""Takes one line saying what is being done now."""


def quiet(_: str) -> None:
    """Say nothing."""


def phases(write: Progress) -> Progress:
    """A progress for logs: of the many steps `WHAT: [1/3] DOING · HOW FAR` of one phase only the first is written, and
    without how far it is."""
    written: set[str] = set()

    def report(step: str) -> None:
        phase = step.partition("] ")[0] if ": [" in step else ""
        if phase not in written:
            write(step.partition(" · ")[0] if phase else step)
        if phase:
            written.add(phase)

    return report
