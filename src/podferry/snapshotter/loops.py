"""A loop device of an open file, for kernels that mount no image from a file.

mount(8) and losetup(8) take a name, which may stand for something else by the time they open it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from podferry.errors import Failed

LOOP_CTL_GET_FREE, LOOP_CONFIGURE = 0x4C82, 0x4C0A  # linux/loop.h
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR = 1, 4
_CONFIG = struct.Struct("=II 5Q 4I 64s 64s 32s 2Q 8Q")
"""`struct loop_config`: the file, the block size, `struct loop_info64`, and what is reserved."""
TRIES = 20  # others take loop devices, too


@contextmanager
def loop_device(file: int) -> Iterator[str]:
    """The path of a read-only loop device of the open file, which goes with its last user: mount it within. Raises `Failed`."""
    try:
        device = _attached(file)
    except OSError as error:
        raise Failed.because(
            "cannot set up a loop device", error, remedy="where there is no /dev/loop-control: modprobe loop"
        ) from error
    try:
        yield f"/dev/loop{device[0]}"
    finally:
        os.close(device[1])


def _attached(file: int) -> tuple[int, int]:
    flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR
    config = _CONFIG.pack(file, 0, *(0,) * 8, flags, b"", b"", b"", *(0,) * 10)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for attempt in range(TRIES):
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            device = os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY or attempt == TRIES - 1:
                    raise
            else:
                return number, device
        raise AssertionError("the last try returns or raises")
    finally:
        os.close(control)
