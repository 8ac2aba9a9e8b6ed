"""Gathering scattered runs of pages into frames that are worth a system call."""

from __future__ import annotations

from collections.abc import Iterator

from podferry.errors import Bug
from podferry.wire.frames import MAX_PAYLOAD, PAGE, Buffer, Pages, Run


class PageBatch:
    """Pages of one address space and round, as frames of up to a megabyte.

    Large runs pass through uncopied, small ones are gathered in one buffer, which is used again: send each frame before
    asking for the next. Iterate over `add` for each run, and over `flush` at the end.
    """

    PASS_THROUGH = MAX_PAYLOAD // 4
    """From this many bytes on, a frame of its own costs less than the copy."""

    def __init__(self, address_space: int, round: int) -> None:
        self._address_space = address_space
        self._round = round
        self._buffer = memoryview(bytearray(MAX_PAYLOAD))
        self._runs: list[Run] = []
        self._used = 0

    def add(self, address: int, data: Buffer) -> Iterator[Pages]:
        """Take the run at `address`; give the frames that must go before more fits."""
        rest = memoryview(data).cast("B")
        if not rest or len(rest) % PAGE:
            raise Bug(f"{len(rest)} bytes at {address:#x} are no pages")
        while rest:
            if len(rest) >= self.PASS_THROUGH:
                size = min(len(rest), MAX_PAYLOAD)
                yield Pages(self._address_space, self._round, ((address, size // PAGE),), rest[:size])
            else:
                size = min(len(rest), MAX_PAYLOAD - self._used)
                self._buffer[self._used : self._used + size] = rest[:size]
                self._runs.append((address, size // PAGE))
                self._used += size
                if self._used == MAX_PAYLOAD:
                    yield from self.flush()
            address += size
            rest = rest[size:]

    def flush(self) -> Iterator[Pages]:
        """The frame of what was gathered since the last, if anything was."""
        if self._runs:
            runs, used = tuple(self._runs), self._used
            self._runs, self._used = [], 0
            yield Pages(self._address_space, self._round, runs, self._buffer[:used])
