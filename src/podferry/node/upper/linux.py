"""The system calls that `os` lacks: path resolution that cannot leave a tree, and holes.

`openat2` is what makes a name from a peer, or from a container that is still running, harmless: the kernel itself
refuses to pass a symbolic link, a mount or `..` on the way (`openat2(2)`, Linux 5.6).
"""

from __future__ import annotations

import ctypes
import errno
import os

OPENAT2 = 437  # the same number on every architecture that has it: include/uapi/asm-generic/unistd.h

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE = RESOLVE_NO_XDEV | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
ZEROS = bytes(128 * 1024)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class _OpenHow(ctypes.Structure):
    """`struct open_how` of linux/openat2.h."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(root: int, path: bytes, flags: int) -> int:
    """Open `path` beneath the directory `root` and return the descriptor; b"" is `root` itself.

    No component may be a symbolic link or a mount point: such a path raises `OSError` (ELOOP, EXDEV), as does one
    that leaves the tree (EXDEV). `flags` are those of `os.open`; O_CLOEXEC and O_NOFOLLOW are added.
    """
    how = _OpenHow(flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0, RESOLVE)
    while True:
        # The arguments are passed as C longs: syscall(2) is variadic.
        fd: int = _libc.syscall(
            ctypes.c_long(OPENAT2),
            ctypes.c_long(root),
            ctypes.c_char_p(path or b"."),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return fd
        code = ctypes.get_errno()
        # EAGAIN: a rename somewhere raced with the check that the path stays beneath the root.
        if code not in (errno.EAGAIN, errno.EINTR):
            raise OSError(code, os.strerror(code), os.fsdecode(path))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Make `length` bytes from `offset` read as zeros and give their blocks back where the file system can do that.

    The file's size stays. Raises `OSError`.
    """
    while _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) != 0:
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
