"""Tables as they meet a terminal of eighty columns."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from podferry.cli import tables
from podferry.cli.agents import AgentAnswers
from podferry.cli.kubectl_tables import print_end
from podferry.core.phases import SourcePhase
from podferry.errors import Failed
from podferry.kube.migration import Migration
from podferry.model import Outcome

pytestmark = pytest.mark.unit


def record(name: str, outcome: str | None, phase: str = "") -> dict[str, Any]:
    return {
        "id": "1122-232444-9408",
        "name": name,
        "source": "node-a",
        "target": "node-b",
        "mode": "live",
        "outcome": outcome,
        "phase": phase or outcome,
        "downtime_ms": 312.4,
        "total_ms": 185_000.0,
    }


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Console:
    console = Console(width=80, record=True, force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(tables, "stdout", lambda: console)
    monkeypatch.setattr(tables, "stderr", lambda: console)
    return console


@pytest.mark.parametrize("outcome", [*Outcome])
def test_a_migration_is_a_line_of_eighty_columns(shown: Console, outcome: Outcome) -> None:
    tables.print_records(AgentAnswers([("node-a", record("train", outcome.value))]))
    heading, line = shown.export_text().rstrip("\n").split("\n")
    assert heading.split() == ["ID", "NAME", "WAY", "STATE", "DOWNTIME", "TOTAL"]
    for word in ("1122-232444-9408", "train", "node-a > node-b", str(outcome), "312 ms", "3 min 05 s"):
        assert word in line


@pytest.mark.parametrize("phase", [*SourcePhase])
def test_every_phase_fits(shown: Console, phase: SourcePhase) -> None:
    tables.print_records(AgentAnswers([("node-a", record("train", None, phase.value))]))
    assert f" {phase} " in shown.export_text()


def test_a_long_name_is_folded_and_never_cut(shown: Console) -> None:
    tables.print_records(AgentAnswers([("node-a", record("a-very-long-name-of-a-training-job", "completed"))]))
    lines = shown.export_text().splitlines()
    column = lines[0].index("NAME"), lines[0].index("WAY")
    assert "".join(line[slice(*column)].strip() for line in lines[1:]) == "a-very-long-name-of-a-training-job"


def test_a_silent_node_is_named(shown: Console) -> None:
    tables.print_records(AgentAnswers([], [("node-b", Failed("no answer"))]))
    assert "node-b: no answer" in shown.export_text()


def test_a_migrations_end_says_what_was_closed_and_what_to_mind(capsys: pytest.CaptureFixture[str]) -> None:
    status = {
        "phase": "Completed",
        "warnings": ["the kernels differ"],
        "closedConnections": ["a:1 -> b:2", "a:1 -> c:3"],
    }
    print_end(Migration.from_json({"metadata": {"name": "move"}, "spec": {"podName": "train"}, "status": status}))
    said = capsys.readouterr().out
    assert "mind: the kernels differ" in said
    assert "closed: a:1 -> b:2, a:1 -> c:3" in said


def test_a_rehearsals_end_says_of_each_connection_whose_the_other_end_is(capsys: pytest.CaptureFixture[str]) -> None:
    lost = {"protocol": "tcp", "local": "10.0.0.5:1", "peer": "another", "fate": "closed", "why": "it stays"}
    status = {
        "phase": "Rehearsed",
        "connections": [
            {**lost, "remote": "10.96.0.7:80", "backend": "10.0.1.9:8080"},
            {**lost, "remote": "192.0.2.9:443"},
            {**lost, "remote": "10.0.0.5:2", "peer": "inside", "fate": "lives", "why": "both ends are here"},
        ],
        "peers": [
            {"address": "10.0.1.9", "kind": "Pod", "name": "database", "agent": True},
            {"address": "192.0.2.9", "kind": "Outside"},
        ],
    }
    print_end(Migration.from_json({"metadata": {"name": "move"}, "spec": {"podName": "train"}, "status": status}))
    said = " ".join(capsys.readouterr().out.split())
    for words in ("10.96.0.7:80 (10.0.1.9:8080) Pod database closed", "192.0.2.9:443 Outside closed", "inside lives"):
        assert words in said
    assert "closed: it stays" in said
