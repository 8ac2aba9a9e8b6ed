"""Tests inside a node: one that hangs fails alone, whatever holds it, and shows where it was."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import inside_node
import pytest

from podferry.node.process import run

pytestmark = pytest.mark.unit

HANGING = """
import signal, threading, time, pytest

def test_before(): pass

def test_that_waits():
    threading.Event().wait()

def test_that_takes_no_notice():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(1000)

@pytest.fixture
def endless():
    yield
    time.sleep(1000)

def test_whose_teardown_waits(endless): pass

def test_that_fails(): assert 1 == 2

def test_that_skips(): pytest.skip("for a reason")

def test_after(): pass
"""


def test_a_test_that_hangs_fails_alone(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    module = tmp_path / "test_hanging.py"
    module.write_text(HANGING)
    reports = tmp_path / "reports"
    names = [
        f"{module.name}::{line[4:].partition('(')[0]}" for line in HANGING.splitlines() if line.startswith("def test")
    ]
    attempts = []

    def attempt(tests: Sequence[str]) -> tuple[str, str]:
        attempts.append(list(tests))
        reports.unlink(missing_ok=True)
        environment = {
            inside_node.REPORTS: str(reports),
            inside_node.SECONDS: "2",
            "PYTHONPATH": str(Path(inside_node.__file__).parent),
        }
        argv = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "inside_node",
            "-p",
            "no:cacheprovider",
            f"--rootdir={tmp_path}",
            *tests,
        ]
        done = run(argv, check=False, env=environment, cwd=tmp_path, timeout=100)
        return done.stdout + done.stderr, reports.read_text()

    found = inside_node.from_node(request.config, dict.fromkeys(names, request.node), attempt)
    outcomes = {name.partition("::test_")[2]: [(one.when, one.outcome) for one in found[name]] for name in names}
    good = [("setup", "passed"), ("call", "passed"), ("teardown", "passed")]
    assert outcomes == {
        "before": good,
        "that_waits": [("setup", "passed"), ("call", "failed"), ("teardown", "passed")],
        "that_takes_no_notice": [("setup", "passed"), ("call", "failed")],
        "whose_teardown_waits": [("setup", "passed"), ("call", "passed"), ("teardown", "failed")],
        "that_fails": [("setup", "passed"), ("call", "failed"), ("teardown", "passed")],
        "that_skips": [("setup", "passed"), ("call", "skipped"), ("teardown", "passed")],
        "after": good,
    }
    assert len(attempts) == 3
    failures = [str(one.longrepr) for name in names for one in found[name] if one.outcome == "failed"]
    for where, shown in zip(("test_that_waits", "test_that_takes_no_notice", "endless"), failures, strict=False):
        assert "most recent call first" in shown
        assert f" in {where}\n" in shown


def test_a_run_that_never_begins_fails_all_its_tests(request: pytest.FixtureRequest) -> None:
    found = inside_node.from_node(request.config, {"a": request.node, "b": request.node}, lambda tests: ("no lab", ""))
    assert [(one.outcome, "no lab" in str(one.longrepr)) for name in "ab" for one in found[name]] == [
        ("failed", True)
    ] * 2
