"""A pytest plugin for tests that run inside a node: every report goes to a file, and a test that goes on too long fails alone.

Each line of the file is JSON: the name of a test that begins, as a string, or a report, as an object.

A test that is late is interrupted by a signal, so that it gives back what it has, and shows where its threads were. One that
takes no notice, and one that hangs before or after its body, takes the whole run along a while later; the host then
goes on with the tests that are left (`from_node`).
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

REPORTS = "PODFERRY_NODE_REPORTS"
SECONDS = "PODFERRY_NODE_TEST_SECONDS"
TEST_SECONDS = 300.0
SLOW_SECONDS = 1500.0
GRACE = 0.2
"""Part of its time that a test which was interrupted has for giving back what it has."""

STDERR = pytest.StashKey[int]()


# -- in the node --------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)  # while a test runs, pytest's capture is there
    config.pluginmanager.register(Reporter(config))


def seconds_of(item: pytest.Item) -> float:
    """How long a test may go on."""
    usual = float(os.environ.get(SECONDS, TEST_SECONDS))
    return usual * SLOW_SECONDS / TEST_SECONDS if item.get_closest_marker("slow") else usual


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    faulthandler.dump_traceback_later(seconds_of(item) * (1 + GRACE), exit=True, file=item.config.stash[STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    seconds = seconds_of(item)

    def late(number: int, frame: object) -> None:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            pytest.fail(f"it did not end within {seconds:g} s; its threads:\n{file.read()}")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(nodeid)


class Reporter:
    """Writes the reports: an object, since a report becomes data through its configuration."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _write(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))


def _write(data: Any) -> None:
    with Path(os.environ[REPORTS]).open("a") as file:
        file.write(json.dumps(data) + "\n")


# -- on the host --------------------------------------------------------------------------------------------------

Side = Callable[[Sequence[str]], tuple[str, str]]
"""Runs these tests inside; returns what was said there, and the contents of the reports' file."""


def from_node(
    config: pytest.Config, tests: Mapping[str, pytest.Item], attempt: Side
) -> dict[str, list[pytest.TestReport]]:
    """The reports of all `tests`. A test that ends the run inside fails, and the tests behind it are run in another."""
    outcomes: dict[str, list[pytest.TestReport]] = {name: [] for name in tests}
    left = list(tests)
    while left:
        said, written = attempt(left)
        begun = _sort(config, written, outcomes)
        left = [name for name in left if not any(one.when == "teardown" for one in outcomes[name])]
        stuck = [name for name in left if name in begun]
        for name in stuck or left:
            when = "teardown" if any(one.when == "call" for one in outcomes[name]) else "call"
            why = f"the test did not end inside the node; what was said there:\n{said}"
            outcomes[name].append(pytest.TestReport(name, tests[name].location, {}, "failed", why, when))
        left = [name for name in left if name not in stuck] if stuck else []
    return outcomes


def _sort(config: pytest.Config, written: str, outcomes: dict[str, list[pytest.TestReport]]) -> set[str]:
    """Add reports to the outcomes; returns which tests began."""
    begun = set()
    for line in written.splitlines(keepends=True):
        if not line.endswith("\n"):  # the run ended in the middle of it
            break
        data = json.loads(line)
        if isinstance(data, str):
            begun.add(data)
            continue
        report = config.hook.pytest_report_from_serializable(config=config, data=data)
        if isinstance(report.longrepr, list):
            report.longrepr = tuple(report.longrepr)  # of a skip; JSON has no tuples
        outcomes.setdefault(report.nodeid, []).append(report)
    return begun
