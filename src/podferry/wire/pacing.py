"""A cap on the bandwidth, as a token bucket. Pure: the clock is passed in."""

from __future__ import annotations

from dataclasses import dataclass, field

BURST = 0.05
"""Seconds of traffic that may go at once after a pause: long enough for timers, short enough for a neighbour's voice."""


@dataclass
class TokenBucket:
    """At most `rate` bytes per second, over any time longer than `BURST`."""

    rate: float
    _paid_until: float = field(default=float("-inf"), init=False)

    def take(self, now: float, size: int) -> float:
        """`size` bytes are to go at `now` (seconds of any steady clock): how many seconds to wait before they do.

        They count as gone: call it once for each piece.
        """
        start = max(self._paid_until, now - BURST)
        self._paid_until = start + size / self.rate
        return max(0.0, start - now)
