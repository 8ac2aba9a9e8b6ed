"""The job keeps what it had: before its first instruction here, what CRIU has not restored is put right, what differs is noted."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import structlog

from podferry.core.inventory import Difference, decode, differences
from podferry.criu.incoming import Incoming
from podferry.node import inventory
from podferry.node.cgroup import Cgroup
from podferry.workload.threads import at_once

INVENTORY = "podferry-inventory.json"
"""The source's inventory, among CRIU's images, which knows nothing of it."""


@dataclass
class Kept:
    """`since` when the job was let run, in seconds of this node's monotonic clock; 0 where it did not wait for us."""

    since: float = 0.0
    put_right: int = 0
    differences: list[Difference] = field(default_factory=list)


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


async def _keep(incoming: Incoming, kept: Kept) -> None:
    await anyio.wait_readable(incoming.stopped())
    try:
        await at_once(_inspect, incoming, kept)
    finally:
        incoming.let_run()
        kept.since = time.monotonic()


def _inspect(incoming: Incoming, kept: Kept) -> None:
    """A job that lacks something is better off than one that ends: whatever fails here is said, and the job runs."""
    log = structlog.get_logger()
    began = time.monotonic()
    try:
        init = incoming.first_process()
        before = decode((incoming.images / INVENTORY).read_bytes())
        pids, cpuset = inventory.descendants(init), inventory.cpuset(Cgroup.of(init).freezer)
        kept.put_right = inventory.put_right(before, init, pids, cpuset)
        kept.differences = differences(before, inventory.take(init, pids, cpuset))
    except Exception as error:  # noqa: BLE001
        log.error("what the job has here was not compared", key=incoming.key, error=str(error))
        return
    log.info(
        "what the job has was compared",
        key=incoming.key,
        ms=round((time.monotonic() - began) * 1e3, 1),
        put_right=kept.put_right,
        differences=len(kept.differences),
    )
