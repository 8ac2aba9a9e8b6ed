"""The peer's words, sorted: a story waits for the one it needs, and hears at once when the peer is gone or complains."""

from __future__ import annotations

from typing import TypeVar

import anyio

from podferry.errors import PodferryError
from podferry.wire.frames import Beat, Data
from podferry.wire.messages import Message, Trouble
from podferry.wire.transport import Channel

Kind = TypeVar("Kind")


class Letters:
    """Reads a channel in the background and keeps its messages until they are asked for."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._waiting: list[Message] = []
        self._failure: PodferryError | None = None
        self._news = anyio.Event()

    async def pump(self) -> None:
        """Read until the connection ends. Whoever waits in `expect` is told how it ended."""
        try:
            while True:
                frame = await self.channel.receive()
                match frame:
                    case Trouble():
                        raise frame.error.error()
                    case Data() | Beat():
                        continue
                    case _:
                        self._waiting.append(frame)
                        self._tell()
        except PodferryError as error:
            self._failure = error
            self._tell()

    async def expect(self, *kinds: type[Kind]) -> Kind:
        """The next message of one of `kinds`; others keep waiting. Raises what ended the connection, if that comes first."""
        while True:
            for letter in self._waiting:
                if isinstance(letter, kinds):
                    self._waiting.remove(letter)
                    return letter
            if self._failure is not None:
                raise self._failure
            await self._news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = anyio.Event()
