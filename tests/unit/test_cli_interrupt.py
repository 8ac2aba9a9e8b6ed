"""`podferry migrate` as a process: Ctrl-C once, twice, and what a terminal sees."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_fake_agent import SCRIPTS, FakeAgent, serving

from podferry.cli.exits import Exit
from podferry.node.process import spawn

pytestmark = pytest.mark.unit


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    with serving(FakeAgent("node-a", dict.fromkeys(SCRIPTS, "running")), tmp_path / "agent") as one:
        yield one


class Process:
    """podferry, its stderr a terminal or a pipe."""

    def __init__(self, socket: Path, *argv: str, terminal: bool = False) -> None:
        self._reader, writer = pty.openpty() if terminal else os.pipe()
        program = [sys.executable, "-c", "from podferry.cli import main; main()"]
        env = {"PODFERRY_AGENT": str(socket), "TERM": "xterm", "COLUMNS": "100"}
        self.process = spawn([*program, *argv], env=env, stdout=subprocess.PIPE, stderr=writer)
        os.close(writer)
        self.seen = ""

    def until(self, text: str) -> None:
        """Read stderr up to `text`."""
        while text not in self.seen:
            chunk = self._read()
            assert chunk, f"{text!r} never came: {self.seen}"

    def end(self) -> tuple[int, str]:
        """The exit code and stdout."""
        while self._read():
            pass
        os.close(self._reader)
        out, _ = self.process.communicate(timeout=30)
        return self.process.returncode, out.decode()

    def _read(self) -> str:
        try:
            chunk = os.read(self._reader, 4096).decode(errors="replace")
        except OSError:  # the end of a terminal whose other side is closed
            chunk = ""
        self.seen += chunk
        return chunk


def test_ctrl_c_rolls_back_and_waits_for_the_end(tmp_path: Path, agent: FakeAgent) -> None:
    podferry = Process(tmp_path / "agent", "migrate", "slow", "--to", "node-b")
    podferry.until("pre-copy")
    podferry.process.send_signal(signal.SIGINT)
    code, out = podferry.end()
    assert code == Exit.CANCELLED, podferry.seen
    assert "rolling back" in podferry.seen
    assert "was cancelled; it keeps running on node-a" in out


def test_ctrl_c_with_json_still_ends_with_the_result(tmp_path: Path, agent: FakeAgent) -> None:
    podferry = Process(tmp_path / "agent", "migrate", "slow", "--to", "node-b", "--json")
    assert agent.begun.wait(30)
    podferry.process.send_signal(signal.SIGINT)
    code, out = podferry.end()
    assert code == Exit.CANCELLED
    assert '"outcome": "cancelled"' in out.splitlines()[-1]


def test_a_second_ctrl_c_leaves_the_agent_to_finish(tmp_path: Path, agent: FakeAgent) -> None:
    agent.deaf = True
    podferry = Process(tmp_path / "agent", "migrate", "slow", "--to", "node-b")
    podferry.until("pre-copy")
    podferry.process.send_signal(signal.SIGINT)
    podferry.until("rolling back")
    podferry.process.send_signal(signal.SIGINT)
    code, out = podferry.end()
    assert code == Exit.LEFT
    assert "podferry status m1" in podferry.seen
    assert "Traceback" not in podferry.seen + out


def test_a_terminal_sees_progress_and_finished_phases(tmp_path: Path, agent: FakeAgent) -> None:
    podferry = Process(tmp_path / "agent", "migrate", "train", "--to", "node-b", terminal=True)
    code, out = podferry.end()
    assert code == Exit.OK
    for phase in ("check", "pre-copy", "prepare-target", "cut-over", "resume"):
        assert f"✓ {phase}" in podferry.seen
    assert "560 MiB" in podferry.seen
    assert "\x1b[" in podferry.seen
    assert "stood still" in out
    assert "\x1b[" not in out, "stdout is no terminal"
