"""The demo as a newcomer runs it, on a lab of its own: it proves its own result, and leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from podferry.cli.app import run
from podferry.lab import Lab, list_labs
from podferry.lab.state import LABS

pytestmark = pytest.mark.lab


def test_the_demo(own_lab: Lab, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "move.html"
    code = run(["lab", "demo", "--lab", own_lab.name, "--steps", "900", "--html", str(page)])
    said = capfd.readouterr()
    assert code == 0, said.err
    assert said.out.count("✓ equal") == 3
    assert "stood still for" in said.out
    assert "computed exactly what the job that stayed did" in said.out
    assert page.read_text().startswith("<!doctype html>")
    assert own_lab.name not in list_labs()
    assert not (LABS / own_lab.name).exists()
