"""The target's half of a migration, told top to bottom.

Until GO it may give up at any moment, and does so when the source falls silent: nothing runs here, so nothing is lost. With GO the
right to run has come; from then on it makes the job run whether or not the source still listens, or says that it never will.

Like the source's half it is one procedure in one file, whatever its length.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import anyio
from anyio.abc import TaskGroup

from podferry.core.invariants import Sight
from podferry.core.phases import TARGET_ENDS, TARGET_MAY_RUN, TargetEvent, TargetPhase, target_machine
from podferry.core.undo import Handler
from podferry.engine.journal import Journal
from podferry.engine.migration_record import MigrationRecord
from podferry.engine.ports import JobDied, Json, PageChannel, TargetJob, is_log
from podferry.engine.side import Side
from podferry.errors import Failed, PeerMisbehaved, PodferryError, TimedOut
from podferry.model import Outcome
from podferry.wire.channel import Channel
from podferry.wire.frames import PAGE, Data, Drop, File, Pages, Tree
from podferry.wire.messages import (
    MOST_DIFFERENCES,
    MOST_PARTS,
    Abort,
    Crashed,
    Done,
    ErrorReport,
    Filled,
    GaveUp,
    Go,
    Message,
    PageRequest,
    PagesEnd,
    PagesLost,
    PrepareTarget,
    Ready,
    Restoring,
    RoundAck,
    RoundEnd,
    Running,
    StateEnd,
    StatePart,
    TargetPrepared,
    whole_end,
)

GRACE = 10.0
"""Seconds for which the target waits longer than the source, which is the one to decide."""
ASK_AGAIN = 1.0
GOODBYE = 2.0
"""Seconds for which the source's last word is waited for."""

Resume = Callable[[], Awaitable[None]]


