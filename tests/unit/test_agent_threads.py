"""Threads: what a frozen job needs never waits behind anything else, and ends when it is no longer wanted."""

from __future__ import annotations

import ast
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio import to_thread
from test_agent_source_container import leaving, made

import podferry
from podferry.core.undo import Ledger
from podferry.engine.journal import Journal
from podferry.memory.tracking.tracker import DirtyScan
from podferry.workload import source_container as module
from podferry.workload.frozen import handlers
from podferry.workload.threads import Scans, at_once, patiently, run

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

DEFAULT_POOL = 40


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def everybody_waits() -> AsyncIterator[None]:
    """The agent's default pool is full of calls that take their time, and one more waits for a place there."""
    over, begun = threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        begun.release()
        over.wait()

    assert to_thread.current_default_thread_limiter().total_tokens == DEFAULT_POOL
    async with anyio.create_task_group() as waits:
        for _ in range(DEFAULT_POOL):
            waits.start_soon(run, wait)
        try:
            for _ in range(DEFAULT_POOL):
                await at_once(begun.acquire)
            waits.start_soon(run, lambda: None)
            while not to_thread.current_default_thread_limiter().statistics().tasks_waiting:
                await anyio.lowlevel.checkpoint()
            yield
        finally:
            over.set()


async def test_a_cut_over_and_a_roll_back_wait_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of the real job between freeze and GO, and each way back, while 40 long waits are under way. Where one waits for a
    place in the pool, this never ends."""
    cgroup = made(tmp_path / "group")
    job = leaving(tmp_path, cgroup, Journal(tmp_path / "journal"))
    fake_tracker: Any = SimpleNamespace(final=lambda: DirtyScan({}, frozenset(), frozenset(), {}), close=lambda: None)
    job.memory.tracker = fake_tracker
    monkeypatch.setattr(module, "freeze_apart_from_vfork", lambda *_: 0)
    monkeypatch.setattr(module, "exec_sessions", lambda *_: ())
    monkeypatch.setattr(module, "drained", lambda *_: None)
    monkeypatch.setattr(module.SourceContainer, "_dump", lambda self, stop: {})
    monkeypatch.setattr(module.SourceContainer, "mapped_shared", lambda self, at="/": set())
    job._running = replace(job._running, output=module.Output(tmp_path / "log"))
    (tmp_path / "log").write_bytes(b"it begins\n")
    ledger = Ledger()
    ledger.add("freeze", {"cgroup": cgroup.to_dict()})
    async with everybody_waits():
        await job.freeze()
        await job.final_scan()
        await job.dump()
        assert [record async for record in job.tree.changes(last=True)]
        assert [piece async for piece in job.logs(last=True)]
        assert await ledger.unwind(handlers()) == []
    assert (cgroup.freezer / "freezer.state").read_text() == "THAWED"


async def test_long_waits_hold_nobody_else_up() -> None:
    over, begun = threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        begun.release()
        over.wait()

    async with anyio.create_task_group() as waits:
        for _ in range(2 * DEFAULT_POOL):
            waits.start_soon(patiently, wait)
        for _ in range(2 * DEFAULT_POOL):
            await at_once(begun.acquire)
        assert await run(lambda: 3) == 3
        over.set()


async def test_a_call_that_is_no_longer_wanted_is_interrupted() -> None:
    stop = threading.Event()
    with anyio.move_on_after(0.01) as scope:
        await at_once(stop.wait, interrupt=stop.set)
    assert scope.cancel_called and stop.is_set()


async def test_a_look_at_the_job_does_not_hold_up_its_way_back() -> None:
    looks, over, told = Scans(), threading.Event(), threading.Event()

    def scan_dirty() -> None:
        over.wait()
        told.set()

    with anyio.move_on_after(0.01):
        await looks.at_once(scan_dirty)
    assert not told.is_set(), "it goes on alone"
    over.set()
    await looks.ended()
    assert told.is_set(), "and is waited for before what it reads is closed"


async def test_a_look_that_is_cancelled_before_its_thread_takes_it_up_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a busy machine the cancel comes first: the thread then never calls what it was given."""
    looks, handed, called = Scans(), list[Any](), list[str]()

    async def never_begun(function: Any, **_: object) -> None:
        handed.append(function)
        await anyio.sleep_forever()

    with monkeypatch.context() as patched, anyio.move_on_after(0.01) as scope:
        patched.setattr(to_thread, "run_sync", never_begun)
        await looks.at_once(lambda: called.append("it reads what may be closed by now"))
    assert scope.cancel_called
    assert looks._running == set()
    with pytest.raises(InterruptedError):
        handed[0]()
    assert called == [], "nor does it read what `ended` lets others close"


def test_there_are_three_ways_into_a_thread_and_no_other() -> None:
    """A call that goes straight to anyio's default pool is one that a frozen job may have to wait behind, or be."""
    found = []
    package = Path(podferry.__file__).parent
    for path in (path for part in ("agent", "workload", "engine") for path in (package / part).rglob("*.py")):
        if path.name == "threads.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and any(one.name == "to_thread" for one in node.names):
                found.append(path.name)
            if isinstance(node, ast.Attribute) and node.attr in ("to_thread", "run_in_executor"):
                found.append(path.name)
    assert found == []
