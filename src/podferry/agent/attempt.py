"""What the source's and the target's half of a migration have in common: a place in the table, a journal, a story."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import StrEnum
from typing import Generic, TypeVar

import anyio
import structlog

from podferry.agent import gate, metrics
from podferry.agent.journal import Journal
from podferry.agent.story import Story
from podferry.core.invariants import Sight, broken
from podferry.core.phases import Machine
from podferry.core.undo import Handler, Leftover
from podferry.errors import Bug, InvariantBroken, PodferryError

UNDO_DEADLINE = 60.0
REPORT = "please report this with the journals of the migration on both nodes (podferry explain ID)"

Phase = TypeVar("Phase", bound=StrEnum)
Event = TypeVar("Event", bound=StrEnum)


class Attempt(Generic[Phase, Event]):
    """One half of a migration under way. `role` is `source` or `target`."""

    role: str
    forbidden_by_a_broken_rule: frozenset[Event] = frozenset()
    """Steps that are not taken where a rule does not hold. All others lead back or mend: there it is counted, and said."""

    def __init__(
        self, machine: Machine[Phase, Event], journal: Journal, story: Story, handlers: Mapping[str, Handler]
    ) -> None:
        self.machine, self.journal, self.story = machine, journal, story
        self._handlers = handlers
        self.ended = anyio.Event()
        self.log = structlog.get_logger().bind(migration=story.id, role=self.role)

    @property
    def phase(self) -> Phase:
        """Where this half is."""
        return self.machine.phase

    def fire(self, event: Event, *, note: str = "", sync: bool = False) -> None:
        """Move on: in the journal first (on disk already if `sync`), then in the table, then in the story.

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
        self.machine.fire(event)
        self.story.enter(phase, note)
        self.journal.save_record(self.story.to_dict())
        self.log.info("phase", phase=str(phase), because=str(event), note=note)

    def sight(self, phase: Phase) -> Sight:
        """What this agent sees as it is about to enter `phase`."""
        raise NotImplementedError

    async def at_gate(self) -> None:
        """Where a breakpoint may hold this agent."""
        await gate.hold(self.role, self.phase, self.story.name)

    def cause_of(self, error: BaseException) -> PodferryError:
        """What went wrong, out of the groups that tasks wrap it in. What is not ours is a bug and is logged whole."""
        causes = list(leaves(error))
        for cause in causes:
            if isinstance(cause, PodferryError):
                return cause
        self.log.error("bug", exc_info=error)
        return Bug.because(f"the {self.role}'s half of the migration failed", causes[0])

    async def take_back(self) -> list[Leftover]:
        """Undo everything that the ledger holds, within a deadline, whoever cancels meanwhile."""
        held = [entry.kind for entry in self.journal.ledger.entries]
        with anyio.move_on_after(UNDO_DEADLINE, shield=True) as scope:
            leftovers = await self.journal.ledger.unwind(self._handlers)
        if scope.cancelled_caught:
            leftovers = [
                Leftover(entry.kind, f"no end within {UNDO_DEADLINE:.0f} s") for entry in self.journal.ledger.entries
            ]
        with suppress(OSError):
            for kind in set(held) - {leftover.kind for leftover in leftovers}:
                self.journal.release(kind)
        for leftover in leftovers:
            metrics.violated("I5")
            self.log.error("left behind", what=leftover.kind, why=leftover.why)
        return leftovers

    def close(self) -> None:
        """The half has ended: its record is kept, its journal closed."""
        self.journal.save_record(self.story.to_dict())
        self.journal.close()
        metrics.ended(self.role, self.story)
        self.ended.set()


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors themselves, out of the groups that tasks wrap them in."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from leaves(one)
    else:
        yield error
