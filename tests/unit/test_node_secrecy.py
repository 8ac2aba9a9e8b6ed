"""Programs that hold jobs' memory leave no core dump."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import podferry

pytestmark = pytest.mark.unit
SOURCES = Path(podferry.__file__).parent


def dumped(place: Path, *lines: str) -> bool:
    """Whether the kernel wrote a core of a program that aborts after these lines."""
    limits = ["import os, resource", "most = resource.getrlimit(resource.RLIMIT_CORE)[1]"]
    limits += ["resource.setrlimit(resource.RLIMIT_CORE, (most, most))"]
    code = "\n".join((*limits, *lines, "os.abort()"))
    child = subprocess.Popen([sys.executable, "-c", code], cwd=place, env={"PYTHONPATH": str(SOURCES.parent)})
    _, status = os.waitpid(child.pid, 0)
    child.returncode = -6
    assert os.WIFSIGNALED(status)
    return os.WCOREDUMP(status)


def test_no_core_is_dumped(tmp_path: Path) -> None:
    if not dumped(tmp_path):
        pytest.skip("nobody's core is dumped here: RLIMIT_CORE or kernel.core_pattern")
    assert not dumped(tmp_path, "from podferry.node.secrecy import no_core_dumps", "no_core_dumps()")


@pytest.mark.parametrize("program", ["agent/program.py", "lazypages/daemon.py"])
def test_whoever_holds_memory_of_jobs_says_so_first(program: str) -> None:
    main = next(
        one
        for one in ast.parse((SOURCES / program).read_text()).body
        if isinstance(one, ast.FunctionDef) and one.name == "main"
    )
    calls = [one.func.id for one in ast.walk(main) if isinstance(one, ast.Call) and isinstance(one.func, ast.Name)]
    assert "no_core_dumps" in calls
