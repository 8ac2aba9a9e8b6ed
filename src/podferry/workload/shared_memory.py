"""Copies the shared memory of a container on the source to the target while the job runs.

No tracker sees who writes to it, and the pages of an object may be mapped anywhere, so every pass reads all of it and sends what
has other contents than before (`podferry.wire.held_pages`). CRIU saves it as ever while the job stands still; of its image, the
target has then most pages.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextlib import suppress

from podferry.memory.kernel.shared import SharedObject, chunks, shared_objects
from podferry.wire.batch import PageBatch
from podferry.wire.frames import HELD_PAGES, Drop, Pages, Run
from podferry.wire.held_pages import CHUNK, HeldPages
from podferry.workload.numbers import address_space_of
from podferry.workload.threads import run

SPACING = 1 << 40
"""Bytes of addresses for each object; what is beyond them is not sent beforehand. Addresses end at 2**56."""
MOST_OBJECTS = (1 << 16) - 2
UNCHANGED_AT_ONCE = 32
"""Chunks that a thread looks at before it returns: other calls of the pool wait that long."""


class SharedMemory:
    """The shared memory of container `number`, whose processes `pids` tells."""

    def __init__(self, number: int, pids: Callable[[], Collection[int]]) -> None:
        self._space, self._pids = address_space_of(number, HELD_PAGES), pids
        self._bases: dict[tuple[str, int], int] = {}
        self._given = 0
        self.held = HeldPages()
        """What the target holds of it."""

    async def changed(self, round: int) -> AsyncGenerator[Pages | Drop, None]:
        """One pass: what was written since the last. Send each frame before the next is taken."""
        objects = {one.key: one for one in await run(shared_objects, self._pids())}
        for key in self._bases.keys() - objects.keys():
            base = self._bases.pop(key)
            if self.held.drop(base, base + SPACING):
                yield Drop(self._space, ((base, base + SPACING),))
        if not objects:
            return
        batch, buffer = PageBatch(self._space, round), memoryview(bytearray(CHUNK))
        for one in objects.values():
            if not (base := self._base(one)):
                break
            with suppress(OSError):  # unmapped meanwhile, or not to be read: CRIU saves it
                descriptor = one.open()
                try:
                    pieces = self._pieces(descriptor, base, buffer)
                    while (found := await run(next, pieces, None)) is not None:
                        address, runs = found
                        for start, end in runs:
                            for frame in batch.add(address + start, buffer[start:end]):
                                yield frame
                finally:
                    os.close(descriptor)
        for frame in batch.flush():
            yield frame

    def _pieces(self, descriptor: int, base: int, buffer: memoryview) -> Iterator[tuple[int, list[Run]]]:
        """(address, runs) of each chunk that changed, which is in `buffer` then; now and then of one that did not."""
        for number, (offset, size) in enumerate(chunks(descriptor, buffer)):
            if offset + size > SPACING:
                return
            runs = self.held.changed(base + offset, buffer[:size])
            if runs or number % UNCHANGED_AT_ONCE == 0:
                yield base + offset, runs

    def _base(self, one: SharedObject) -> int:
        """Where the target keeps it; 0 where there are too many."""
        if one.key not in self._bases:
            if self._given == MOST_OBJECTS:
                return 0
            self._given += 1
            self._bases[one.key] = self._given * SPACING
        return self._bases[one.key]
