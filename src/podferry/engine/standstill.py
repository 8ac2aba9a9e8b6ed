"""The limit on a job's freeze before GO. Beyond it the agent breaks the step off, thaws the job and rolls the migration back.

The limit is on everything between the freeze and the point of no return: CRIU, the last pages and files on a link that may be slow,
a target that may say nothing. In the modes `live` and `postcopy` it is a few seconds beyond the downtime that was asked for. In
`stop` all memory is copied in that time, so there the job is given back when nothing has been sent for a while, and there is no
limit to the whole unless somebody sets one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from podferry.engine.migration_record import MigrationRecord
from podferry.errors import PodferryError, TimedOut
from podferry.model import Mode

BEYOND_DOWNTIME = 5.0
"""Seconds beyond the downtime that was asked for, in `live` and `postcopy`."""
STALLED = 120.0
"""Seconds for which in `stop` nothing is sent."""
GRACE = 0.25
"""Seconds within which a send that is under way may end in order; then the link is broken, since a send cannot be cancelled."""
POLL_INTERVAL = 0.5


class Standstill:
    """The limit of one migration. `explicit` is the user's own, in seconds; `downtime` what the migration aims at."""

    def __init__(self, mode: Mode, explicit: float | None, downtime: float) -> None:
        self.limit: float | None = explicit
        if explicit is None and mode is not Mode.STOP:
            self.limit = downtime + BEYOND_DOWNTIME

    async def bound(
        self,
        work: Callable[[], Awaitable[None]],
        record: MigrationRecord,
        *,
        sent: Callable[[], int],
        sever: Callable[[PodferryError], object],
    ) -> None:
        """Do `work`, during which the job stands still. `sent` says how many bytes were sent until now, `sever` breaks the link.

        Raises `TimedOut`, which says what took the time.
        """
        began = record.now()
        over, done = anyio.CancelScope(), anyio.Event()
        over.deadline = anyio.current_time() + (STALLED if self.limit is None else self.limit)

        async def watch() -> None:
            try:
                if self.limit is not None:
                    await anyio.sleep_forever()
                while True:
                    before = sent()
                    await anyio.sleep(POLL_INTERVAL)
                    if sent() != before:
                        over.deadline = anyio.current_time() + STALLED
            finally:
                # A send that is under way cannot be cancelled: half a frame would break the stream. So it gets a moment to end, and
                # then the link is broken, which ends it.
                with anyio.move_on_after(GRACE, shield=True):
                    await done.wait()
                if not done.is_set():
                    sever(self._exceeded(record, began))

        with over:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch)
                try:
                    await work()
                finally:
                    done.set()
                tasks.cancel_scope.cancel()
        if over.cancelled_caught:
            raise self._exceeded(record, began)

    def _exceeded(self, record: MigrationRecord, began: float) -> TimedOut:
        seconds = (record.now() - began) / 1e3
        if self.limit is None:
            what = f"the agent sent nothing for {STALLED:g} s while the job was frozen, and thawed the job"
        else:
            what = (
                f"the job was frozen for {seconds:.1f} s, beyond its limit of {self.limit:g} s, and the agent thawed it"
            )
        return TimedOut(
            what,
            why=", ".join(record.steps(began)),
            remedy="look at the longest step; or raise the limit with --max-freeze, in a Migration spec.maxFreeze",
        )
