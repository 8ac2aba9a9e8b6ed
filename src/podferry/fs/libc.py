"""The C library, for system calls that Python has no function for.

It is loaded once: what a function takes and returns is said here, or where the one user of a function is.
"""

from __future__ import annotations

import ctypes
import os

_PIDFD_GETFD = 438  # on every architecture

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def checked(result: int, of: str = "") -> int:
    """What a function of libc has returned. Raises `OSError`, of the path or word `of`, where that says that it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *([of] if of else ()))
    return int(result)


def system_call(number: int, *arguments: object, of: str = "") -> int:
    """Call the kernel. Raises `OSError`, as `checked` does."""
    return checked(libc.syscall(ctypes.c_long(number), *arguments), of)


def second_descriptor(pidfd: int, descriptor: int) -> int:
    """A descriptor of our own for what another process has open under that number; whoever calls closes it. Raises `OSError`."""
    return system_call(_PIDFD_GETFD, pidfd, descriptor, 0, of="pidfd_getfd")
