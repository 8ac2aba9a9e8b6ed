"""Processes that work for the agent and outlive it, and tasks that must go."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import anyio
import structlog

from podferry.criu.processes import Process
from podferry.engine.journal import Journal, Part
from podferry.errors import Failed
from podferry.node.containerd import Containerd
from podferry.node.containerd_errors import ContainerdFailed, ContainerdNotFound
from podferry.node.outside import IN_POD, surviving
from podferry.node.process import last_lines, spawn
from podferry.node.records import TaskStatus
from podferry.node.runtime import ContainerNotFound, ContainerRuntime

log = structlog.get_logger()

END_TIMEOUT = 10.0
ASK_AGAIN = 0.5
"""Seconds."""
Found = TypeVar("Found")

INHERITED = ("PYTHONPATH", "PYTHONPYCACHEPREFIX", "PODFERRY_RUN", IN_POD)


def python(module: str) -> list[str | Path]:
    """The command that runs one of our modules as a program, in the interpreter that runs this one."""
    return [sys.executable, "-P", "-m", module]


def helper_environment() -> dict[str, str]:
    """What a helper needs of this agent's environment."""
    return {name: os.environ[name] for name in INHERITED if name in os.environ}


def process_of(facts: Mapping[str, Any] | None) -> Process | None:
    """The helper that a ledger's entry names."""
    return Process(int(facts["pid"]), int(facts["started"])) if facts else None


def start_helper(journal: Part, scratch: Path, kind: str, argv: Sequence[str | Path]) -> Process:
    """Start a helper that outlives this agent; what it says goes to a file in `scratch`."""
    log = scratch / f"{kind}.log"
    with log.open("wb") as file:
        child = spawn(surviving([*argv]), stdout=file, stderr=file, env=helper_environment())
    process = Process.of(child.pid)
    if process is None:
        raise Failed(f"the {kind} ended right after its start", evidence=last_lines(log))
    write_down(journal, kind, process)
    return process


def write_down(journal: Journal | Part, kind: str, process: Process) -> None:
    """Have the ledger hold a helper that runs. Where that fails, on a full disk, it is ended: nobody else would find it."""
    try:
        journal.acquire(kind, pid=process.pid, started=process.started)
    except OSError:
        kill_helper({"pid": process.pid, "started": process.started})
        raise


def kill_helper(facts: Mapping[str, Any]) -> None:
    """End a helper that an entry of the ledger names, and reap it if it is this agent's child."""
    process = Process(int(facts["pid"]), int(facts["started"]))
    process.kill()
    process.wait(END_TIMEOUT)
    reap(process)


def reap(process: Process | None) -> None:
    """Take note of a child's end, so that it leaves no zombie. Its other threads may be a moment behind the first."""
    with suppress(ChildProcessError):
        if process is not None and not process.alive():
            os.waitpid(process.pid, 0)


async def ended(process: Process) -> None:
    """Wait for the end of a process, ours or not."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if process.alive():
            await anyio.wait_readable(pidfd)
    finally:
        os.close(pidfd)
    reap(process)


def runs(runtime: ContainerRuntime, id: str) -> bool:
    """Whether a container's task is there and has not ended. Where its runtime does not say, nothing speaks against it."""
    try:
        return runtime.task(id).status is not TaskStatus.STOPPED
    except ContainerNotFound:
        return False
    except Failed:
        return True


async def answered(question: Callable[[], Awaitable[bool]]) -> bool:
    """Ask until containerd answers. A container of which it says nothing, since it starts anew or is busy, is not gone: what runs
    here may be the only copy."""
    while True:
        try:
            return await question()
        except ContainerdFailed as error:
            log.warning("containerd does not answer", error=str(error))
            await anyio.sleep(ASK_AGAIN)


def remove_task(containerd: Containerd, id: str) -> None:
    """Kill a container's task, whatever its state, and have containerd forget it."""
    with suppress(ContainerdNotFound):
        containerd.task(id)
        with suppress(ContainerdNotFound, ContainerdFailed):
            containerd.kill_task(id, signal.SIGKILL, everyone=True)
        with suppress(ContainerdNotFound):
            containerd.wait_task(id, END_TIMEOUT)
        containerd.delete_task(id)


async def gathered(*functions: Callable[[], Awaitable[Found]]) -> list[Found]:
    """Call all at once; their results, in order. The first error ends the others."""
    results: list[Found | None] = [None] * len(functions)

    async def call(number: int) -> None:
        results[number] = await functions[number]()

    async with anyio.create_task_group() as calls:
        for number in range(len(functions)):
            calls.start_soon(call, number)
    return cast("list[Found]", results)
