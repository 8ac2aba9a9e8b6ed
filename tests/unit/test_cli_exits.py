"""Exit codes are a contract: each error and outcome has one, and docs/cli.md lists them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import podferry
from podferry.cli.agent_client import AgentUnreachable
from podferry.cli.exits import OF_OUTCOME, Exit, of_error
from podferry.errors import (
    Bug,
    Cancelled,
    CommandFailed,
    Failed,
    InvariantBroken,
    PeerLost,
    PodferryError,
    Refused,
    TimedOut,
    UsageError,
)
from podferry.model import Outcome

pytestmark = pytest.mark.unit
CONTRACT = {
    "OK": 0,
    "BUG": 1,
    "USAGE": 2,
    "REFUSED": 3,
    "ROLLED_BACK": 4,
    "FAILED": 5,
    "CANCELLED": 6,
    "UNREACHABLE": 7,
    "LEFT": 130,
}


def test_the_codes_never_change() -> None:
    assert {code.name: code.value for code in Exit} == CONTRACT


def test_the_document_lists_them() -> None:
    text = (Path(podferry.__file__).parents[2] / "docs/cli.md").read_text()
    listed = {name: int(code) for code, name in re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", text, re.MULTILINE)}
    assert listed == CONTRACT


def test_outcomes_differ() -> None:
    assert set(OF_OUTCOME) == set(Outcome)
    ends = [code for outcome, code in OF_OUTCOME.items() if outcome is not Outcome.REHEARSED]  # well, as a move does
    assert len(set(ends)) == len(Outcome) - 1


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (Refused, 3),
        (UsageError, 2),
        (Failed, 5),
        (CommandFailed, 5),
        (PeerLost, 5),
        (TimedOut, 5),
        (Cancelled, 6),
        (AgentUnreachable, 7),
        (Bug, 1),
        (InvariantBroken, 1),
        (PodferryError, 1),
    ],
)
def test_errors_end_the_program_with(kind: type[PodferryError], code: int) -> None:
    assert of_error(kind("what")) == code
