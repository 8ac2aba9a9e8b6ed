"""The job keeps what it had: before its first instruction here, what CRIU has not restored is put right, what differs is noted."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import structlog

from podferry.core.inventory import Difference, decode, differences, encode, with_oom_score
from podferry.core.mempolicy import arguments
from podferry.criu.futex_calls import futexes
from podferry.criu.incoming import Incoming
from podferry.errors import PodferryError
from podferry.memory.kernel.reader import touch
from podferry.memory.tracking import made_calls
from podferry.node import inventory, outside
from podferry.node.cgroup import Cgroup
from podferry.node.pid_namespace import number_inside
from podferry.node.process import run
from podferry.workload.threads import at_once

INVENTORY = "podferry-inventory.json"
"""The source's inventory, among CRIU's images, which knows nothing of it."""
CALLS_TIMEOUT = 30.0
PAGES_TIMEOUT = 2.0
"""Seconds that a job waits for the pages of its threads' futexes before it runs without them."""


@dataclass
class Kept:
    """`since` when the job was let run, in seconds of this node's monotonic clock; 0 where it did not wait for us."""

    since: float = 0.0
    put_right: int = 0
    differences: list[Difference] = field(default_factory=list)
    unknown: str = "the job did not wait to be looked at"
    """Why nothing was compared; empty where it was."""

    def told(self) -> tuple[str, ...]:
        """What is said of the job. That nothing is known of it is not that nothing differs."""
        return (f"nothing was compared: {self.unknown}",) if self.unknown else tuple(map(str, self.differences))


def expect_oom_score(images: Path, least: int) -> None:
    """Processes with a lower oom_score_adj were raised to `least` in the images: no difference, since the target's spec says so."""
    path = images / INVENTORY
    if path.exists():
        path.write_bytes(encode(with_oom_score(decode(path.read_bytes()), least)))


@asynccontextmanager
async def keeping(incoming: Incoming | None, kept: Kept) -> AsyncIterator[None]:
    """While the restore goes on: when all tasks stand before their first instruction, put them right, and let them run."""
    failed: Exception | None = None
    async with anyio.create_task_group() as watch:
        if incoming is not None and incoming.stopped() >= 0:
            watch.start_soon(_keep, incoming, kept)
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised again below, where the task group does not wrap it
            failed = error
        watch.cancel_scope.cancel()
    if failed is not None:
        raise failed


def let_run_late(incoming: Incoming | None, kept: Kept) -> None:
    """Let a job run that took so long to be restored that nobody watches it any more: it runs here or nowhere by now."""
    if incoming is not None and incoming.stopped() >= 0 and not kept.since:
        incoming.let_run()
        kept.since = time.monotonic()


async def _keep(incoming: Incoming, kept: Kept) -> None:
    await anyio.wait_readable(incoming.stopped())
    lost: dict[int, dict[str, str]] = {}
    with anyio.CancelScope(shield=True):
        try:
            await at_once(_bring_futexes, incoming)
            lost = await at_once(_inspect, incoming, kept)
        finally:
            incoming.let_run()
            kept.since = time.monotonic()
        if lost:
            await at_once(_have_them_set, lost, kept)


def _bring_futexes(incoming: Incoming) -> None:
    """Have the pages be there of which the kernel must find threads' futexes at once (`criu/futex_calls.py`)."""
    try:
        wanted = futexes(incoming.images)
        if not wanted:
            return
        reading = threading.Thread(target=_read_futexes, args=(incoming.first_process(), wanted), daemon=True)
        reading.start()  # in post-copy a page may not come at all, and a thread that waits for one cannot be called back
        reading.join(PAGES_TIMEOUT)
    except Exception as error:  # noqa: BLE001 - a job that lacks a page is better off than one that ends
        structlog.get_logger().error("pages of futexes were not brought", key=incoming.key, error=str(error))


def _read_futexes(init: int, wanted: Mapping[int, tuple[int, ...]]) -> None:
    for pid in inventory.descendants(init):
        with suppress(OSError, ValueError):
            for thread in map(int, os.listdir(f"/proc/{pid}/task")):  # noqa: PTH208
                for address in wanted.get(number_inside(pid, thread), ()):
                    touch(thread, address)


def _inspect(incoming: Incoming, kept: Kept) -> dict[int, dict[str, str]]:
    """Returns what threads have still to set themselves. A job that lacks something is better off than one that ends:
    whatever fails here is said, and the job runs."""
    log = structlog.get_logger()
    began = time.monotonic()
    if not (incoming.images / INVENTORY).exists():
        kept.unknown = "the source took no inventory, which would have kept so large a job standing still"
        return {}
    try:
        init = incoming.first_process()
        before = decode((incoming.images / INVENTORY).read_bytes())
        pids, cpuset = inventory.descendants(init), inventory.cpuset(Cgroup.of(init).freezer)
        kept.put_right, lost = inventory.put_right(before, init, pids, cpuset)
        kept.differences = differences(before, inventory.take(init, pids, cpuset))
        kept.unknown = ""
    except Exception as error:  # noqa: BLE001
        kept.unknown = str(error) or type(error).__name__
        log.error("what the job has here was not compared", key=incoming.key, error=str(error))
        return {}
    log.info(
        "what the job has was compared",
        key=incoming.key,
        ms=round((time.monotonic() - began) * 1e3, 1),
        put_right=kept.put_right,
        differences=list(map(str, kept.differences[:8])),
    )
    return lost


def _have_them_set(lost: Mapping[int, Mapping[str, str]], kept: Kept) -> None:
    """Threads set what only they can, so that they can only when they run. What could not be set is still a difference."""
    calls = []
    for tid, attributes in lost.items():
        with suppress(ValueError):
            if policy := attributes.get("memory-policy"):
                calls.append("{}:set_mempolicy:{:x}:{:x}".format(tid, *arguments(policy)))
            if personality := attributes.get("personality"):
                calls.append(f"{tid}:personality:{int(personality, 16):x}")
    argv = [sys.executable, "-S", "-I", made_calls.__file__, *calls]
    try:
        done = run(outside.surviving(argv), check=False, timeout=CALLS_TIMEOUT)
    except (OSError, PodferryError) as error:
        structlog.get_logger().error("threads have not set what they had", error=str(error))
        return
    told = done.stdout.splitlines()
    if failed := [line for line in told if " " in line] or done.stderr.splitlines()[-1:]:
        structlog.get_logger().error("threads have not set what they had", failed=failed[:8])
    elif len(told) == len(calls) == sum(map(len, lost.values())):
        kept.put_right += len(calls)
        kept.differences = [one for one in kept.differences if one.attribute not in inventory.THEIRS]
