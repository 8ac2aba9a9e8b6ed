"""The terminal: `podferry` and its commands."""

from __future__ import annotations


def main() -> None:
    """The program `podferry`; ends the process with one of `exits.Exit`."""
    import sys

    from podferry.cli.app import run

    sys.exit(run(sys.argv[1:]))
