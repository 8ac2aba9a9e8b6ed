"""The two consoles, and errors as a person or a program reads them.

What people read about progress and errors goes to stderr, results go to stdout. Names, reasons and log lines come from
elsewhere: they are never taken for markup, and control characters in them never reach the terminal.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from podferry import __version__
from podferry.errors import Bug, PodferryError


def stdout() -> Console:
    """Where results go; made anew for each use, so that a redirected stdout counts."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def stderr() -> Console:
    """Where progress, warnings and errors go."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def plain(text: object) -> str:
    """`text` without what a terminal would obey: control characters become question marks, line ends stay."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in str(text).expandtabs())


def words(text: object, style: str = "") -> Text:
    """`text` for a console, sanitised and never taken for markup."""
    return Text(plain(text), style=style)


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Where long work tells its steps: one line that changes in a terminal, else a line for each of its phases."""
    from podferry.lab.progress import phases

    console = stderr()
    if not console.is_terminal:
        yield phases(lambda step: console.print(words(f"  {step}")))
        return
    with console.status("") as spinner:
        yield lambda step: spinner.update(words(step))


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Print a result for programs; a line of its own where `indent` is None."""
    sys.stdout.write(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_error(error: PodferryError) -> None:
    """The error's report in red, evidence dimmed, the remedy in the terminal's own colour."""
    console = stderr()
    for number, line in enumerate(error.report().splitlines()):
        style = "bold red" if number == 0 else "dim" if line.startswith("  |") else ""
        console.print(words(line, style), soft_wrap=True)


def as_bug(unexpected: BaseException) -> Bug:
    """An exception that nobody foresaw, as a report worth sending."""
    last = traceback.extract_tb(unexpected.__traceback__)[-1:]
    place = [f"in {frame.name}, {os.path.basename(frame.filename)}:{frame.lineno}" for frame in last]  # noqa: PTH119
    bug = Bug(
        "this is a bug in podferry",
        why=f"{type(unexpected).__name__}: {unexpected}",
        remedy="run it again with PODFERRY_DEBUG=1 and report the traceback, the command and these versions",
        evidence=[*place, f"podferry {__version__}, Python {sys.version.split()[0]}, kernel {os.uname().release}"],
    )
    bug.__cause__ = unexpected
    return bug


def debugging() -> bool:
    """True where the environment asks for tracebacks."""
    return os.environ.get("PODFERRY_DEBUG", "") not in ("", "0")
