"""Sending pages: compressed while that makes the link carry more of them, plain while the processor has better things to do."""

from __future__ import annotations

import time

from podferry.wire.channel import Channel
from podferry.wire.compression import CompressionDecision, Deflater, Measured, decide
from podferry.wire.frames import Drop, Pages

WINDOW = 16 << 20
"""Bytes of pages after which it is decided anew."""
SAMPLE = 1 << 20
"""Bytes of each window that are compressed for measure while compression is off."""


class PageSender:
    """Sends the frames of pages of one migration over `channel`. `decision` says whether they are compressed now, and why."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.decision = CompressionDecision(False, "nothing was sent yet")
        self.compressed = 0
        self._begin()

    async def send(self, frame: Pages | Drop) -> None:
        """Send a frame; its buffers are free again when this returns."""
        if isinstance(frame, Pages):
            size = len(frame.payload)
            if self.decision.on:
                frame = self._deflater.deflate(frame)
                self.compressed += frame.zstd
            elif self._deflater.taken < SAMPLE:
                self._deflater.deflate(frame)
            self._taken += size
        await self.channel.send(frame)
        if self._taken >= WINDOW:
            self._decide()

    def _begin(self) -> None:
        self._deflater = Deflater()
        self._taken = 0
        self._since, self._before = time.monotonic(), self.channel.traffic

    def _decide(self) -> None:
        seconds = max(time.monotonic() - self._since, 1e-6)
        now = self.channel.traffic
        measured = Measured(
            link=(now.sent - self._before.sent) / seconds,
            waiting=min(1.0, (now.waited - self._before.waited) / seconds),
            deflate=self._deflater.rate,
            ratio=self._deflater.ratio,
        )
        self.decision = decide(self.decision.on, measured)
        self._begin()
