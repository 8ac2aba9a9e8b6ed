"""`podferry pki`: what it writes is what an agent reads, and nothing is replaced that nodes depend on."""

from __future__ import annotations

from pathlib import Path

import pytest

from podferry.cli.app import run
from podferry.wire.tls import Credentials

pytestmark = pytest.mark.unit


def test_an_authority_and_a_certificate_an_agent_can_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home, into = str(tmp_path / "pki"), tmp_path / "a"
    assert run(["pki", "init", "--authority", home]) == 0
    issue = ["pki", "issue", "node-a", "--address", "10.0.0.1", "--address", "fd00::1", "--authority", home]
    assert run([*issue, "--into", str(into)]) == 0
    assert Credentials.load(into).node == "node-a"
    first = (into / "node.crt").read_bytes()
    assert run([*issue, "--into", str(into)]) == 0, "a certificate can be renewed"
    assert (into / "node.crt").read_bytes() != first
    said = capsys.readouterr()
    assert said.out == ""
    assert "good for 365 days" in said.err
    assert "PRIVATE KEY" not in said.err


def test_without_a_place_it_goes_into_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["pki", "init"]) == 0
    assert run(["pki", "issue", "node-a"]) == 0
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        "node-a/ca.crt",
        "node-a/node.crt",
        "node-a/node.key",
        "pki/ca.crt",
        "pki/ca.key",
    ]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["init"], "holds an authority already"),
        (["issue", "Node_A"], "cannot be a node's name"),
        (["issue", "node-a", "--address", "10.0.0"], "no certificate for node-a"),
        (["issue", "node-a", "--authority", "elsewhere"], "no usable authority"),
    ],
)
def test_what_makes_no_sense_is_said_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run(["pki", "init"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert run(["pki", *argv]) == 2
    assert says in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
