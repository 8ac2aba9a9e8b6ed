"""The exit codes of `podferry`: a contract, written down in docs/cli.md and held by tests/unit/test_cli_exits.py."""

from __future__ import annotations

from enum import IntEnum

from podferry.cli.agent_client import AgentUnreachable
from podferry.errors import Cancelled, Failed, PodferryError, Refused, UsageError
from podferry.kube.api_errors import ApiUnreachable
from podferry.model import Outcome


class Exit(IntEnum):
    """What the shell sees."""

    OK = 0
    BUG = 1
    USAGE = 2
    REFUSED = 3
    ROLLED_BACK = 4
    FAILED = 5
    CANCELLED = 6
    UNREACHABLE = 7
    LEFT = 130


OF_OUTCOME = {
    Outcome.COMPLETED: Exit.OK,
    Outcome.REFUSED: Exit.REFUSED,
    Outcome.ROLLED_BACK: Exit.ROLLED_BACK,
    Outcome.FAILED: Exit.FAILED,
    Outcome.CANCELLED: Exit.CANCELLED,
    Outcome.REHEARSED: Exit.OK,
}

# From the particular to the general: the first kind that fits counts.
OF_ERROR: list[tuple[type[PodferryError], Exit]] = [
    (AgentUnreachable, Exit.UNREACHABLE),
    (ApiUnreachable, Exit.UNREACHABLE),
    (UsageError, Exit.USAGE),
    (Refused, Exit.REFUSED),
    (Cancelled, Exit.CANCELLED),
    (Failed, Exit.FAILED),
    (PodferryError, Exit.BUG),
]


def of_error(error: PodferryError) -> Exit:
    """The exit code that `error` ends the program with."""
    return next(code for kind, code in OF_ERROR if isinstance(error, kind))
