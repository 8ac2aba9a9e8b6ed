"""Whole migrations over fakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent_rig import Rig

from podferry.model import Mode

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("mode", Mode)
def test_a_job_moves_whole(mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path).move(mode, monkeypatch)
    print(rig.messages, rig.trace)
    assert rig.phase("a") == "completed"
