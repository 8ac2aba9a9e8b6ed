"""The terminal: `podferry` and its commands."""

from __future__ import annotations


def main() -> None:
    """The program `podferry`; ends the process with one of `exits.Exit`."""
    import io
    import sys

    from podferry.cli.app import run

    for stream in (sys.stdout, sys.stderr):
        # Names and marks that a locale's characters cannot say (de_DE, say, without UTF-8) are no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))
