"""zstd for pages: worth it when the link is the limit and the processor is not.

`Deflater` and `inflate` do it, `decide` says whether; the engine asks it once a round.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import zstandard

from podferry.errors import PeerMisbehaved
from podferry.wire.frames import PAGE, Pages

LEVEL = 1
WORTH_STARTING = 1.25
WORTH_GOING_ON = 1.05
LINK_IS_THE_LIMIT = 0.5
"""The share of a round's time that the sender must have waited for the link for the link to be the limit."""


@dataclass(frozen=True)
class Measured:
    """What a round showed.

    `link` is the rate on the wire in bytes/s and `waiting` the share (0 to 1) of the time that the sender waited for
    the link to take more; `deflate` is the rate in bytes/s at which pages can be compressed and `ratio` how many
    times smaller they become.
    """

    link: float
    waiting: float
    deflate: float
    ratio: float


@dataclass(frozen=True)
class CompressionDecision:
    """Whether to compress, and why."""

    on: bool
    reason: str


def decide(on: bool, measured: Measured) -> CompressionDecision:
    """Whether to compress the next round, given whether the last one was.

    With compression the rate of pages is the smaller of what the processor compresses and what the link then carries.
    Starting it takes a clearer gain than keeping it, so that it does not go back and forth.

    A link of 125 MB/s, always the limit, pages that shrink 3 times, 800 MB/s deflated: on, 3.0 times faster. The
    same with 130 MB/s deflated: off. A sender that waits a tenth of its time: off, the link is not the limit.
    """
    gain = min(measured.link * measured.ratio, measured.deflate) / measured.link if measured.link > 0 else 0.0
    if not on and measured.waiting < LINK_IS_THE_LIMIT:
        return CompressionDecision(False, f"the sender waited for the link only {measured.waiting:.0%} of the time")
    if on and measured.waiting < LINK_IS_THE_LIMIT and measured.deflate < measured.link * measured.ratio:
        return CompressionDecision(
            False, f"the processor is the limit: it compresses {measured.deflate / 1e6:.0f} MB/s"
        )
    needed = WORTH_GOING_ON if on else WORTH_STARTING
    figures = f"{measured.ratio:.1f} times smaller at {measured.deflate / 1e6:.0f} MB/s"
    if gain < needed:
        return CompressionDecision(False, f"no gain on a link of {measured.link / 1e6:.0f} MB/s: {figures}")
    return CompressionDecision(True, f"{gain:.1f} times faster on a link of {measured.link / 1e6:.0f} MB/s: {figures}")


class Deflater:
    """Compresses frames of pages and keeps count: `taken` and `given` in bytes, `seconds` spent. One thread at a time."""

    def __init__(self, level: int = LEVEL) -> None:
        self._zstd = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
        self.taken = 0
        self.given = 0
        self.seconds = 0.0

    @property
    def ratio(self) -> float:
        """How many times smaller the pages became; 1 before the first."""
        return self.taken / self.given if self.given else 1.0

    @property
    def rate(self) -> float:
        """Bytes of pages compressed per second; 0 before the first."""
        return self.taken / self.seconds if self.seconds else 0.0

    def deflate(self, pages: Pages) -> Pages:
        """The frame compressed, or itself if that saves less than an eighth (then the receiver has less work)."""
        begun = time.perf_counter()
        small = self._zstd.compress(pages.payload)
        self.seconds += time.perf_counter() - begun
        size = pages.count * PAGE
        self.taken += size
        worth = len(small) <= size - size // 8
        self.given += len(small) if worth else size
        return replace(pages, payload=small, zstd=True) if worth else pages


def inflate(pages: Pages, zstd: zstandard.ZstdDecompressor) -> Pages:
    """The frame as it was before `Deflater.deflate`. Raises `PeerMisbehaved` for other than exactly its pages."""
    size = pages.count * PAGE
    try:
        claimed = zstandard.frame_content_size(pages.payload)
        if claimed != size:
            raise PeerMisbehaved(f"{pages.count} pages compressed from {claimed} bytes")
        payload = zstd.decompress(pages.payload, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as cause:
        raise PeerMisbehaved.because("damaged compressed pages", cause) from cause
    if len(payload) != size:
        raise PeerMisbehaved(f"{pages.count} pages decompressed to {len(payload)} bytes")
    return replace(pages, payload=payload, zstd=False)
