"""scripts/test: what fails is tried once more, and a test that passes only then fails the run unless it is listed."""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
LISTED = tomllib.loads((ROOT / "tests/flaky.toml").read_text()).get("flaky", [])

PYTEST = """#!/bin/sh
# Stands in for pytest: writes what failed into its cache, and ends as $statuses says, one status for each run.
mkdir -p .pytest_cache/v/cache
echo "$@" >> runs
runs=$(wc -l < runs)
[ "$runs" -gt 1 ] || echo '{"tests/lab/test_a.py::test_b[1]": true}' > .pytest_cache/v/cache/lastfailed
set -- $STATUSES
shift $((runs - 1))
exit "$1"
"""
LIST = """[[flaky]]
test = "{}"
date = 2026-11-30
reason = "races with the end of its lab"
"""


@pytest.mark.parametrize(
    ("statuses", "listed", "ends"),
    [
        ("0", None, 0),
        ("2", None, 2),  # interrupted: not tried again
        ("5", None, 5),  # no tests
        ("1 1", "tests/lab/test_a.py::test_b", 1),
        ("1 0", None, 1),
        ("1 0", "tests/lab/test_a.py::test_bb", 1),
        ("1 0", "tests/lab/test_a.py::test_b[2]", 1),
        ("1 0", "tests/lab/test_a.py::test_b[1]", 0),
        ("1 0", "tests/lab/test_a.py::test_b", 0),
    ],
)
def test_only_a_listed_test_may_pass_at_its_second_attempt(
    tmp_path: Path, statuses: str, listed: str | None, ends: int
) -> None:
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    (tmp_path / "venv/bin/pytest").write_text(PYTEST)
    (tmp_path / "venv/bin/pytest").chmod(0o755)
    (tmp_path / "tests/flaky.toml").write_text(LIST.format(listed) if listed else "# none\n")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/test", "venv"],
        check=False,
        cwd=tmp_path,
        env={"STATUSES": statuses, "PATH": "/usr/bin:/bin:/usr/local/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == ends, done.stderr
    assert len((tmp_path / "runs").read_text().splitlines()) == len(statuses.split())
    if statuses == "1 0":
        assert "tests/lab/test_a.py::test_b[1]" in done.stderr


def test_the_list_names_tests_that_exist_with_a_date_and_a_reason() -> None:
    for entry in LISTED:
        assert entry.keys() == {"test", "date", "reason"}
        path, _, name = entry["test"].partition("::")
        assert re.search(rf"def {re.escape(name.split('[')[0])}\(", (ROOT / path).read_text()), entry["test"]
        assert isinstance(entry["date"], datetime.date)
        assert len(entry["reason"]) > 20
