"""Where the agent waits in threads, so that a job that stands still never waits behind anybody else.

The default pool of anyio has 40 threads for everything. A containerd that does not answer, or pods whose containers the kubelet is
slow to make, can hold all of them for minutes. So there are three ways into a thread, and no other is used in this package:

- `at_once`: a job stands still until it is done. No limit: as many threads as there are such jobs.
- `patiently`: waits for what others do, for seconds or minutes. A limit of its own.
- `run`: all the rest, in the default pool.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import anyio
from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

from podferry.core.undo import Handler

T = TypeVar("T")

MOST_PATIENT = 512
"""Threads that wait at once; what is beyond them waits for one of these to end."""

_unlimited: RunVar[CapacityLimiter] = RunVar("podferry-at-once")
_patient: RunVar[CapacityLimiter] = RunVar("podferry-patiently")


async def at_once(function: Callable[..., T], *args: object, interrupt: Callable[[], object] | None = None) -> T:
    """Call `function` in a thread, whatever else is going on. `interrupt` is called where this is cancelled, and should make it
    return soon: a cancel is only heard when the thread has ended."""
    limiter = _limiter(_unlimited, math.inf)
    if interrupt is None:
        return await to_thread.run_sync(function, *args, limiter=limiter)
    outcome: list[T] = []
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_when_cancelled, interrupt)
        try:
            outcome.append(await to_thread.run_sync(function, *args, limiter=limiter))
        except Exception as error:  # noqa: BLE001 - raised below, out of the group
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return outcome[0]


async def patiently(function: Callable[..., T], *args: object, abandon_on_cancel: bool = False) -> T:
    """Call `function`, which waits for what others do, in a thread."""
    limiter = _limiter(_patient, MOST_PATIENT)
    return await to_thread.run_sync(function, *args, limiter=limiter, abandon_on_cancel=abandon_on_cancel)


async def run(function: Callable[..., T], *args: object) -> T:
    """Call `function` in a thread of the default pool."""
    return await to_thread.run_sync(function, *args)


def threaded(function: Callable[[Mapping[str, Any]], object]) -> Handler:
    """The handler of an undo ledger that calls `function` in a thread, whatever else is going on."""
    return lambda facts: at_once(function, facts)


class Scans:
    """Threads that only read what belongs to a job that stands still. When such a call is cancelled its thread is left alone, so
    that the job can go on at once; `ended` waits for these threads, before what they read is closed."""

    def __init__(self) -> None:
        self._running: set[threading.Event] = set()

    async def at_once(self, function: Callable[[], T]) -> T:
        """Call `function` in a thread, whatever else is going on."""
        done, begun = threading.Event(), threading.Lock()
        self._running.add(done)

        def call() -> T:
            if not begun.acquire(blocking=False):
                raise InterruptedError("it was cancelled before it began")  # which nobody waits for any more
            try:
                return function()
            finally:
                done.set()

        try:
            return await to_thread.run_sync(call, limiter=_limiter(_unlimited, math.inf), abandon_on_cancel=True)
        finally:
            if begun.acquire(
                blocking=False
            ):  # cancelled while no thread had taken it up, and none will: there is nothing to wait for
                done.set()
            self._running = {one for one in self._running if not one.is_set()}

    async def ended(self) -> None:
        """Return when none of these threads is under way."""
        for one in list(self._running):
            if not one.is_set():
                await patiently(one.wait)
        self._running.clear()


def time_left(most: float) -> float:
    """Seconds until the caller is cancelled by a deadline, at most `most`: for a call that waits in a thread."""
    return max(0.0, min(most, anyio.current_effective_deadline() - anyio.current_time()))


def _limiter(kept: RunVar[CapacityLimiter], tokens: float) -> CapacityLimiter:
    try:
        return kept.get()
    except LookupError:
        limiter = CapacityLimiter(tokens)
        kept.set(limiter)
        return limiter


async def _when_cancelled(act: Callable[[], object]) -> None:
    """Call `act` when this is cancelled: a thread does not hear of it."""
    try:
        await anyio.sleep_forever()
    finally:
        act()
