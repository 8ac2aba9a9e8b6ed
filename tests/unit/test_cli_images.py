"""`podferry images` on a share that is a plain directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from podferry.cli.app import run
from podferry.snapshotter import layout, open_share
from podferry.snapshotter.layer_ports import SystemClock
from podferry.snapshotter.references import References

pytestmark = pytest.mark.unit
CHAIN = "sha256:" + "c" * 64


def test_a_share_is_made_shown_and_rid_of_a_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    share = ["--share", str(tmp_path)]
    assert run(["images", "init", "--local", *share]) == 0
    References(open_share(tmp_path), SystemClock(), "node-c", "1").add(CHAIN)
    capsys.readouterr()
    assert run(["images", "show", "--json", *share]) == 0
    assert [node["node"] for node in json.loads(capsys.readouterr().out)["nodes"]] == ["node-c"]
    assert run(["images", "show", *share]) == 0
    assert "ok, 0 layers" in capsys.readouterr().out
    assert run(["images", "forget", "node-c", *share]) == 0
    assert "is forgotten" in capsys.readouterr().err
    assert run(["images", "forget", "node-c", *share]) == 0
    assert "used nothing" in capsys.readouterr().err
    assert run(["images", "show", "--json", *share]) == 0
    assert json.loads(capsys.readouterr().out)["nodes"] == []


def test_checking_tells_of_every_layer_and_fails_for_a_damaged_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share = ["--share", str(tmp_path)]
    assert run(["images", "init", "--local", *share]) == 0
    assert run(["images", "check", *share]) == 0
    record = tmp_path / layout.LAYERS / layout.name_of(CHAIN) / layout.RECORD
    record.parent.mkdir()
    record.write_text("{")
    capsys.readouterr()
    assert run(["images", "check", "--json", *share]) == 5
    found, error = map(json.loads, capsys.readouterr().out.splitlines())
    assert (found["chain"], bool(found["wrong"])) == (CHAIN, True)
    assert error["error"]["code"] == "PF254"
    assert (tmp_path / found["aside"]).is_dir()
    assert run(["images", "check", *share]) == 0
    record.parent.mkdir()
    record.write_text("{")
    assert run(["images", "check", *share]) == 5
    said = capsys.readouterr()
    assert "now at damaged/" in said.out.replace("\n", "")
    assert "1 of 1 layers" in said.err


def test_somebody_elses_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").touch()
    assert run(["images", "init", "--local", "--share", str(tmp_path)]) == 3
    assert "is not empty" in capsys.readouterr().err
    assert run(["images", "show", "--share", str(tmp_path)]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
