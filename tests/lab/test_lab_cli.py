"""`podferry lab` as a person types it."""

from __future__ import annotations

import json
import sys

import pytest

from podferry.lab import Lab
from podferry.node.process import Completed, run

pytestmark = pytest.mark.lab


def podferry(lab: Lab, *words: str, check: bool = True) -> Completed:
    program = [sys.executable, "-c", "from podferry.cli import main; main()", "lab", *words]
    return run(program, env={"PODFERRY_LAB": lab.name}, check=check)


def test_a_lab_from_the_first_command_to_the_last(own_lab: Lab) -> None:
    missing = podferry(own_lab, "status", check=False)
    assert missing.returncode == 2
    assert f"there is no lab {own_lab.name}" in missing.stderr

    up = podferry(own_lab, "up", "--nodes", "1", "--link", "500mbit", "--no-agent")
    assert "node-a: ready" in up.stderr
    assert "node-a" in up.stdout
    status = json.loads(podferry(own_lab, "status", "--json").stdout)
    assert status["name"] == own_lab.name
    assert status["link"] == "500mbit"
    assert [(node["name"], node["alive"], node["cut"]) for node in status["nodes"]] == [("node-a", True, False)]
    assert own_lab.name in json.loads(podferry(own_lab, "list", "--json").stdout)["labs"]

    inside = podferry(own_lab, "exec", "node-a", "--", "sh", "-c", "hostname; exit 7", check=False)
    assert (inside.returncode, inside.stdout) == (7, "node-a\n")

    code = "import os; print(os.environ['A'], os.environ['B'])"
    podferry(
        own_lab, "run", "--node", "node-a", "--name", "c", "--env", "A=1", "--env", "B=2=3", "--", "python3", "-c", code
    )
    assert podferry(own_lab, "logs", "-f", "c").stdout == "1 2=3\n"
    podferry(own_lab, "stop", "c")
    assert podferry(own_lab, "logs", "c").stdout == "1 2=3\n"

    podferry(own_lab, "kill-node", "node-a")
    assert not own_lab.node("node-a").alive
    podferry(own_lab, "start-node", "node-a")
    assert own_lab.node("node-a").alive

    podferry(own_lab, "down")
    podferry(own_lab, "down")
    assert own_lab.name not in podferry(own_lab, "list").stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["up", "--link", "fast"], "'fast' is no rate"),
        (["up", "--nodes", "27"], "cannot have 27 nodes"),
        (["run", "--node", "node-a", "--name", "c", "--env", "A", "--", "true"], "no environment setting"),
        (["status", "--lab", "No"], "cannot be a lab's name"),
    ],
)
def test_wrong_usage_says_what_is_wrong_and_touches_nothing(own_lab: Lab, words: list[str], says: str) -> None:
    refused = podferry(own_lab, *words, check=False)
    assert refused.returncode == 2
    assert says in refused.stderr
    assert not own_lab.exists()
