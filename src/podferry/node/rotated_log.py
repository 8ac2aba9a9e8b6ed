"""A container's log, read on while it is rotated: the kubelet renames it, and later compresses what it has renamed.

The kubelet names a rotated log after its time (`0.log.20060102-150405`), and puts `.gz` behind all but the latest
(pkg/kubelet/logs/container_log_manager.go). logrotate's `copytruncate` empties the file instead: what it held that was not read yet
is in the copy.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PIECE = 1 << 20
PARTIAL = ".tmp"
"""How the name of one ends that is being compressed."""


class RotatedLog:
    """Reads the log at `path` from its beginning; each `new` gives what was written since the last, whatever became of the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._at = 0
        self._old: frozenset[str] = frozenset()

    def new(self) -> Iterator[bytes]:
        """What was written since the last call, in pieces of up to a megabyte. Nothing where there is no log yet."""
        while True:
            if self._fd < 0 and not self._open():
                return
            yield from self._rest()
            if self._is_current():
                return
            # Renamed. Whoever writes had it open until then: read to the end once more, now that nobody does.
            yield from self._rest()
            yield from self._between()
            self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _open(self) -> bool:
        rotated = self._rotated()
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        self._at, self._old = 0, rotated
        return True

    def _rest(self) -> Iterator[bytes]:
        if os.fstat(self._fd).st_size < self._at:  # emptied in its place
            self._at = 0
        while data := os.pread(self._fd, PIECE, self._at):
            self._at += len(data)
            yield data

    def _is_current(self) -> bool:
        """Whether what is open is still what is at the path. Where nothing is there yet, the next call sees the new one."""
        try:
            now = self._path.lstat()
        except OSError:
            return True
        ours = os.fstat(self._fd)
        return (now.st_dev, now.st_ino) == (ours.st_dev, ours.st_ino)

    def _rotated(self) -> frozenset[str]:
        with suppress(OSError):
            names = {one.removesuffix(".gz") for one in os.listdir(self._path.parent) if not one.endswith(PARTIAL)}  # noqa: PTH208
            return frozenset(one for one in names if one.startswith(f"{self._path.name}."))
        return frozenset()

    def _between(self) -> Iterator[bytes]:
        """Logs that were begun and renamed again since: all new ones but the first, which is the one that is open."""
        for name in sorted(self._rotated() - self._old)[1:]:
            plain = self._path.with_name(name)
            for opener, path in ((open, plain), (gzip.open, plain.with_name(f"{name}.gz"))):
                with suppress(FileNotFoundError), opener(path, "rb") as file:
                    while data := file.read(PIECE):
                        yield data
                    break
