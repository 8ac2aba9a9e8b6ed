"""scripts/mutations: which faults it finds, and which tests it runs for them."""

from __future__ import annotations

import ast
import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.unit
SCRIPT = Path(__file__).parents[2] / "scripts/mutations"
SOURCE = '''
LIMIT = 3 < 4

def f(a, log):
    """Say so."""
    log.info("nothing")
    log(a)
    g(a)
    if a:
        return a == 3
    return None

async def h(a):
    await g(a)
    return [one for one in a if one is not None]
'''


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("mutations", str(SCRIPT))
    spec = importlib.util.spec_from_loader("mutations", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module  # its dataclasses look there
    loader.exec_module(module)
    return module


def test_faults_are_put_into_functions_and_leave_python(script: ModuleType) -> None:
    found = script.Faults("x.py", SOURCE).found
    assert [(one.line, one.kind) for one in sorted(found, key=lambda one: (one.line, one.kind))] == [
        (8, "call dropped"),
        (9, "condition negated"),
        (10, "comparison flipped"),
        (10, "return value lost"),
        (14, "call dropped"),
        (15, "comparison flipped"),
        (15, "return value lost"),
    ]
    text = SOURCE.encode()
    for one in found:
        faulty = (text[: one.start] + one.new.encode() + text[one.end :]).decode()
        assert ast.dump(ast.parse(faulty)) != ast.dump(ast.parse(SOURCE))


def test_a_modules_tests_are_those_that_import_it(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(SCRIPT.parents[1])
    tests = script.Tests()
    assert "tests/unit/test_core_turns.py" in tests.of("podferry.core.turns")
    assert "tests/unit/test_agent_faults.py" in tests.of("podferry.engine.source"), "by way of the rig"
