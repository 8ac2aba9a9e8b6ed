"""What both demos share: a job that moves and its twin that stays, and the verdict on their results."""

from __future__ import annotations

from rich.table import Table

from podferry.cli.terminal import stderr, stdout, words
from podferry.errors import Failed

SOURCE, TARGET = "node-a", "node-b"
MOVED, TWIN = "job", "twin"
MEBIBYTES, CANDIDATES, EVERY = 256, 3000, 50
MOVE_AT = 300
"""The step that the job has reached when it moves."""


def announce(text: str) -> None:
    """One step of the demo."""
    stderr().print(words(text, "bold"))


def compare(moved: dict[str, str], unmoved: dict[str, str]) -> None:
    """Print both jobs' facts side by side. Raises `Failed` where one differs."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("", "the job that moved", "that stayed", ""):
        table.add_column(title)
    for fact, value in moved.items():
        other = unmoved.get(fact, "missing")
        verdict = words("✓ equal", "green") if value == other else words("✗ different", "bold red")
        table.add_row(words(fact), words(value[:16]), words(other[:16]), verdict)
    stdout().print(table)
    if moved != unmoved:
        raise Failed("the job that moved computed another result than the job that stayed", why="see the table")
    stdout().print(words("The job that moved computed exactly what the job that stayed did.", "bold green"))
