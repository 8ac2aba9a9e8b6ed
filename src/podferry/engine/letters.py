"""The target's words, sorted: the story waits for the one it needs, and hears at once when the target is gone or complains."""

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


class Letters:
    """A conversation whose incoming messages are kept until they are asked for."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._waiting: list[Message] = []
        self._failure: PodferryError | None = None
        self._news = anyio.Event()
        self._scope = anyio.CancelScope()
        self.closed = anyio.Event()

    @staticmethod
    async def open(helpers: TaskGroup, conversation: AbstractAsyncContextManager[Channel]) -> Letters:
        """Begin `conversation` in a task of its own among `helpers`. Raises what keeps it from beginning."""

        async def run(*, task_status: TaskStatus[Letters]) -> None:
            letters: Letters | None = None
            try:
                async with conversation as channel:
                    letters = Letters(channel)
                    task_status.started(letters)
                    with letters._scope:
                        await letters._pump()
            except PodferryError as error:
                if letters is None:
                    raise
                letters._fail(error)
            finally:
                if letters is not None:
                    letters._fail(PeerLost(f"the conversation with {letters.channel.peer} is over"))
                    letters.closed.set()

        opened: Letters = await helpers.start(run)
        return opened

    async def expect(self, *kinds: type[Kind]) -> Kind:
        """The next message of one of `kinds`; others keep waiting. Raises what ended the conversation, if that comes first: where
        the target gave up, its reason."""
        while True:
            for letter in self._waiting:
                if isinstance(letter, kinds):
                    self._waiting.remove(letter)
                    return letter
            if self._failure is not None:
                gave_up = next((letter for letter in self._waiting if isinstance(letter, GaveUp)), None)
                raise gave_up.error.error() if gave_up else self._failure
            await self._news.wait()

    async def close(self) -> None:
        """Say goodbye."""
        self._scope.cancel()
        await self.closed.wait()

    async def _pump(self) -> None:
        while True:
            item = await self.channel.receive()
            if not isinstance(item, Data | Progress):
                self._waiting.append(item)
                self._tell()

    def _fail(self, error: PodferryError) -> None:
        self._failure = self._failure or error
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = anyio.Event()
