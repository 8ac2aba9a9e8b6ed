"""CRIU's images as they arrive: pieces of files, in one directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from podferry.errors import Failed, PeerMisbehaved
from podferry.wire.messages import FileSum
from podferry.workload.received_image import ReceivedImage


class ReceivedImages:
    """The images of one container. `directory` says where they are written."""

    def __init__(self, directory: Callable[[], Path]) -> None:
        self._directory = directory
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
