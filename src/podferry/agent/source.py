"""The source's half of a migration, told top to bottom.

Until `_pass_the_right_to_run` every failure ends in `_undo`, and the job goes on here as if nothing had happened. From that line
on only the target's own word, or a person's, can bring it back.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
import xxhash
from anyio.abc import TaskGroup

from podferry.agent.attempt import Attempt
from podferry.agent.journal import Journal
from podferry.agent.letters import Letters
from podferry.agent.owed import Owed
from podferry.agent.pages import PageSender
from podferry.agent.ports import IMAGES, LOG, UPPER, Change, HeldJob, LeavingJob
from podferry.agent.story import Story
from podferry.core.phases import SourceEvent, SourcePhase, source_machine
from podferry.core.precopy import Policy, Round, Step, decide
from podferry.core.undo import Handler
from podferry.errors import Bug, Cancelled, Failed, PodferryError, Refused, TimedOut
from podferry.model import Mode, Outcome
from podferry.wire.channel import Channel
from podferry.wire.frames import MAX_PAYLOAD, File, Pages, Tree
from podferry.wire.messages import (
    Abort,
    Accept,
    Crashed,
    Done,
    FileSum,
    Filled,
    GaveUp,
    Go,
    Offer,
    PagesEnd,
    PageWanted,
    Poise,
    Poised,
    Query,
    Ready,
    Refuse,
    Restoring,
    RoundAck,
    RoundEnd,
    Running,
    StateEnd,
    Unknown,
)

ASK_AGAIN = 1.0
ROUND_PAUSE = 0.02
DRAIN_PATIENCE = 120.0


@dataclass(frozen=True)
class Order:
    """What was asked for. `timeout` is in seconds and covers everything up to the point of no return; `bandwidth` caps
    what the data may use of the link, in bytes a second."""

    mode: Mode = Mode.STOP
    timeout: float = 3600.0
    bandwidth: float | None = None
    policy: Policy = field(default_factory=Policy)


Kind = TypeVar("Kind")
Propose = Callable[[], Awaitable[tuple[Offer, LeavingJob]]]
"""Looks at the container and says what is offered. Raises `Refused` where it cannot move."""


class Source(Attempt[SourcePhase, SourceEvent]):
    """One container on its way out of this node."""

    role = "source"
    job: LeavingJob

    def __init__(
        self,
        order: Order,
        dial: Callable[[], AbstractAsyncContextManager[Channel]],
        journal: Journal,
        story: Story,
        handlers: dict[str, Handler],
        phase: SourcePhase = SourcePhase.CHECK,
        held: HeldJob | None = None,
    ) -> None:
        super().__init__(source_machine(phase), journal, story, handlers)
        self.order, self._dial, self._held = order, dial, held
        self._scope = anyio.CancelScope()
        self._cause: PodferryError | None = None
        self._resolved: SourceEvent | None = None
        self._verdict = anyio.Event()
        self._frozen_at = 0.0
        self._quota = 1.0
        self._log_bytes = 0
        self._pending = Change()
        self._filled = False
        self._owed: Owed | None = None
        self._postcopy = bool(journal.facts.get("postcopy"))
        self._pages: PageSender

    # What may be asked from outside.

    def cancel(self) -> bool:
        """Ask for the way back. False where it is too late: the right to run has passed."""
        return self._stop(Cancelled("the migration was cancelled"))

    def resolve(self, event: SourceEvent) -> None:
        """A person decides where a migration that lost contact goes on. Raises `Refused` in any other phase."""
        if self.phase is not SourcePhase.LOST:
            raise Refused(
                f"there is nothing to resolve in phase {self.phase}",
                remedy="`resolve` is for migrations that lost contact after the right to run had passed",
            )
        self._resolved = event
        self._verdict.set()

    # The story.

    async def run(self, propose: Propose) -> None:
        """Move the job. Returns when the migration has ended; how, the story says."""
        async with anyio.create_task_group() as helpers:
            letters: Letters | None = None
            try:
                with self._scope, anyio.fail_after(self.order.timeout):
                    letters = await self._check(helpers, propose)
                    await self._precopy(letters)
                    await self._cut_over(letters)
            except TimeoutError:
                self._cause = TimedOut(f"the migration did not reach its end within {self.order.timeout:.0f} s")
            except anyio.get_cancelled_exc_class():
                with anyio.CancelScope(shield=True):
                    await self._undo(Cancelled("the agent is stopping"), letters)
                raise
            except Exception as error:  # noqa: BLE001 - whatever went wrong, the job must go on
                self._cause = self._cause or self.cause_of(error)
            if self._cause is None and letters is not None:
                self._pass_the_right_to_run()
                await self._after_go(helpers, letters)
            else:
                with anyio.CancelScope(shield=True):
                    await self._undo(self._cause or Bug("the migration stopped without a cause"), letters)
            helpers.cancel_scope.cancel()
        if self._held is not None:
            await self._held.close()

    async def go_on(self) -> None:
        """Finish a migration that an earlier agent left after the point of no return."""
        async with anyio.create_task_group() as helpers:
            match self.phase:
                case SourcePhase.RESUME | SourcePhase.SERVE:
                    self.fire(SourceEvent.CONTACT_LOST, note="the agent was restarted")
                    await self._after_go(helpers, None)
                case SourcePhase.LOST:
                    await self._after_go(helpers, None)
                case SourcePhase.COMMIT:
                    await self._commit(None)
                case SourcePhase.DRAIN:
                    await self._drain(None)
                case _:
                    with anyio.CancelScope(shield=True):
                        await self._undo(Failed("the agent was restarted in the middle of the migration"), None)
            helpers.cancel_scope.cancel()

    async def _check(self, helpers: TaskGroup, propose: Propose) -> Letters:
        """May it move? Nothing has been touched yet when the answer is no."""
        self.story.enter(self.phase)
        self.journal.enter(self.phase)
        await self.at_gate()
        with self.story.span("check"):
            proposal, self.job = await propose()
            self._held = self.job
            letters = await Letters.open(helpers, self._dial())
            helpers.start_soon(self._watch_container)
            letters.channel.limit(self.order.bandwidth)
            self._pages = PageSender(letters.channel)
            await letters.channel.send(proposal)
            answer = await letters.expect(Accept, Refuse)
        if isinstance(answer, Refuse):
            raise answer.refusals[0].error()
        self.story.expect(proposal.memory_bytes + proposal.upper_bytes)
        self.fire(SourceEvent.ACCEPTED)
        return letters

    async def _watch_container(self) -> None:
        how = await self.job.ended()
        self._stop(Failed("the container ended during the move", why=how, remedy="its exit status is on the source"))

    async def _precopy(self, letters: Letters) -> None:
        """Copy while the job runs, until what is left fits the downtime and the target is poised."""
        await self.at_gate()
        if self.order.mode is Mode.LIVE:
            with self.story.span("upper layer, first pass"):
                await self._send_upper(letters, last=False)
                await self._send_log(letters, last=False)
            self._pending = await self.job.look()
            await self._round(letters)
            while not await self._converged():
                await self._round(letters)
        self._postcopy = self._postcopy or self.order.mode is Mode.POSTCOPY
        self.journal.note(postcopy=self._postcopy)
        self.story.extra["postcopy_dependency"] = self._postcopy
        self.fire(SourceEvent.CONVERGED)
        await self._poise(letters)

    async def _converged(self) -> bool:
        decision = decide(self.story.rounds, self.order.policy, rate=self._rate(), quota=self._quota)
        self.log.info("decision", step=str(decision.step), reason=decision.reason)
        match decision.step:
            case Step.CUT_OVER:
                return True
            case Step.THROTTLE:
                self._quota = decision.quota
                await self.job.slow_down(decision.quota)
            case Step.POSTCOPY:
                self._postcopy = True
                return True
            case Step.GIVE_UP:
                raise Failed(
                    decision.reason,
                    remedy="allow throttling or post-copy, a longer --max-downtime, or use --mode stop",
                )
            case Step.GO_ON:
                pass
        return False

    async def _poise(self, letters: Letters) -> None:
        """Have the target ready but for the state, while rounds go on, so that none of its work is downtime."""
        await self.at_gate()
        with self.story.span("poise", "target", "sandbox, network, volumes, root file system"):
            await letters.channel.send(Poise(self.story.id, self._postcopy))
            async with anyio.create_task_group() as rounds:
                if self.order.mode is Mode.LIVE and not self._postcopy:
                    rounds.start_soon(self._keep_copying, letters)
                await letters.expect(Poised)
                rounds.cancel_scope.cancel()

    async def _keep_copying(self, letters: Letters) -> None:
        while True:
            await anyio.sleep(ROUND_PAUSE)
            with anyio.CancelScope(shield=True):
                await self._round(letters)

    async def _round(self, letters: Letters) -> None:
        """Send what is pending, see it arrive, and look what was written meanwhile: that is pending then."""
        number, began, before = len(self.story.rounds) + 1, time.monotonic(), letters.channel.traffic.sent
        start = self.story.now()
        pages = await self._send_pages(self._pending, number)
        sent = letters.channel.traffic.sent - before
        await letters.channel.send(RoundEnd(number, pages, sent))
        while (await letters.expect(RoundAck)).round != number:
            pass
        seconds = time.monotonic() - began
        self._pending = await self.job.look()
        self.story.add_round(Round(number, pages, sent, seconds, self._pending.bytes))
        self.story.add_span(f"round {number}", "source", start, self.story.now(), f"{pages} pages")
        self.story.expect(letters.channel.traffic.sent + self._pending.bytes)

    def _rate(self) -> float:
        """What the link has carried, in bytes a second, judged by the largest round."""
        largest = max(self.story.rounds, key=lambda one: one.bytes, default=None)
        return largest.bytes / largest.seconds if largest and largest.bytes > MAX_PAYLOAD else 0.0

    async def _cut_over(self, letters: Letters) -> None:
        """Stop the job and bring over what is left, everything at once."""
        self.fire(SourceEvent.POISED)
        await self.at_gate()
        self._frozen_at = time.monotonic()
        with self.story.span("freeze"):
            await self.job.freeze()
        with self.story.span("last look"):
            change = self._pending | await self.job.last_look()
        files: list[FileSum] = []
        async with anyio.create_task_group() as parts:
            parts.start_soon(self._send_images, letters, files)
            with self.story.span("last pages", detail=f"{change.bytes >> 10} KiB{' left for later' * self._postcopy}"):
                if self._postcopy:
                    for drop in self.job.owe(change):
                        await self._pages.send(drop)
                else:
                    await self._send_pages(change, len(self.story.rounds) + 1)
            with self.story.span("upper layer, last pass"):
                await self._send_upper(letters, last=True)
                await self._send_log(letters, last=True)
        files.append(FileSum(LOG, "log", self._log_bytes, ""))
        tree = self.job.upper_totals(UPPER)
        with self.story.span("check what arrived", "target"):
            spaces = () if self._postcopy else self.job.memory_totals()
            await letters.channel.send(StateEnd(self.story.id, tuple(files), spaces, (tree,)))
            await letters.expect(Ready)

    def _pass_the_right_to_run(self) -> None:
        """The point of no return. Nothing is awaited between the last check and this line."""
        self.fire(SourceEvent.GO, sync=True)

    async def _after_go(self, helpers: TaskGroup, letters: Letters | None) -> None:
        """Find out whether the job runs there, however long it takes, and act on it."""
        await self.at_gate()
        word = await self._say_go(letters) if letters else None
        while word is None and self._resolved is None:
            if self.phase is not SourcePhase.LOST:
                self.fire(SourceEvent.CONTACT_LOST)
            letters, word = await self._ask(helpers)
        if self._resolved is SourceEvent.RESOLVED_HERE:
            self.fire(SourceEvent.RESOLVED_HERE)
            await self._undo(Failed("contact was lost, and a person decided that the job runs on here"), letters)
        elif self._resolved is SourceEvent.RESOLVED_THERE:
            self.fire(SourceEvent.RESOLVED_THERE)
            await self._commit(letters)
        elif isinstance(word, GaveUp):
            self.fire(SourceEvent.GAVE_UP)
            await self._undo(word.error.error(), letters)
        elif letters is not None and isinstance(word, Running):
            self._downtime_ended(word.ran_ns / 1e9)
            if not self._postcopy:
                self.fire(SourceEvent.RUNNING)
                await self._commit(letters)
            elif await self._serve(letters):
                await self._commit(letters)
            else:
                await self._after_go(helpers, None)

    async def _serve(self, letters: Letters) -> bool:
        """Post-copy: give the running job its memory, first what it waits for. False when contact was lost."""
        self.fire(SourceEvent.RUNNING_SHORT)
        await self.at_gate()
        self._pages = PageSender(letters.channel)
        try:
            async with self._answering(letters) as owed:
                with self.story.span("serve pages", detail=f"{owed.bytes >> 20} MiB owed at the resume"):
                    for frame in owed.rest():
                        await self._pages.send(frame)
                        self.story.sent(letters.channel.traffic.sent)
                    await letters.channel.send(PagesEnd(self.story.id, ()))
                    word = await letters.expect(Filled, Crashed)
        except Exception as error:  # noqa: BLE001 - whatever it is, the target needs this node
            self.log.warning("contact lost while serving pages", error=str(self.cause_of(error)))
            self.fire(SourceEvent.CONTACT_LOST)
            return False
        if not isinstance(word, Filled):
            self.fire(SourceEvent.CONTACT_LOST, note="the job died on the target before it had all its memory")
            return False
        self.story.extra["filled_ms"] = word.ms
        self._filled = True
        self.fire(SourceEvent.FILLED)
        return True

    @asynccontextmanager
    async def _answering(self, letters: Letters) -> AsyncIterator[Owed]:
        """Post-copy: send each page that the job, or its restore, waits for, as long as the context lasts."""
        owed = self._owed = self._owed or self._original().owed()

        async def answer() -> None:
            while True:
                want = await letters.expect(PageWanted)
                for frame in owed.wanted(want.space, want.address):
                    await letters.channel.send(frame)

        async with anyio.create_task_group() as answers:
            answers.start_soon(answer)
            try:
                yield owed
            finally:
                answers.cancel_scope.cancel()

    def _original(self) -> HeldJob:
        if self._held is None:
            raise Bug("there is no frozen original")
        return self._held

    async def _say_go(self, letters: Letters) -> Running | GaveUp | None:
        """Send GO and hear what became of it; None where the contact broke."""
        start = self.story.now()
        try:
            await letters.channel.send(Go(self.story.id))
            return await self._hear(letters, Running, GaveUp)
        except Exception as error:  # noqa: BLE001 - whatever it is, only the target knows now
            self.log.warning("contact lost after GO", error=str(self.cause_of(error)))
            return None
        finally:
            self.story.add_span("restore", "target", start, self.story.now())

    async def _hear(self, letters: Letters, *kinds: type[Kind]) -> Kind:
        """The target's next word of one of `kinds`; in post-copy even its restore needs pages meanwhile."""
        if not self._postcopy:
            return await letters.expect(*kinds)
        async with self._answering(letters):
            return await letters.expect(*kinds)

    async def _ask(self, helpers: TaskGroup) -> tuple[Letters | None, Running | GaveUp | None]:
        """Try to reach the target again, once; a person's verdict ends the wait early."""
        try:
            letters = await Letters.open(helpers, self._dial())
            await letters.channel.send(Query(self.story.id))
            while True:
                match await self._hear(letters, Running, GaveUp, Restoring, Unknown, Crashed):
                    case (Running() | GaveUp()) as word:
                        return letters, word
                    case Unknown():
                        self.log.error("the target has no record of this migration; `podferry resolve` decides")
                        break
                    case Crashed() as crashed:
                        self.log.error("the job died on the target", error=str(crashed.error.error()))
                        break
                    case Restoring():
                        continue
        except Exception as error:  # noqa: BLE001 - whatever it is, it is asked again
            self.log.info("the target does not answer", error=str(self.cause_of(error)))
        with anyio.move_on_after(ASK_AGAIN):
            await self._verdict.wait()
        return None, None

    async def _commit(self, letters: Letters | None) -> None:
        """The job runs there: the frozen original here is killed and cleaned away."""
        await self.at_gate()
        with anyio.CancelScope(shield=True), self.story.span("commit"):
            await self._original().commit()
            leftovers = await self.take_back()
        if leftovers:
            self.story.extra["leftovers"] = [f"{one.kind}: {one.why}" for one in leftovers]
        self.fire(SourceEvent.COMMITTED)
        await self._drain(letters)

    async def _drain(self, letters: Letters | None) -> None:
        """The target fills the job's memory from its own store. The source is not needed, only curious."""
        await self.at_gate()
        event = SourceEvent.CONTACT_LOST
        with anyio.move_on_after(DRAIN_PATIENCE), self.story.span("fill", "target"):
            try:
                if letters is not None and self._filled:
                    event = SourceEvent.FILLED
                elif letters is not None:
                    filled = await letters.expect(Filled, Crashed)
                    if isinstance(filled, Filled):
                        event = SourceEvent.FILLED
                        self.story.extra["filled_ms"] = filled.ms
                if letters is not None:
                    await letters.channel.send(Done(self.story.id))
                    await letters.close()
            except PodferryError as error:
                self.log.info("contact lost after the commit", error=str(error))
        self.fire(event)
        self._end(Outcome.COMPLETED, "the job runs on the target")

    # The way back.

    async def _undo(self, cause: PodferryError, letters: Letters | None) -> None:
        """The job goes on here, and nothing of the attempt remains."""
        if self.phase is SourcePhase.CHECK and isinstance(cause, Refused):
            self.fire(SourceEvent.REFUSAL)
            await self._hang_up(letters, cause)
            return self._end(Outcome.REFUSED, str(cause), cause)
        if self.phase is not SourcePhase.UNDO:
            self.fire(SourceEvent.TROUBLE, note=str(cause))
        await self.at_gate()
        with self.story.span("undo"):
            leftovers = await self.take_back()
            await self._hang_up(letters, cause)
        if leftovers:
            error = Failed(
                "the migration failed and could not be taken back whole",
                why=f"{cause}; " + "; ".join(f"{one.kind}: {one.why}" for one in leftovers),
                evidence=cause.evidence,
            )
            self.fire(SourceEvent.UNDONE_FAILED)
            return self._end(Outcome.FAILED, str(error), error)
        if isinstance(cause, Cancelled):
            self.fire(SourceEvent.UNDONE_CANCELLED)
            return self._end(Outcome.CANCELLED, str(cause), cause)
        self.fire(SourceEvent.UNDONE_ROLLED_BACK)
        return self._end(Outcome.ROLLED_BACK, str(cause), cause)

    async def _hang_up(self, letters: Letters | None, cause: PodferryError) -> None:
        """Tell the target that its part is over, if it still listens."""
        if letters is None:
            return
        with anyio.move_on_after(2.0):
            try:
                await letters.channel.send(Abort(self.story.id, str(cause)[:1000]))
                await letters.expect(GaveUp)
            except PodferryError:
                pass
            await letters.close()

    def _stop(self, cause: PodferryError) -> bool:
        if self.phase not in (SourcePhase.CHECK, SourcePhase.PRECOPY, SourcePhase.POISE, SourcePhase.CUTOVER):
            return False
        self._cause = self._cause or cause
        self._scope.cancel()
        return True

    def _end(self, outcome: Outcome, reason: str, error: PodferryError | None = None) -> None:
        self.story.end(outcome, reason, error)
        self.close()

    def _downtime_ended(self, seconds_ago: float) -> None:
        """The job ran again on the target for so long when its word arrived: the way of the word is counted in."""
        if self._frozen_at:
            end = max(self._frozen_at, time.monotonic() - seconds_ago)
            self.story.downtime_ms = (end - self._frozen_at) * 1e3
            self.story.add_span("downtime", "source", self.story.at(self._frozen_at), self.story.at(end))

    # What is sent.

    async def _send_pages(self, change: Change, number: int) -> int:
        """Send what `change` lists. Returns how many pages carried data."""
        pages = 0
        for frame in self.job.read(change, number):
            await self._pages.send(frame)
            if isinstance(frame, Pages):
                pages += frame.count
                self.story.memory_bytes += len(frame.payload)
            self.story.sent(self._pages.channel.traffic.sent)
        return pages

    async def _send_upper(self, letters: Letters, *, last: bool) -> None:
        async for record in self.job.upper(last=last):
            await letters.channel.send(Tree(UPPER, record))
            self.story.upper_bytes += len(record)
            self.story.sent(letters.channel.traffic.sent)

    async def _send_log(self, letters: Letters, *, last: bool) -> None:
        async for offset, data in self.job.log(last=last):
            await letters.channel.send(File(LOG, "log", offset, data))
            self._log_bytes = offset + len(data)

    async def _send_images(self, letters: Letters, files: list[FileSum]) -> None:
        with self.story.span("dump", detail="CRIU, all but private memory"):
            images = await self.job.dump()
        with self.story.span("send images", detail=f"{sum(map(len, images.values())) >> 10} KiB"):
            for name, data in images.items():
                files.append(FileSum(IMAGES, name, len(data), xxhash.xxh3_128_hexdigest(data)))
                for offset in range(0, max(len(data), 1), MAX_PAYLOAD):
                    piece = data[offset : offset + MAX_PAYLOAD]
                    last = offset + MAX_PAYLOAD >= len(data)
                    await letters.channel.send(File(IMAGES, name, offset, piece, last=last))
