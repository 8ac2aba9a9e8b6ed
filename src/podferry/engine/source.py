"""The source's half of a migration, told top to bottom.

Until `_pass_the_right_to_run` every failure ends in `_undo`, and the job goes on here as if nothing had happened. From that line
on only the target's own word, or a person's, can bring it back.

The file is long for its kind, and stays whole: each step is called once, by the one above it, and whoever asks what a failure at
some step leads to reads one procedure.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial

import anyio
from anyio.abc import TaskGroup

from podferry.core.invariants import Sight
from podferry.core.phases import SOURCE_ENDS, SOURCE_MAY_RUN, SourceEvent, SourcePhase, source_machine
from podferry.core.undo import Handler, Leftover
from podferry.engine.after_switchover import AfterSwitchover
from podferry.engine.inbox import Inbox
from podferry.engine.journal import Journal
from podferry.engine.migration_record import MigrationRecord
from podferry.engine.order import Order
from podferry.engine.ports import FrozenSource, SourceJob
from podferry.engine.rounds import Rounds
from podferry.engine.sending import Sender
from podferry.engine.side import Side
from podferry.engine.standstill import Standstill
from podferry.errors import Bug, Cancelled, Failed, PodferryError, Refused, TimedOut
from podferry.model import Mode, Outcome
from podferry.wire.channel import Channel
from podferry.wire.messages import (
    Abort,
    Accept,
    Crashed,
    Done,
    Filled,
    GaveUp,
    Offer,
    PrepareTarget,
    Ready,
    Refuse,
    Running,
    TargetPrepared,
)

ASK_AGAIN = 1.0
CALL_BACK = 0.05
DRAIN_PATIENCE = 120.0
COMMIT_TRIES = 30
BEFORE_GO = frozenset({SourcePhase.CHECK, SourcePhase.PRECOPY, SourcePhase.PREPARE_TARGET, SourcePhase.CUTOVER})


Propose = Callable[[], Awaitable[tuple[Offer, SourceJob]]]
"""Inspects the container and says what is offered. Raises `Refused` where it cannot move."""


class Source(Side[SourcePhase, SourceEvent]):
    """One container on its way out of this node."""

    role = "source"
    forbidden_by_a_broken_rule = frozenset({SourceEvent.GO})
    job: SourceJob

    def __init__(
        self,
        order: Order,
        dial: Callable[[], AbstractAsyncContextManager[Channel]],
        journal: Journal,
        migration_record: MigrationRecord,
        handlers: dict[str, Handler],
        held: FrozenSource | None = None,
    ) -> None:
        """`held` is what an earlier agent left, which died in the phase that the journal names."""
        super().__init__(
            source_machine(SourcePhase(journal.phase or SourcePhase.CHECK)), journal, migration_record, handlers
        )
        self.order, self._dial, self._held = order, dial, held
        self._scope = anyio.CancelScope()
        self._cause: PodferryError | None = None
        self._resolved: SourceEvent | None = None
        self._verdict = anyio.Event()
        self._frozen_at = float(journal.facts.get("frozen_at", 0.0))
        self._filled = False
        self._too_late = False
        self._postcopy = bool(journal.facts.get("postcopy"))
        self._sender: Sender
        self._rounds: Rounds

    # What may be asked from outside.

    def cancel(self) -> bool:
        """Ask for the way back. False where it is too late: the right to run has passed."""
        return self._stop(Cancelled("the migration was cancelled"))

    def resolve(self, event: SourceEvent, *, filled: bool = False) -> None:
        """A person decides where a migration that lost contact goes on; `filled` says that the target is known to have all memory.

        Raises `Refused` in any other phase, and where the original would be killed although the target may need pages of it.
        """
        if self.phase is not SourcePhase.LOST:
            raise Refused(
                f"there is nothing to resolve in phase {self.phase}",
                remedy="`resolve` is for migrations that lost contact after the right to run had passed",
            )
        if event is SourceEvent.RESOLVED_THERE and self._postcopy and not (filled or self._filled):
            raise Refused(
                "the job on the target may lack pages that only the frozen original on this node holds",
                why="the migration used post-copy, and the target has not confirmed that it has all pages",
                remedy="restore the connection between the nodes, and the migration goes on by itself; or end the job on "
                f"{self.record.target}, then podferry resolve {self.record.id} --run-on {self.record.source}",
            )
        self._resolved = event
        self._verdict.set()

    def sight(self, phase: SourcePhase) -> Sight:
        """Whether the original executes is asked wherever it must not."""
        executing = phase not in SOURCE_MAY_RUN and self._held is not None and self._held.executing()
        kinds = tuple(entry.kind for entry in self.journal.ledger.entries)
        return Sight(phase, executing, ended=phase in SOURCE_ENDS, ledger=kinds)

    # The steps, in order.

    async def run(self, propose: Propose) -> None:
        """Move the job. Returns when the migration has ended; how, the record says."""
        self.name_in_logs()
        async with anyio.create_task_group() as helpers:
            inbox: Inbox | None = None
            try:
                with self._scope, anyio.fail_after(self.order.timeout):
                    inbox = await self._check(helpers, propose)
                    await self._precopy(inbox)
                    await self._cut_over(inbox)
            except TimeoutError:
                self._cause = TimedOut(f"the migration did not reach its end within {self.order.timeout:.0f} s")
            except anyio.get_cancelled_exc_class():
                with anyio.CancelScope(shield=True):
                    await self._undo(Cancelled("the agent is stopping"), inbox)
                raise
            except Exception as error:  # noqa: BLE001 - whatever went wrong, the job must go on
                self._cause = self._cause or self._not_asked_for(self.cause_of(error))
            if self._cause is None and inbox is not None:
                try:
                    self._pass_the_right_to_run()
                except Exception as error:  # noqa: BLE001 - a full disk, say: GO was not said, so the right is still here
                    self._cause = self.cause_of(error)
            if self._cause is None and inbox is not None:
                await self._after_go(helpers, inbox)
            else:
                with anyio.CancelScope(shield=True):
                    await self._undo(self._cause or Bug("the migration stopped without a cause"), inbox)
            helpers.cancel_scope.cancel()
        await self._let_go()

    def _not_asked_for(self, cause: PodferryError) -> PodferryError:
        """Cancelled is what somebody asked this agent for. What broke off elsewhere, a slow target's wait, say, is a failure."""
        return Failed.because("the move was broken off", cause) if isinstance(cause, Cancelled) else cause

    async def go_on(self) -> None:
        """Finish a migration that an earlier agent left after the point of no return."""
        self.name_in_logs()
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
        await self._let_go()

    async def _check(self, helpers: TaskGroup, propose: Propose) -> Inbox:
        """May it move? Nothing has been touched yet when the answer is no."""
        self.record.enter(self.phase)
        self.journal.enter(self.phase)
        await self.at_breakpoint()
        with self.record.span("check"):
            proposal, self.job = await propose()
            self._held = self.job
            inbox = await Inbox.open(helpers, self._dial())
            helpers.start_soon(self._watch_container)
            inbox.channel.limit(self.order.bandwidth)
            self._sender = Sender(inbox.channel, self.record)
            self._rounds = Rounds(self.job, self._sender, inbox, self.record, self.order.policy)
            await inbox.channel.send(replace(proposal, timeout_s=round(self.order.timeout)))
            answer = await inbox.expect(Accept, Refuse)
        if isinstance(answer, Refuse):
            raise answer.refusals[0].error()
        self.record.expect(proposal.memory_bytes + proposal.upper_bytes)
        self.fire(SourceEvent.ACCEPTED)
        return inbox

    async def _watch_container(self) -> None:
        how = await self.job.ended()
        self._stop(Failed("the container ended during the move", why=how, remedy="its exit status is on the source"))

    async def _precopy(self, inbox: Inbox) -> None:
        """Copy while the job runs, until what is left fits the downtime and the target is prepared."""
        await self.at_breakpoint()
        if self.order.mode is Mode.LIVE:
            with self.record.span("upper layer, first pass"):
                await self._sender.files(self.job, last=False)
            await self._rounds.scan_dirty()
            self._postcopy = await self._rounds.copy()
        elif self.order.mode is Mode.POSTCOPY:
            self._postcopy = True
        self.fire(SourceEvent.CONVERGED)
        await self._prepare_target(inbox)

    async def _prepare_target(self, inbox: Inbox) -> None:
        """Have the target ready but for the state, so that none of its work is downtime. The job goes on meanwhile, and may
        have written any amount when the target is: so copying ends only then."""
        await self.at_breakpoint()
        await self.job.stand_by()
        await self._have_target_prepared(inbox)
        if self.order.mode is Mode.LIVE and not self._postcopy:
            await self._sender.files(self.job, last=False)
            self._postcopy = await self._rounds.copy()
            if self._postcopy:
                await self._have_target_prepared(inbox)

    async def _have_target_prepared(self, inbox: Inbox) -> None:
        """Ask the target to get ready, for post-copy or not, and go on copying while it does."""
        self.journal.note(postcopy=self._postcopy)
        self.record.extra["postcopy_dependency"] = self._postcopy
        with self.record.span("prepare target", "target", "sandbox, network, volumes, root file system"):
            await inbox.channel.send(PrepareTarget(self.record.id, self._postcopy))
            prepared = anyio.Event()
            async with anyio.create_task_group() as copying:
                if self.order.mode is Mode.LIVE and not self._postcopy:
                    copying.start_soon(self._rounds.keep_up, prepared)
                await inbox.expect(TargetPrepared)
                prepared.set()

    async def _cut_over(self, inbox: Inbox) -> None:
        """Stop the job and bring over what is left, everything at once."""
        self.fire(SourceEvent.TARGET_PREPARED)
        await self.at_breakpoint()
        await self.job.lock_exec()
        limit = Standstill(self.order.mode, self.order.max_freeze, self.order.policy.max_downtime)
        channel = inbox.channel
        await limit.bound(
            partial(self._stop_and_copy, inbox), self.record, sent=lambda: channel.traffic.sent, sever=channel.sever
        )

    async def _stop_and_copy(self, inbox: Inbox) -> None:
        """From the freeze to the target's word that it has everything: each of these steps is bounded as a whole."""
        self._frozen_at = time.monotonic()
        self.journal.note(frozen_at=self._frozen_at)
        with self.record.span("freeze"):
            await self.job.freeze()
        with self.record.span("final scan"):
            dirty = self._rounds.pending | await self.job.final_scan()
        async with anyio.create_task_group() as parts:
            parts.start_soon(self._sender.images, self.job)
            with self.record.span("last pages", detail=f"{dirty.bytes >> 10} KiB{' left for later' * self._postcopy}"):
                if self._postcopy:
                    await self._sender.frames(self.job.leave_remote(dirty))
                else:
                    await self._sender.dirty(self.job, dirty, len(self.record.rounds) + 1)
            with self.record.span("upper layer, last pass"):
                await self._sender.files(self.job, last=True)
        with self.record.span("check what arrived", "target"):
            address_spaces = () if self._postcopy else self.job.memory_totals()
            await self._sender.state_end(self.job, address_spaces)
            await inbox.expect(Ready)

    def _pass_the_right_to_run(self) -> None:
        """The point of no return. Nothing is awaited between the last check and this line, and no cancel comes between."""
        self._too_late = True
        self.fire(SourceEvent.GO, sync=True)

    async def _after_go(self, helpers: TaskGroup, inbox: Inbox | None) -> None:
        """Find out whether the job runs there, however long it takes, and act on it."""
        self.journal.note(go=True)
        await self.at_breakpoint()
        remote_pages_of = self._original().remote_pages if self._postcopy else None
        after_switchover = AfterSwitchover(self.record, self.log, self._dial, remote_pages_of, self._runs)
        word: Running | GaveUp | Crashed | Filled | None = await after_switchover.send_go(inbox) if inbox else None
        while word is None or (self._postcopy and isinstance(word, Running)):
            if isinstance(word, Running):
                word = await self._serve(after_switchover, word)
                if word is None:
                    self.fire(SourceEvent.CONTACT_LOST)
                    await self._verdict_within(CALL_BACK)
                continue
            if self.phase is not SourcePhase.LOST:
                self.fire(SourceEvent.CONTACT_LOST)
            if self._resolved is not None:
                break
            word = await self._ask(after_switchover, helpers)
            if word is None:
                await self._verdict_within(ASK_AGAIN)
        if self._resolved is SourceEvent.RESOLVED_HERE:
            self.fire(SourceEvent.RESOLVED_HERE)
            await self._undo(
                Failed("contact was lost, and a person decided that the job runs on here"), after_switchover.inbox
            )
        elif isinstance(word, GaveUp | Crashed):
            self.fire(SourceEvent.GAVE_UP, note=word.error.what)
            await self._undo(word.error.error(), after_switchover.inbox)
        else:
            if isinstance(word, Running):
                self._downtime_ended(word.ran_ns / 1e9)
                self.fire(SourceEvent.RUNNING)
            elif self._resolved is SourceEvent.RESOLVED_THERE:
                self.fire(SourceEvent.RESOLVED_THERE)
            await self._commit(after_switchover.inbox)

    async def _ask(self, after_switchover: AfterSwitchover, helpers: TaskGroup) -> Running | GaveUp | Crashed | None:
        """Ask the target once. It may think about its answer for long: a person's verdict ends the wait."""
        word: Running | GaveUp | Crashed | None = None
        async with anyio.create_task_group() as both:

            async def verdict() -> None:
                await self._verdict.wait()
                both.cancel_scope.cancel()

            both.start_soon(verdict)
            word = await after_switchover.ask(helpers)
            both.cancel_scope.cancel()
        return word

    async def _serve(self, after_switchover: AfterSwitchover, word: Running) -> Filled | None:
        """Post-copy: the target needs this node until it has every page. None when contact was lost before."""
        self._downtime_ended(word.ran_ns / 1e9)
        self.fire(SourceEvent.RUNNING_SHORT)
        await self.at_breakpoint()
        filled = await after_switchover.serve()
        if filled is not None:
            self.record.extra |= {"filled_ms": filled.ms, "differences": list(filled.differences)}
            self._filled = True
            self.fire(SourceEvent.FILLED)
        return filled

    async def _verdict_within(self, seconds: float) -> None:
        """Wait before the target is asked again; a person's verdict ends the wait."""
        with anyio.move_on_after(seconds):
            await self._verdict.wait()

    def _original(self) -> FrozenSource:
        if self._held is None:
            raise Bug("there is no frozen original")
        return self._held

    async def _commit(self, inbox: Inbox | None) -> None:
        """The job runs there: the frozen original here is killed and cleaned away."""
        await self.at_breakpoint()
        with anyio.CancelScope(shield=True), self.record.span("commit"):
            leftovers = await self._kill_original()
            leftovers += await self.take_back()
        if leftovers:
            self.record.extra["leftovers"] = [f"{one.kind}: {one.why}" for one in leftovers]
        self.fire(SourceEvent.COMMITTED)
        await self._drain(inbox)

    async def _kill_original(self, *, replaced: bool = False) -> list[Leftover]:
        """Leave processes frozen that cannot be killed: remove them from the ledger, so that no undo step thaws them."""
        for _ in range(COMMIT_TRIES):
            try:
                await (self._original().abandon() if replaced else self._original().commit())
                return []
            except Exception as error:  # noqa: BLE001 - the job runs on the target: here it must end
                cause = self.cause_of(error)
                self.log.error("the original cannot be removed", error=str(cause))
                await anyio.sleep(ASK_AGAIN)
        for kind in ("held-dump", "freeze", "quota", "departed"):
            self.journal.release(kind)
        return [Leftover("original", str(cause))]

    async def _drain(self, inbox: Inbox | None) -> None:
        """The target fills the job's memory from its own store. The source is not needed, only curious."""
        await self.at_breakpoint()
        event = SourceEvent.CONTACT_LOST
        died: PodferryError | None = None
        with anyio.move_on_after(DRAIN_PATIENCE), self.record.span("fill", "target"):
            try:
                if inbox is not None and self._filled:
                    event = SourceEvent.FILLED
                elif inbox is not None:
                    filled = await inbox.expect(Filled, Crashed)
                    if isinstance(filled, Filled):
                        event = SourceEvent.FILLED
                        self.record.extra |= {"filled_ms": filled.ms, "differences": list(filled.differences)}
                    elif isinstance(filled, Crashed):
                        died = filled.error.error()
                if inbox is not None:
                    await inbox.channel.send(Done(self.record.id))
                    await inbox.close()
            except PodferryError as error:
                self.log.info("contact lost after the commit", error=str(error))
        self.fire(event)
        if died is not None:
            lost = Failed.because("the job moved, and died on the target before it had all its memory", died)
            return self._end(Outcome.FAILED, str(lost), lost)
        return self._end(Outcome.COMPLETED, "the job runs on the target")

    # The way back.

    async def _undo(self, cause: PodferryError, inbox: Inbox | None) -> None:
        """The job goes on here, and nothing of the attempt remains."""
        if self.phase is SourcePhase.CHECK and isinstance(cause, Refused):
            await self.fire_anyway(SourceEvent.REFUSAL)
            await self._hang_up(inbox, cause)
            return self._end(Outcome.REFUSED, str(cause), cause)
        if self.phase is not SourcePhase.UNDO:
            frozen = self.phase is SourcePhase.CUTOVER
            await self.fire_anyway(SourceEvent.FAILURE, note=str(cause), hurried=frozen)
        await self.at_breakpoint()
        unkilled: list[Leftover] = []
        with self.record.span("undo"):
            if await self._is_replaced():
                cause = Failed.because(
                    "the job is lost: its pod's name had been given to the target pod, in which it cannot run", cause
                )
                unkilled = await self._kill_original(replaced=True)
            leftovers = unkilled + await self.take_back()
            await self._hang_up(inbox, cause)
        if leftovers:
            error = Failed(
                "the migration failed, and the agent could not undo all of it",
                why=f"{cause}; " + "; ".join(f"{one.kind}: {one.why}" for one in leftovers),
                remedy="remove the cause and restart podferry-agent: it then tries to undo the rest",
                evidence=cause.evidence,
            )
            await self.fire_anyway(SourceEvent.UNDONE_FAILED)
            return self._end(Outcome.FAILED, str(error), error)
        if not await self._runs():
            await self.fire_anyway(SourceEvent.UNDONE_FAILED)
            error = Failed.because("the job has ended", cause)
            return self._end(Outcome.FAILED, str(error), error)
        if isinstance(cause, Cancelled):
            await self.fire_anyway(SourceEvent.UNDONE_CANCELLED)
            return self._end(Outcome.CANCELLED, str(cause), cause)
        await self.fire_anyway(SourceEvent.UNDONE_ROLLED_BACK)
        return self._end(Outcome.ROLLED_BACK, str(cause), cause)

    async def _is_replaced(self) -> bool:
        """After GO, of a job that keeps its name: whether it cannot go on here any more. Asked until there is an answer."""
        if not self.journal.facts.get("go") or self._held is None:
            return False
        while True:
            try:
                return await self._held.replaced()
            except Exception as error:  # noqa: BLE001 - it may run nowhere yet, or there: that decides, and nothing else
                self.log.error("whether the job may go on here is not known", error=str(self.cause_of(error)))
                await anyio.sleep(ASK_AGAIN)

    async def _runs(self) -> bool:
        """Whether the job has not ended here. Where nobody says, nothing speaks against it."""
        try:
            return self._held is None or await self._held.runs()
        except Exception as error:  # noqa: BLE001 - the way back goes on through its own errors
            self.log.error("whether the job runs is not known", error=str(self.cause_of(error)))
            return True

    async def _hang_up(self, inbox: Inbox | None, cause: PodferryError) -> None:
        """Tell the target that its part is over, if it still listens."""
        if inbox is None:
            return
        with anyio.move_on_after(2.0):
            try:
                await inbox.channel.send(Abort(self.record.id, str(cause)[:1000]))
                await inbox.expect(GaveUp)
            except PodferryError:
                pass
            await inbox.close()

    async def _let_go(self) -> None:
        """Of a migration that has ended, its record is wanted. What the job was read and sent with, with lists of its pages as long
        as its memory is large, would stay as long as the agent."""
        if self._held is not None:
            await self._held.close()
        self._held = self._cause = None
        for part in ("job", "_sender", "_rounds"):  # none is there where the container could not be looked at
            vars(self).pop(part, None)

    def _stop(self, cause: PodferryError) -> bool:
        if self._too_late or self.phase not in BEFORE_GO:
            return False
        self._cause = self._cause or cause
        self._scope.cancel()
        return True

    def _end(self, outcome: Outcome, reason: str, error: PodferryError | None = None) -> None:
        self.record.end(outcome, reason, error)
        self.close()

    def _downtime_ended(self, seconds_ago: float) -> None:
        """The job ran again on the target for so long when its word arrived: the way of the word is counted in."""
        if self._frozen_at:
            end = max(self._frozen_at, time.monotonic() - seconds_ago)
            self.record.downtime_ms = (end - self._frozen_at) * 1e3
            self.record.add_span("downtime", "source", self.record.at(self._frozen_at), self.record.at(end))
