"""The inbox for the target's messages: the source waits for the message it needs, and learns at once when the target is gone or
complains."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import TypeVar

import anyio
from anyio.abc import TaskGroup, TaskStatus

from podferry.errors import PeerLost, PodferryError
from podferry.wire.channel import Channel
from podferry.wire.frames import Data
from podferry.wire.messages import GaveUp, Message, Progress

Kind = TypeVar("Kind")


class Inbox:
    """A conversation whose incoming messages are kept until they are asked for."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._waiting: list[Message] = []
        self._failure: PodferryError | None = None
        self._news = anyio.Event()
        self._scope = anyio.CancelScope()
        self.closed = anyio.Event()

    @staticmethod
    async def open(helpers: TaskGroup, conversation: AbstractAsyncContextManager[Channel]) -> Inbox:
        """Begin `conversation` in a task of its own among `helpers`. Raises what keeps it from beginning."""

        async def run(*, task_status: TaskStatus[Inbox]) -> None:
            inbox: Inbox | None = None
            try:
                async with conversation as channel:
                    inbox = Inbox(channel)
                    task_status.started(inbox)
                    with inbox._scope:
                        await inbox._receive_loop()
            except PodferryError as error:
                if inbox is None:
                    raise
                inbox._fail(error)
            finally:
                if inbox is not None:
                    inbox._fail(PeerLost(f"the conversation with {inbox.channel.peer} is over"))
                    inbox.closed.set()

        opened: Inbox = await helpers.start(run)
        return opened

    async def expect(self, *kinds: type[Kind]) -> Kind:
        """The next message of one of `kinds`; others keep waiting. Raises what ended the conversation, if that comes first: where
        the target gave up, its reason."""
        while True:
            for message in self._waiting:
                if isinstance(message, kinds):
                    self._waiting.remove(message)
                    return message
            if self._failure is not None:
                gave_up = next((message for message in self._waiting if isinstance(message, GaveUp)), None)
                raise gave_up.error.error() if gave_up else self._failure
            await self._news.wait()

    async def close(self) -> None:
        """Say goodbye."""
        self._scope.cancel()
        await self.closed.wait()

    async def _receive_loop(self) -> None:
        while True:
            item = await self.channel.receive()
            if not isinstance(item, Data | Progress):
                self._waiting.append(item)
                self._notify()

    def _fail(self, error: PodferryError) -> None:
        self._failure = self._failure or error
        self._notify()

    def _notify(self) -> None:
        self._news.set()
        self._news = anyio.Event()
