"""Copying memory while the job runs: rounds, until what is left fits the downtime that was asked for."""

from __future__ import annotations

import time
from dataclasses import replace

import anyio
import structlog

from podferry.core.precopy import CLEARLY_LESS, PreCopyPolicy, Round, Step, decide, link_rate, rest
from podferry.engine.inbox import Inbox
from podferry.engine.migration_record import MigrationRecord
from podferry.engine.ports import DirtySet, SourceJob
from podferry.engine.sending import Sender
from podferry.errors import Failed, Refused
from podferry.wire.messages import RoundAck, RoundEnd

MOST_SHARED_PASSES = 5
MUCH_SHARED = 8 << 20
"""Bytes of shared memory that are sent while the job stands still without another pass."""


class Rounds:
    """The rounds of one migration. Each sends what is pending and then looks what was written meanwhile: that is `pending` next."""

    def __init__(
        self, job: SourceJob, sender: Sender, inbox: Inbox, record: MigrationRecord, policy: PreCopyPolicy
    ) -> None:
        self.pending = DirtySet()
        self._job, self._sender, self._inbox, self._record, self._policy = job, sender, inbox, record, policy
        self._judged_from = 0
        self._quota = 1.0
        self._shared: list[int] = []  # bytes of shared memory that each round found changed
        self._log = structlog.get_logger().bind(migration=record.id)

    async def scan_dirty(self) -> None:
        """Scan what is to be sent: all of the memory, the first time."""
        self.pending = await self._job.scan_dirty()

    async def copy(self) -> bool:
        """One round at least, until what is left fits the downtime; true if it shall rather be fetched after the resume.

        Raises `Failed` where the job writes too fast for all that may be done about it.
        """
        self._judged_from = len(self._record.rounds)
        while True:
            await self._round()
            step = await self._judge()
            if step is Step.POSTCOPY or (step is Step.CUT_OVER and not self._shared_becomes_less()):
                return step is Step.POSTCOPY

    async def keep_up(self, until: anyio.Event) -> None:
        """A round now and then, so that little is left when what is waited for has come."""
        while not until.is_set():
            began = time.monotonic()
            with anyio.move_on_after(rest(self._record.rounds, link_rate(self._record.rounds))):
                await until.wait()
            if not until.is_set():
                await self._round(rested=time.monotonic() - began)

    def _shared_becomes_less(self) -> bool:
        """Whether another pass over shared memory leaves much less of it for the time that the job stands still. It never ends a
        migration: without passes, all of it moves then."""
        *before, last = self._shared[-MOST_SHARED_PASSES:]
        return (
            last > MUCH_SHARED
            and len(before) + 1 < MOST_SHARED_PASSES
            and (not before or last < CLEARLY_LESS * before[-1])
        )

    async def _judge(self) -> Step:
        """Decide what comes next, and slow the job down if it is that."""
        rounds = self._record.rounds[self._judged_from :]
        decision = decide(rounds, self._policy, rate=link_rate(self._record.rounds), quota=self._quota)
        self._log.info("decision", step=str(decision.step), reason=decision.reason)
        if decision.step is Step.GIVE_UP:
            raise Failed(
                decision.reason, remedy="allow throttling or post-copy, a longer --max-downtime, or use --mode stop"
            )
        if decision.step is Step.THROTTLE:
            self._judged_from = len(self._record.rounds)
            try:
                await self._job.throttle(decision.quota)
                self._quota = decision.quota
            except (Failed, Refused) as cannot:  # a container without a cpu controller, say
                self._log.warning("the job cannot be slowed down", why=str(cannot))
                self._policy = replace(self._policy, throttle=False)
        return decision.step

    async def _round(self, rested: float = 0.0) -> None:
        channel, record = self._inbox.channel, self._record
        number, start = len(record.rounds) + 1, record.now()
        self._shared.append(await self._sender.shared(self._job, number))
        began, before = time.monotonic(), channel.traffic.sent
        pages = await self._sender.dirty(self._job, self.pending, number)
        sent = channel.traffic.sent - before
        await channel.send(RoundEnd(number, pages, sent))
        while (await self._inbox.expect(RoundAck)).round != number:
            pass
        seconds = time.monotonic() - began
        await self.scan_dirty()
        record.add_round(Round(number, pages, sent, seconds, self.pending.bytes, rested))
        record.add_span(f"round {number}", "source", start, record.now(), f"{pages} pages")
        record.expect(channel.traffic.sent + self.pending.bytes)
