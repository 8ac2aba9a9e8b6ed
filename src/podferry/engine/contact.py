"""The source's line to the target after GO: what became of the job? Asked until there is an answer; silence is none.

In post-copy the job's memory goes over the same line, and even its restore may wait for pages: so while a word is awaited,
wanted pages are answered.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, TypeVar

import anyio
from anyio.abc import TaskGroup

from podferry.engine.attempt import leaves
from podferry.engine.letters import Letters
from podferry.engine.ports import OriginalGone, RemotePages
from podferry.engine.sending import Sender
from podferry.engine.story import Story
from podferry.errors import Failed, PodferryError
from podferry.wire.channel import Channel
from podferry.wire.messages import (
    Crashed,
    ErrorReport,
    Filled,
    GaveUp,
    Go,
    PagesEnd,
    PagesLost,
    PageWanted,
    Query,
    Restoring,
    Running,
    Unknown,
)

Kind = TypeVar("Kind")

LAST_WORD = 1.0
"""Seconds to look for what the target said before a connection broke."""
LAST_RITES = 60.0
"""Seconds for the target to end a job that can never have all its memory."""


class Contact:
    """`letters` is the open conversation, None while there is none; `debt` gives what is owed in post-copy, else it is None; `runs`
    says whether the frozen original is still there."""

    def __init__(
        self,
        story: Story,
        log: Any,
        dial: Callable[[], AbstractAsyncContextManager[Channel]],
        debt: Callable[[], RemotePages] | None,
        runs: Callable[[], Awaitable[bool]],
    ) -> None:
        self.letters: Letters | None = None
        self._story, self._log, self._dial, self._debt, self._runs = story, log, dial, debt, runs
        self._owed: RemotePages | None = None

    async def say_go(self, letters: Letters) -> Running | GaveUp | None:
        """Send GO and hear what became of it; None where the contact broke."""
        self.letters, start = letters, self._story.now()
        try:
            await letters.channel.send(Go(self._story.id))
            match await self._hear(letters, Running, GaveUp, Crashed):
                case (Running() | GaveUp()) as word:
                    return word
                case Crashed() as died:
                    self._leave_to_a_person(str(self._died(died).error.error()))
            await self.hang_up()
            return None
        except Exception as error:  # noqa: BLE001 - whatever it is, only the target knows now
            await self._broken(error)
            return None
        finally:
            self._story.add_span("restore", "target", start, self._story.now())

    async def ask(self, helpers: TaskGroup) -> Running | GaveUp | Crashed | None:
        """Try once to reach the target and hear what became of the job; None where it does not say, or where the original may
        still go on although the job is not there. `Crashed`: it is nowhere any more."""
        try:
            letters = self.letters = await Letters.open(helpers, self._dial())
            if self._owed is not None:
                self._owed.start_over()
            await letters.channel.send(Query(self._story.id))
            while True:
                match await self._hear(letters, Running, GaveUp, Restoring, Unknown, Crashed):
                    case (Running() | GaveUp()) as word:
                        return word
                    case (Unknown() | Crashed()) as word:
                        died = self._died(word)
                        if not await self._runs():
                            await self.hang_up()
                            return died
                        self._leave_to_a_person(str(died.error.error()))
                        break
                    case Restoring():
                        continue
            await self.hang_up()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is asked again
            await self._broken(error)
        return None

    async def serve(self) -> Filled | None:
        """Post-copy: give the running job its memory, first what it waits for. None where the contact broke."""
        letters = self.letters
        if letters is None:
            return None
        try:
            async with self._answering(letters) as owed:
                with self._story.span("serve pages", detail=f"{owed.bytes >> 20} MiB owed at the resume"):
                    await Sender(letters.channel, self._story).frames(owed.rest())
                    await letters.channel.send(PagesEnd(self._story.id, ()))
                    word = await letters.expect(Filled, Crashed)
            if isinstance(word, Filled):
                return word
            self._log.error("the job died on the target before it had all its memory")
            await self.hang_up()
        except Exception as error:  # noqa: BLE001 - whatever it is, the target needs this node
            lost = any(isinstance(one, OriginalGone) for one in leaves(error))
            with suppress(PodferryError), anyio.move_on_after(LAST_RITES if lost else LAST_WORD):
                if lost:
                    await letters.channel.send(PagesLost(self._story.id))
                if isinstance(word := await letters.expect(Filled, Crashed), Filled):
                    return word  # it had all its memory, and hung up while it was given more
            await self._broken(error)
        return None

    async def hang_up(self) -> None:
        """End the conversation."""
        letters, self.letters = self.letters, None
        if letters is not None:
            await letters.close()

    def _died(self, word: Unknown | Crashed) -> Crashed:
        """The job is not on the target, and why."""
        if isinstance(word, Crashed):
            error = Failed.because("the job died on the target", word.error.error())
        else:
            error = Failed("the target has no record of this migration")
        return Crashed(self._story.id, ErrorReport.of(error))

    def _leave_to_a_person(self, what: str) -> None:
        """It will not be different when it is asked again: say so where people look."""
        reason = f"{what}; it is frozen here, and podferry resolve {self._story.id} --run-on NODE decides"
        if self._story.reason != reason:
            self._story.reason = reason
            self._log.error(reason)

    async def _broken(self, error: Exception) -> None:
        cause = next(leaves(error))
        self._log.info("no contact with the target", error=str(cause) or type(cause).__name__)
        await self.hang_up()

    async def _hear(self, letters: Letters, *kinds: type[Kind]) -> Kind:
        if self._debt is None:
            return await letters.expect(*kinds)
        try:
            self._owed = self._owed or self._debt()
        except OriginalGone:  # `serve` says so: before the job runs there, it may be that none of it is wanted
            return await letters.expect(*kinds)
        async with self._answering(letters):
            return await letters.expect(*kinds)

    @asynccontextmanager
    async def _answering(self, letters: Letters) -> AsyncIterator[RemotePages]:
        """Send each page that the job, or its restore, waits for, as long as the context lasts."""
        assert self._debt is not None
        owed = self._owed = self._owed or self._debt()

        async def answer() -> None:
            with suppress(PodferryError):  # whoever waits for the target's word hears it too
                while True:
                    want = await letters.expect(PageWanted)
                    with anyio.CancelScope(shield=True):  # what was taken from the debt must go out
                        for frame in owed.wanted(want.space, want.address):
                            await letters.channel.send(frame)

        async with anyio.create_task_group() as answers:
            answers.start_soon(answer)
            try:
                yield owed
            finally:
                answers.cancel_scope.cancel()
