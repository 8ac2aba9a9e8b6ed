"""Writing a file's content: all of it, and holes, for which `os` has no call."""

from __future__ import annotations

import ctypes
import errno
import os

from podferry.fs.libc import libc

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
ZEROS = bytes(128 * 1024)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Make `length` bytes from `offset` read as zeros and give their blocks back where the file system can do that.

    The file's size stays. Raises `OSError`.
    """
    while libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) != 0:
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
        _write_zeros(fd, offset, min(offset + length, os.fstat(fd).st_size))
        return


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`. Raises `OSError`."""
    while data:
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written


def _write_zeros(fd: int, offset: int, end: int) -> None:
    while offset < end:
        length = min(len(ZEROS), end - offset)
        write_all(fd, memoryview(ZEROS)[:length], offset)
        offset += length