class Target(Side[TargetPhase, TargetEvent]):
    """One container on its way onto this node."""

    role = "target"
    forbidden_by_a_broken_rule = frozenset({TargetEvent.GONE})

    def __init__(
        self,
        job: TargetJob,
        journal: Journal,
        record: MigrationRecord,
        handlers: dict[str, Handler],
    ) -> None:
        """In the phase that the journal names, where an earlier agent has begun."""
        super().__init__(target_machine(TargetPhase(journal.phase or TargetPhase.RECEIVE)), journal, record, handlers)
        self.job = job
        self._prepared = anyio.Event()
        self._runs_since = time.monotonic()
        self._filled: Filled | None = None
        self._error: PodferryError | None = None
        self._word_known = anyio.Event()
        self._one_gives_up = anyio.Lock()
        self._still_here = self._judged = False
        self._fetches: set[anyio.CancelScope] = set()
        self._expected: list[StatePart] = []
        self._pages_lost = anyio.Event()
        if self.machine.ended:
            self._error = record.error
            self._word_known.set()
            self.ended.set()

    def sight(self, phase: TargetPhase) -> Sight:
        """Check that the job that runs here is the one for which this node got the right to run."""
        kinds = tuple(entry.kind for entry in self.journal.ledger.entries)
        return Sight(phase, self._still_here, ended=phase in TARGET_ENDS, ledger=kinds)

    # The steps, in order.

    async def converse(
        self, channel: Channel, first: Message | Data, after_go: Callable[[Resume], object], patience: float
    ) -> None:
        """Take in what the source sends, `first` and all after it up to GO, which the source says within `patience` seconds or
        never. What follows is given to `after_go`, since it outlives the connection."""
        self.name_in_logs()
        self.record.enter(self.phase)
        self.journal.enter(self.phase)
        try:
            with anyio.fail_after(patience + GRACE):  # the source has gone back by then
                await self.at_breakpoint()
                await self.job.prepare()
                async with anyio.create_task_group() as helpers:
                    await self._receive(channel, first, helpers)
                    helpers.cancel_scope.cancel()
        except TimeoutError:
            await self._give_up(TimedOut(f"GO did not come within {patience:.0f} s"), channel)
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await self._give_up(Failed("the agent is stopping"), channel)
            raise
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the source must hear that nothing runs here
            await self._give_up(self.cause_of(error), channel)
        else:
            after_go(self.go_on)
            await self.report(channel, asked=False)

    async def go_on(self) -> None:
        """After GO: the job must run here, or never will. Also the way on for an agent that was restarted."""
        self.name_in_logs()
        try:
            if self.phase is TargetPhase.RESUME:
                await self._resume()
            if self.phase is TargetPhase.FILL:
                await self._fill()
            elif self.phase not in TARGET_MAY_RUN and not self.machine.ended:
                await self._give_up(Failed("the target's agent was restarted before GO"), None)
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the source must hear whether it runs here
            await self._give_up(self.cause_of(error), None)

    async def report(self, channel: Channel, *, asked: bool) -> None:
        """Say what became of the job, and once more when its memory is in place: the answer to GO and, if `asked`, to `Query`."""
        if self.phase not in TARGET_MAY_RUN and not self.machine.ended:
            await self._give_up(Failed("the source lost contact before its GO arrived"), None)
        known = asked and self._word_known.is_set()
        if asked and not known:
            await channel.send(Restoring(self.record.id))
        async with anyio.create_task_group() as ways:

            def fetch() -> None:
                if self.journal.facts.get("postcopy") and not self.machine.ended:
                    ways.start_soon(self._fetch, channel)

            if not known:
                fetch()
            await self._report(channel, fetch if known else _nothing, asked=asked)
            ways.cancel_scope.cancel()
        with anyio.move_on_after(GOODBYE), suppress(PodferryError):
            while not isinstance(await channel.receive(), Done):  # remote pages that were sent already may come before
                pass

    async def _report(self, channel: Channel, running_sent: Callable[[], None], *, asked: bool) -> None:
        await self._word_known.wait()
        if self.phase is TargetPhase.GAVE_UP:
            return await channel.send(GaveUp(self.record.id, ErrorReport.of(self._error or Failed("it gave up"))))
        if self.phase is TargetPhase.DIED or (asked and not await self.job.is_here()):
            died = self._error or Failed("the job ran here, and is here no more")
            return await channel.send(Crashed(self.record.id, ErrorReport.of(died)))
        ran = time.monotonic() - self._runs_since
        await channel.send(Running(self.record.id, max(0, round(ran * 1e9))))
        running_sent()
        await self.ended.wait()
        if self._error is not None:
            return await channel.send(Crashed(self.record.id, ErrorReport.of(self._error)))
        return await channel.send(self._filled or Filled(self.record.id, 0))

    async def _fetch(self, channel: Channel) -> None:
        """Post-copy: hand what the source sends to the lazy-pages daemon, and what the lazy-pages daemon wants to the
        source, until all is sent or
        nothing is wanted any more: then `_clear` closes the store."""
        page_channel = self.job.open_page_channel()
        with anyio.CancelScope() as scope:
            self._fetches.add(scope)
            try:
                async with anyio.create_task_group() as ways:
                    ways.start_soon(self._forward_requests, page_channel, channel)
                    await self._pass_on_pages(channel, page_channel, scope)
            finally:
                self._fetches.discard(scope)
                page_channel.close()

    async def _pass_on_pages(self, channel: Channel, page_channel: PageChannel, scope: anyio.CancelScope) -> None:
        while True:
            item = await channel.receive()
            if scope.cancel_called:  # what was there already comes without a wait, in which a cancel could strike
                return None
            match item:
                case Pages():
                    self._take(item)
                    for start, count in item.runs:
                        page_channel.arrived(item.address_space, start, start + count * PAGE)
                case Drop():
                    for start, end in item.runs:
                        page_channel.zero(item.address_space, start, end)
                case PagesEnd():
                    self.job.remote_pages_complete(page_channel)
                    return await page_channel.flush()
                case PagesLost():
                    return self._pages_lost.set()
                case _:
                    raise PeerMisbehaved(f"the source sent a {type(item).__name__} in phase {self.phase}")
            await page_channel.flush()

    async def _forward_requests(self, page_channel: PageChannel, channel: Channel) -> None:
        while (want := await page_channel.next_request()) is not None:
            await channel.send(PageRequest(want.address_space, want.start))

    async def _receive(self, channel: Channel, item: Message | Data, helpers: TaskGroup) -> None:
        """Everything up to GO, in the order in which it comes."""
        while True:
            match item:
                case Pages() | Drop() | Tree() | File():
                    self._take(item)
                    self.record.sent(channel.traffic.received)
                case RoundEnd():
                    await channel.send(RoundAck(item.round))
                case PrepareTarget() if self._may_prepare(item):
                    self.journal.note(postcopy=item.postcopy)
                    helpers.start_soon(self._prepare_target, channel, item.postcopy)
                case StatePart():
                    if len(self._expected) == MOST_PARTS:
                        raise PeerMisbehaved("the source announces more files and address spaces than a job may have")
                    self._expected.append(item)
                case StateEnd():
                    await self._verify(whole_end(self._expected, item))
                    await channel.send(Ready(self.record.id))
                case Go() if not self.journal.facts.get("rehearsal"):
                    self.journal.note(go=True)
                    self.fire(TargetEvent.GO, sync=True)
                    return
                case Abort():
                    raise Failed("the source took its offer back", why=item.reason)
                case _:
                    raise PeerMisbehaved(f"the source sent a {type(item).__name__} in phase {self.phase}")
            item = await channel.receive()

    def _take(self, item: Data) -> None:
        match item:
            case Pages():
                for address, data in item.pieces():
                    self.job.pages(item.round, item.address_space, address, data)
            case Drop():
                for start, end in item.runs:
                    self.job.drop(item.address_space, start, end)
            case Tree():
                self.job.tree(item.tree, memoryview(item.records))
            case File() if item.runs:
                self.job.image_of_pages(item)
            case File() if is_log(item.directory):
                self.job.log(item.directory, item.offset, memoryview(item.payload))
            case File():
                self.job.image(item.directory, item.name, item.offset, memoryview(item.payload), last=item.last)

    def _may_prepare(self, item: PrepareTarget) -> bool:
        """Once, and once more for post-copy where the job turned out to write too fast when all was ready."""
        if self.phase is TargetPhase.RECEIVE:
            return "postcopy" not in self.journal.facts
        return self.phase is TargetPhase.PREPARED and item.postcopy and not self.journal.facts["postcopy"]

    async def _prepare_target(self, channel: Channel, postcopy: bool) -> None:
        with self.record.span("prepare target", "target"):
            await self.job.make_ready(postcopy=postcopy)
        if first := self.phase is TargetPhase.RECEIVE:
            self.fire(TargetEvent.PREPARED)
        await self.at_breakpoint()
        await channel.send(TargetPrepared(self.record.id))
        if first:  # it is one wrapper, and one task watches it: two cannot wait for one descriptor
            raise await self.job.lost()

    async def _verify(self, end: StateEnd) -> None:
        with self.record.span("check what arrived", "target"):
            await self.job.verify(end)
        self._judged = True
        self.fire(TargetEvent.READY)
        await self.at_breakpoint()

    async def _resume(self) -> None:
        await self.at_breakpoint()
        if self.job.makes_after_go:
            with self.record.span("make the pod", "target", "the source's object deleted, sandbox, network, volumes"):
                await self.job.make_late()
        with self.record.span("restore", "target"):
            try:
                self._runs_since = await self.job.release()
            except JobDied:
                await self.fire_anyway(TargetEvent.RUNNING)
                raise
        await self.fire_anyway(TargetEvent.RUNNING)  # it runs: a full disk does not take it back
        self._word_known.set()

    async def _fill(self) -> None:
        if not self._word_known.is_set():
            self._runs_since = await self.job.resumed()
            self._word_known.set()
        await self.at_breakpoint()
        began = time.monotonic()
        with self.record.span("fill", "target"):
            figures = await self._all_filled()
        self.record.extra["fill"] = figures
        self._filled = Filled(self.record.id, round((time.monotonic() - began) * 1e3), self._differences())
        await self._clear()
        await self.fire_anyway(TargetEvent.FILLED)
        self.record.end(Outcome.COMPLETED, "the job runs here")
        self.close()

    def _differences(self) -> tuple[str, ...]:
        """As many as are told. That they cannot be told is no reason to end the job."""
        try:
            found = tuple(one[:512] for one in self.job.differences()[:MOST_DIFFERENCES])
        except Exception as error:  # noqa: BLE001 - whatever it is, the job runs
            self.log.error("what differs on the target is not known", error=str(self.cause_of(error)))
            return ()
        self.record.extra["differences"] = list(found)
        return found

    async def _all_filled(self) -> Json:
        """Every page is in its place. That this cannot be written down, on a full disk, is no reason to end the job."""

        async def lost() -> None:
            await self._pages_lost.wait()
            raise Failed("the job cannot have all its memory", why="its frozen original on the source has ended")

        async with anyio.create_task_group() as waits:
            waits.start_soon(lost)
            while True:
                try:
                    figures = await self.job.filled()
                    break
                except OSError as error:
                    self.log.error("the journal cannot be written", error=str(error))
                    await anyio.sleep(ASK_AGAIN)
            waits.cancel_scope.cancel()
        return figures

    # The way back.

    async def _give_up(self, cause: PodferryError, channel: Channel | None) -> None:
        """It will never run here, or no longer: what was made for it goes, and the source is told."""
        async with self._one_gives_up:
            if not self.machine.ended:
                had_go = bool(self.journal.facts.get("go"))
                if self.phase not in (
                    TargetPhase.GIVING_UP,
                    TargetPhase.FILL,
                ):  # no later start may take the job up again
                    await self.fire_anyway(TargetEvent.FAILURE, note=str(cause), durable=had_go)
                await self.at_breakpoint()
                ran = self.phase is TargetPhase.FILL
                await self._clear()
                while (
                    had_go and await self._is_still_here() and not ran
                ):  # the word must not be given while it could run
                    await anyio.sleep(ASK_AGAIN)
                    await self._clear()
                self._error = cause
                await self.fire_anyway(TargetEvent.DIED if ran else TargetEvent.GONE, note=str(cause))
                self.record.end(self._outcome(ran=ran), str(cause), cause)
                self._error = self.record.error
                self._word_known.set()
                self.close()
        if channel is not None:
            with anyio.move_on_after(2.0):
                await _send(channel, GaveUp(self.record.id, ErrorReport.of(cause)))

    def _outcome(self, *, ran: bool) -> Outcome:
        """Of what will not run here: a rehearsal has come to its end when nothing was against the images."""
        if ran:
            return Outcome.FAILED
        return Outcome.REHEARSED if self._judged and self.journal.facts.get("rehearsal") else Outcome.ROLLED_BACK

    async def _is_still_here(self) -> bool:
        """Asked until there is an answer: without one, nothing can be said to the source."""
        while True:
            try:
                self._still_here = await self.job.is_here()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is asked again
                self.log.error("whether the job is here is not known", error=str(self.cause_of(error)))
                await anyio.sleep(ASK_AGAIN)
            else:
                return self._still_here

    async def _clear(self) -> None:
        """Take back what the ledger still holds, and let go of descriptors."""
        for scope in self._fetches:
            scope.cancel()
        try:
            await self.job.close()
        except Exception as error:  # noqa: BLE001 - the way back goes on through its own errors
            self.log.error("not all was closed", error=str(self.cause_of(error)))
        leftovers = await self.take_back()
        if leftovers:
            self.record.extra["leftovers"] = [f"{one.kind}: {one.why}" for one in leftovers]


def _nothing() -> None:
    """What is under way already need not begin."""


async def _send(channel: Channel, message: Message) -> None:
    try:
        await channel.send(message)
    except PodferryError:
        return
