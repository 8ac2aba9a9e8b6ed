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

from podferry.engine.inbox import Inbox
from podferry.engine.migration_record import MigrationRecord
from podferry.engine.ports import OriginalGone, RemotePages
from podferry.engine.sending import Sender
from podferry.errors import Failed, PodferryError, leaves
from podferry.wire.channel import Channel
from podferry.wire.messages import (
    Crashed,
    ErrorReport,
    Filled,
    GaveUp,
    Go,
    PageRequest,
    PagesEnd,
    PagesLost,
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


class AfterSwitchover:
    """`inbox` is the open conversation, None while there is none; `remote_pages_of` gives the remote pages in post-copy,
    else it is None; `runs`
    says whether the frozen original is still there."""

    def __init__(
        self,
        migration_record: MigrationRecord,
        log: Any,
        dial: Callable[[], AbstractAsyncContextManager[Channel]],
        remote_pages_of: Callable[[], RemotePages] | None,
        runs: Callable[[], Awaitable[bool]],
    ) -> None:
        self.inbox: Inbox | None = None
        self._record, self._log, self._dial, self._remote_pages_of, self._runs = (
            migration_record,
            log,
            dial,
            remote_pages_of,
            runs,
        )
        self._remote_pages: RemotePages | None = None

    async def send_go(self, inbox: Inbox) -> Running | GaveUp | None:
        """Send GO and hear what became of it; None where the contact broke."""
        self.inbox, start = inbox, self._record.now()
        try:
            await inbox.channel.send(Go(self._record.id))
            match await self._receive(inbox, Running, GaveUp, Crashed):
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
            self._record.add_span("restore", "target", start, self._record.now())

    async def ask(self, helpers: TaskGroup) -> Running | GaveUp | Crashed | None:
        """Try once to reach the target and hear what became of the job; None where it does not say, or where the original may
        still go on although the job is not there. `Crashed`: it is nowhere any more."""
        try:
            inbox = self.inbox = await Inbox.open(helpers, self._dial())
            if self._remote_pages is not None:
                self._remote_pages.start_over()
            await inbox.channel.send(Query(self._record.id))
            while True:
                match await self._receive(inbox, Running, GaveUp, Restoring, Unknown, Crashed):
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
        inbox = self.inbox
        if inbox is None:
            return None
        try:
            async with self._answering(inbox) as remote_pages:
                with self._record.span("serve pages", detail=f"{remote_pages.bytes >> 20} MiB remote at the resume"):
                    await Sender(inbox.channel, self._record).frames(remote_pages.rest())
                    await inbox.channel.send(PagesEnd(self._record.id, ()))
                    word = await inbox.expect(Filled, Crashed)
            if isinstance(word, Filled):
                return word
            self._log.error("the job died on the target before it had all its memory")
            await self.hang_up()
        except Exception as error:  # noqa: BLE001 - whatever it is, the target needs this node
            lost = any(isinstance(one, OriginalGone) for one in leaves(error))
            with suppress(PodferryError), anyio.move_on_after(LAST_RITES if lost else LAST_WORD):
                if lost:
                    await inbox.channel.send(PagesLost(self._record.id))
                if isinstance(word := await inbox.expect(Filled, Crashed), Filled):
                    return word  # it had all its memory, and hung up while it was given more
            await self._broken(error)
        return None

    async def hang_up(self) -> None:
        """End the conversation."""
        inbox, self.inbox = self.inbox, None
        if inbox is not None:
            await inbox.close()

    def _died(self, word: Unknown | Crashed) -> Crashed:
        """The job is not on the target, and why."""
        if isinstance(word, Crashed):
            error = Failed.because("the job died on the target", word.error.error())
        else:
            error = Failed("the target has no record of this migration")
        return Crashed(self._record.id, ErrorReport.of(error))

    def _leave_to_a_person(self, what: str) -> None:
        """It will not be different when it is asked again: say so where people look."""
        reason = f"{what}; it is frozen here, and podferry resolve {self._record.id} --run-on NODE decides"
        if self._record.reason != reason:
            self._record.reason = reason
            self._log.error(reason)

    async def _broken(self, error: Exception) -> None:
        cause = next(leaves(error))
        self._log.info("no contact with the target", error=str(cause) or type(cause).__name__)
        await self.hang_up()

    async def _receive(self, inbox: Inbox, *kinds: type[Kind]) -> Kind:
        if self._remote_pages_of is None:
            return await inbox.expect(*kinds)
        try:
            self._remote_pages = self._remote_pages or self._remote_pages_of()
        except OriginalGone:  # `serve` says so: before the job runs there, it may be that none of it is wanted
            return await inbox.expect(*kinds)
        async with self._answering(inbox):
            return await inbox.expect(*kinds)

    @asynccontextmanager
    async def _answering(self, inbox: Inbox) -> AsyncIterator[RemotePages]:
        """Send each page that the job, or its restore, waits for, as long as the context lasts."""
        assert self._remote_pages_of is not None
        remote_pages = self._remote_pages = self._remote_pages or self._remote_pages_of()

        async def answer() -> None:
            with suppress(PodferryError):  # whoever waits for the target's word hears it too
                while True:
                    want = await inbox.expect(PageRequest)
                    with anyio.CancelScope(shield=True):  # what was taken from the remote pages must go out
                        for frame in remote_pages.answer(want.address_space, want.address):
                            await inbox.channel.send(frame)

        async with anyio.create_task_group() as answers:
            answers.start_soon(answer)
            try:
                yield remote_pages
            finally:
                answers.cancel_scope.cancel()
