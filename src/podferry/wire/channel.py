"""A conversation with another node: messages and data over a `Link`, held to the session's table, with beats."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

import anyio
import zstandard
from anyio.lowlevel import checkpoint

from podferry.errors import PeerLost, PeerMisbehaved, PodferryError
from podferry.wire import frames, messages
from podferry.wire.compression import inflate
from podferry.wire.frames import Beat, Control, Data, FrameReader, Pages
from podferry.wire.link import PARTING, Link
from podferry.wire.messages import ErrorReport, Hello, Message, PeerFailure
from podferry.wire.pacing import TokenBucket
from podferry.wire.session import Role, Session

SMALL = 1 << 14
"""Frames up to this size, in bytes, go in one TLS record; payloads of greater ones are not copied."""


@dataclass(frozen=True)
class Timing:
    """In seconds: how often to beat when there is nothing else to say; after how long a silence the peer is lost if its kernel,
    too, no longer acknowledges what is sent, and if that does, since a node that is short of processors may be that slow;
    how long the side that dials waits from the first packet to the end of the greeting; and for how long the side that accepts
    waits for the first byte, and for the end of the greeting."""

    beat: float = 1.0
    silence: float = 5.0
    hung: float = 30.0
    greeting: float = 30.0
    opening: float = 5.0
    handshake: float = 10.0


@dataclass(frozen=True)
class Traffic:
    """Bytes of frames since the connection began, before encryption, and seconds that sending waited for the link."""

    sent: int
    received: int
    waited: float


class Channel:
    """One conversation about one migration. Several tasks may send; one at a time may receive.

    `peer` is the other node's name, as its certificate shows it. Errors: `PeerLost`, `PeerUntrusted`, `PeerMisbehaved`,
    and `Bug` for what the session's table does not allow us. Once a `send` began to write it ends, even if cancelled.
    """

    def __init__(self, link: Link, role: Role) -> None:
        self.session = Session(role)
        self.peer = ""
        self._link = link
        self._reader = FrameReader()
        self._zstd = zstandard.ZstdDecompressor(max_window_size=frames.MAX_PAYLOAD)
        self._sending = anyio.Lock(fast_acquire=True)
        self._receiving = anyio.ResourceGuard("receiving from")
        self._bucket: TokenBucket | None = None
        self._beats = 0
        """Bytes that only say that we are alive: they are no progress."""

    @property
    def traffic(self) -> Traffic:
        return Traffic(self._link.sent - self._beats, self._link.received, self._link.waited)

    def limit(self, rate: float | None) -> None:
        """Cap what data frames may use of the link, in bytes per second; None lifts the cap. Messages always pass."""
        self._bucket = TokenBucket(rate) if rate else None

    async def send(self, item: Message | Data) -> None:
        """Send a message or a data frame. Its buffers are free again when this returns."""
        if isinstance(item, Data):
            head, payload = frames.encode(item)
            await self._pace(len(head) + len(payload))
        else:
            head, payload = _control(item)
            await checkpoint()
        async with self._sending:
            self.session.send(item)
            await self._write(head, payload)

    async def receive(self) -> Message | Data:
        """The next message or data frame. Payloads are views that end with the next call. Raises `PeerLost` and kin.

        It may be cancelled at any time; nothing is lost then.
        """
        with self._receiving:
            await checkpoint()
            item = await self._next()
            if isinstance(item, PeerFailure):
                raise self._link.fail(PeerLost.because(f"{self.peer} hung up because of an error", item.error.error()))
            self.session.receive(item)
            return item

    async def speak(self, word: Hello | PeerFailure) -> None:
        """Say one of the two things that are outside of the session's table."""
        async with self._sending:
            await self._write(*_control(word))

    async def complain(self, error: PodferryError) -> None:
        """Tell the peer why we hang up, if there is a chance that it hears."""
        if not self._link.usable:
            return
        with suppress(PodferryError), anyio.move_on_after(PARTING):
            await self.speak(PeerFailure(ErrorReport.of(error)))

    def sever(self, error: PodferryError) -> None:
        """Break the link at once: every call, those under way too, raises `error`."""
        self._link.fail(error)

    async def close(self) -> None:
        """Say goodbye and close; nobody may be using the channel."""
        with anyio.CancelScope(shield=True):
            await self._link.close()

    async def receive_hello(self) -> Hello:
        """The peer's first word. Raises `Refused` for another protocol, what the peer's `PeerFailure` says, and kin."""
        match await self._next():
            case Hello() as hello:
                return hello
            case PeerFailure() as failure:
                raise self._link.fail(failure.error.error())
            case other:
                raise PeerMisbehaved(f"{self._link.peer} began with {type(other).__name__} in place of Hello")

    async def watch(self, timing: Timing) -> None:
        """Beat, and listen for the peer's beats, for ever; a silence breaks the link, so that all others see it."""
        beat = frames.encode(Beat())
        while True:
            await anyio.sleep(timing.beat)
            silence = self._link.silence()
            if silence > (timing.silence if self._link.unacknowledged() > timing.silence else timing.hung):
                self._link.fail(PeerLost(f"nothing from {self.peer} for {silence:.1f} s", remedy="look at the network"))
                return
            if time.monotonic() - self._link.last_sent < timing.beat / 2:
                continue
            try:
                self._sending.acquire_nowait()
            except anyio.WouldBlock:
                continue  # somebody is writing
            try:
                await self._write(*beat)
                self._beats += sum(map(len, beat))
            except PodferryError:
                return  # the link remembers it for those who use it
            finally:
                self._sending.release()

    async def _next(self) -> Message | Data:
        while True:
            frame = self._reader.next()
            if frame is None:
                self._reader.received(await self._link.read(self._reader.buffer()))
                while self._reader.missing:
                    self._reader.received(await self._link.read(self._reader.buffer()))
            elif isinstance(frame, Control):
                return messages.decode(frame.payload)
            elif isinstance(frame, Pages) and frame.zstd:
                return inflate(frame, self._zstd)
            elif not isinstance(frame, Beat):
                return frame

    async def _write(self, head: bytes, payload: memoryview) -> None:
        if len(head) + len(payload) <= SMALL:
            await self._link.write(head + payload)
        else:
            await self._link.write(head)
            await self._link.write(payload)

    async def _pace(self, size: int) -> None:
        wait = self._bucket.take(time.monotonic(), size) if self._bucket else 0.0
        await (anyio.sleep(wait) if wait else checkpoint())


def _control(message: Message) -> tuple[bytes, memoryview]:
    return frames.encode(Control(messages.encode(message)))
