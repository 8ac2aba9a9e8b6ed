"""One of CRIU's images as it arrives: written as it comes and summed up on the way, whatever its size."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import xxhash

from podferry.core.limits import of_image
from podferry.errors import Failed, PeerMisbehaved


class ReceivedImage:
    """The image at `path`, which is made. Pieces come in order."""

    def __init__(self, path: Path) -> None:
        self._name, self._most = path.name, of_image(path.name).most
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._digest, self._size = xxhash.xxh3_128(), 0

    def take(self, offset: int, data: memoryview) -> None:
        """Write a piece. Raises `PeerMisbehaved` for one that is out of order or beyond the limit, `Failed` where none fits."""
        if offset != self._size:
            raise PeerMisbehaved(f"the image {self._name} came out of order", why=f"offset {offset} after {self._size}")
        if offset + len(data) > self._most:
            raise PeerMisbehaved(f"the image {self._name} is too large", why=f"at most {self._most} bytes are allowed")
        written = os.pwrite(self._fd, data, offset)
        if written != len(data):
            raise Failed.because(
                f"the image {self._name} cannot be written",
                OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes fitted"),
            )
        self._digest.update(data)
        self._size += written

    def whole(self) -> tuple[int, str]:
        """Its size and digest, once all of it is here; it is closed."""
        self.close()
        return self._size, self._digest.hexdigest()

    def close(self) -> None:
        """Close the file; what it holds stays."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
