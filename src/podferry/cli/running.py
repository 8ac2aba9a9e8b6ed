"""Running a program's commands: the one place where errors become text and exit codes."""

from __future__ import annotations

import traceback
from itertools import takewhile

import typer

from podferry.cli.exits import Exit, of_error
from podferry.cli.migrate import UserLeft
from podferry.cli.terminal import as_bug, debugging, print_error, print_json, stderr, words
from podferry.errors import PodferryError, UsageError


def run_program(app: typer.Typer, program: str, argv: list[str]) -> int:
    """Run one command to its end and return its exit code; every error has been printed by then."""
    json = "--json" in takewhile(lambda word: word != "--", argv)
    try:
        return int(typer.main.get_command(app).main(argv, prog_name=program, standalone_mode=False) or 0)
    except typer.TyperException as misuse:
        error: PodferryError = _misuse(misuse, program)
    except typer.Abort:
        return Exit.LEFT
    except UserLeft as left:
        hint = f"{program} status {left.id}" if left.id else f"{program} status"
        stderr().print(words(f"left; it is finished without you: {hint}", "yellow"))
        return Exit.LEFT
    except PodferryError as known:
        error = known
    except Exception as unexpected:  # noqa: BLE001 - the last resort: a person gets words, not a traceback
        error = as_bug(unexpected)
    if debugging():
        traceback.print_exception(error)
    if json:
        print_json({"type": "error", "error": error.to_dict()}, indent=None)
    else:
        print_error(error)
    return of_error(error)


def _misuse(misuse: typer.TyperException, program: str) -> UsageError:
    context = getattr(misuse, "ctx", None)
    path = context.command_path if context is not None else program
    return UsageError(misuse.format_message().rstrip("."), remedy=f"{path} --help")
