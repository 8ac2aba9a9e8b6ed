"""CRIU's images as they arrive: pieces of files, in one directory, and before them pages of shared memory of which they consist."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from podferry.errors import Failed, PeerMisbehaved
from podferry.memory.store.page_store import PageStore
from podferry.wire.frames import HELD_PAGES, INLINE, PAGE, ZEROS, File
from podferry.wire.messages import FileSum
from podferry.workload.received_image import ReceivedImage

WORTH_FREEING = 1 << 16
"""Bytes that are freed as soon as an image has them. Smaller runs wait for `complete`: the job stands still, and these may be
thousands of calls."""


class ReceivedImages:
    """The images of one container. `directory` says where they are written; until then, pages wait in a page store in `waiting`,
    whose growth `grows` is told, in bytes."""

    def __init__(self, directory: Callable[[], Path], waiting: Path, grows: Callable[[int], object]) -> None:
        self._directory, self._waiting, self._grows = directory, waiting, grows
        self._held: PageStore | None = None
        self._open: dict[str, ReceivedImage] = {}
        self._whole: dict[str, tuple[int, str]] = {}

    def take(self, name: str, offset: int, data: memoryview, *, last: bool) -> None:
        """Write a piece. The name was checked when its frame was."""
        if name in self._whole:
            raise PeerMisbehaved(f"the image {name} goes on after its end")
        if name not in self._open:
            self._open[name] = ReceivedImage(self._directory() / name)
        self._open[name].take(offset, data)
        if last:  # there may be one for each mapping, and descriptors are few
            self._whole[name] = self._open.pop(name).whole()

    def hold(self, address: int, data: memoryview, round: int) -> None:
        """Keep pages that an image will have."""
        self._store().write(HELD_PAGES, address, data, round)

    def drop(self, start: int, end: int) -> None:
        """No image will have these pages."""
        self._store().drop(HELD_PAGES, start, end)

    def take_pages(self, piece: File) -> None:
        """Write a piece of which some pages wait here, and keep those no longer. Raises `PeerMisbehaved` where they do not."""
        whole, inline, at = memoryview(bytearray(piece.size)), memoryview(piece.payload), 0
        for address, pages in piece.runs:
            end = at + pages * PAGE
            if address == INLINE:
                whole[at:end], inline = inline[: end - at], inline[end - at :]
            elif address != ZEROS:
                self._fetch(address, whole[at:end])
            at = end
        self.take(piece.name, piece.offset, whole, last=piece.last)

    def _fetch(self, address: int, into: memoryview) -> None:
        store, end = self._store(), address + len(into)
        if not store.holds(HELD_PAGES, address, end):
            raise PeerMisbehaved(f"{len(into)} bytes of shared memory at {address:#x} were not sent")
        os.preadv(store.fileno(HELD_PAGES), [into], address)
        if len(into) >= WORTH_FREEING:
            store.drop(HELD_PAGES, address, end)

    def _store(self) -> PageStore:
        self._held = self._held or PageStore.create(self._waiting, self._grows)
        return self._held

    def complete(self) -> None:
        """No image needs what still waits here."""
        if self._held is not None:
            self._grows(-self._held.totals().bytes)
            self._held.discard()
            self._held = None

    def verify(self, announced: Sequence[FileSum]) -> None:
        """Raise `PeerMisbehaved` where others came than were announced, `Failed` where one is not whole."""
        sums = {one.name: one for one in announced}
        if set(sums) != {*self._open, *self._whole}:
            raise PeerMisbehaved(
                "the images that arrived are not those that the source announced", why=f"{set(sums) ^ set(self._whole)}"
            )
        for name, expected in sums.items():
            if self._whole.get(name) != (expected.size, expected.digest):
                raise Failed(f"the image {name} did not arrive whole")

    def close(self) -> None:
        """Let go of descriptors."""
        for one in self._open.values():
            one.close()
        self._open.clear()
        if self._held is not None:
            self._held.close()
            self._held = None
