"""The common base of the source's and the target's side of a migration: a phase, a journal, a record."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from itertools import chain, repeat
from typing import Any, Generic, TypeVar

import anyio
import structlog

from podferry.core.invariants import Sight, broken
from podferry.core.phases import PhaseMachine
from podferry.core.undo import Handler, Leftover
from podferry.engine import breakpoints, metrics
from podferry.engine.journal import Journal
from podferry.engine.migration_record import MigrationRecord
from podferry.errors import Bug, Failed, InvariantBroken, PodferryError, TimedOut, leaves

UNDO_STEP = 20.0
"""Seconds within which one thing must be taken back."""
UNDO_PAUSES = (0.1, 0.5, 2.0, 5.0, 10.0)
"""Seconds after which what could not be taken back is tried again; then it is left to the agent's next start."""
WRITE_PAUSES = (0.1, 0.5, 2.0, 5.0)
"""Seconds after which a line that could not be written into the journal is tried again."""
REPORT = "please report this with the journals of the migration on both nodes (podferry explain ID)"

Phase = TypeVar("Phase", bound=StrEnum)
Event = TypeVar("Event", bound=StrEnum)


class Side(Generic[Phase, Event]):
    """One half of a migration under way. `role` is `source` or `target`."""

    role: str
    forbidden_by_a_broken_rule: frozenset[Event] = frozenset()
    """Steps that are not taken where a rule does not hold. All others lead back or mend: there it is counted, and said."""

    def __init__(
        self,
        machine: PhaseMachine[Phase, Event],
        journal: Journal,
        migration_record: MigrationRecord,
        handlers: Mapping[str, Handler],
    ) -> None:
        self.machine, self.journal, self.record = machine, journal, migration_record
        self._handlers = {kind: _bounded(handler) for kind, handler in handlers.items()}
        self.ended = anyio.Event()
        self.log = structlog.get_logger().bind(migration=migration_record.id, role=self.role)

    @property
    def phase(self) -> Phase:
        """The current phase of this side."""
        return self.machine.phase

    def fire(self, event: Event, *, note: str = "", sync: bool = False) -> None:
        """Move on: in the journal first (on disk already if `sync`), then in the table, then in the record.

        Raises `InvariantBroken`, and stays, where a rule would not hold and `event` is one that this forbids.
        """
        phase = self.machine.next(event)
        if rules := broken(self.sight(phase)):
            for rule in rules:
                metrics.violated(rule[:2])
                self.log.error("a rule does not hold", rule=rule, step=str(event))
            if event in self.forbidden_by_a_broken_rule:
                raise InvariantBroken("; ".join(rules), remedy=REPORT)
        self.journal.enter(phase, sync=sync)
        self._moved(event, note)

    async def fire_anyway(self, event: Event, *, note: str = "", durable: bool = False, hurried: bool = False) -> None:
        """Move on, on the way back and where all is done, although the journal may not be writable: a full disk must not end
        the job, or keep it frozen.

        It is tried again for a while, `hurried` for a moment only, since the job stands still meanwhile, and if `durable` for ever;
        otherwise the journal then misses the step, and the agent's next start takes it anew.
        """
        pauses = WRITE_PAUSES[:1] if hurried else WRITE_PAUSES
        for pause in chain(pauses, repeat(WRITE_PAUSES[-1]) if durable else ()):
            try:
                return self.fire(event, note=note)
            except OSError as error:
                self.log.error("the journal cannot be written", error=str(error), because=str(event))
                await anyio.sleep(pause)
        return self._moved(event, note)

    def _moved(self, event: Event, note: str) -> None:
        phase = self.machine.fire(event)
        self.record.enter(phase, note)
        self._keep_record()
        self.log.info("phase", phase=str(phase), because=str(event), note=note)

    def _keep_record(self) -> None:
        """Save the record, which is only shown to people; the journal decides. So a full disk must not stop the migration here."""
        try:
            self.journal.save_record(self.record.to_dict())
        except OSError as error:
            self.log.error("the record cannot be kept", error=str(error))

    def sight(self, phase: Phase) -> Sight:
        """The facts of this agent as it is about to enter `phase`."""
        raise NotImplementedError

    async def at_breakpoint(self) -> None:
        """A point at which a test's breakpoint may hold this agent."""
        await breakpoints.hold(self.role, self.phase, self.record.name)

    def cause_of(self, error: BaseException) -> PodferryError:
        """The error itself, out of the groups that tasks wrap it in. Exceptions that are not podferry's are bugs, logged whole."""
        causes = list(leaves(error))
        for cause in causes:
            if isinstance(cause, PodferryError):
                return cause
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                return Failed(
                    f"a file system of the {self.role}'s node has no room",
                    why=str(cause),
                    remedy="make room there, and migrate again",
                )
            if isinstance(cause, MemoryError):
                return Failed(
                    f"the agent of the {self.role}'s node has as much memory as it may have",
                    why="what it has to keep of this job and of others on their way is too much",
                    remedy="migrate fewer jobs at once, or give agents more memory (AGENT_MEMORY in deploy/agent.yaml)",
                )
        self.log.error("bug", exc_info=error)
        return Bug.because(f"the {self.role}'s half of the migration failed", causes[0])

    async def take_back(self) -> list[Leftover]:
        """Undo everything that the ledger holds, whoever cancels meanwhile. What fails is tried again for a while; what is
        still held then is returned, and the agent's next start tries it once more."""
        with anyio.CancelScope(shield=True):
            leftovers = await self._unwind()
            for pause in UNDO_PAUSES:
                if not leftovers:
                    break
                for leftover in leftovers:
                    self.log.warning("not taken back yet", what=leftover.kind, why=leftover.why)
                await anyio.sleep(pause)
                leftovers = await self._unwind()
        for leftover in leftovers:
            metrics.violated("I5")
            self.log.error("left behind", what=leftover.kind, why=leftover.why)
        return leftovers

    async def _unwind(self) -> list[Leftover]:
        held = [entry.kind for entry in self.journal.ledger.entries]
        leftovers = await self.journal.ledger.unwind(self._handlers)
        left = {leftover.kind for leftover in leftovers}
        with suppress(OSError):
            for kind in dict.fromkeys(held):
                if kind not in left:
                    self.journal.release(kind)
        return leftovers

    def name_in_logs(self) -> None:
        """Have each line that this task logs, whoever writes it, name the migration; so do the tasks that it starts."""
        structlog.contextvars.bind_contextvars(
            migration=self.record.id, job=self.record.name, role=self.role, mode=str(self.record.mode)
        )

    async def sweep(self) -> None:
        """Take back what a migration that has ended could not."""
        self.name_in_logs()
        leftovers = await self.take_back()
        self.record.extra["leftovers"] = [f"{one.kind}: {one.why}" for one in leftovers]
        self._keep_record()
        self.journal.close()

    def close(self) -> None:
        """The half has ended: its record is kept, its journal closed."""
        self._keep_record()
        self.journal.close()
        metrics.ended(self.role, self.record)
        self.ended.set()


def _bounded(handler: Handler) -> Handler:
    async def within(facts: Mapping[str, Any]) -> object:
        try:
            with anyio.fail_after(UNDO_STEP):
                return await handler(facts)
        except TimeoutError:
            raise TimedOut(f"the undo step did not end within {UNDO_STEP:.0f} s") from None

    return within
