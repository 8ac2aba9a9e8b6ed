"""Names that others have chosen, resolved beneath a directory and nowhere else, and entries acted on by descriptor.

`openat2(2)` (Linux 5.6) makes a name harmless: the kernel itself refuses to pass a symbolic link, a mount or `..` on the way. What
it opens is then looked at and changed through the descriptor: a name that was looked at may stand for something else by the
time it is acted on. `unlink`, `rename` and `mkdir` act on a name of a directory and follow nothing, so they take the directory's
descriptor and the name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

from podferry.fs.libc import libc

OPENAT2 = 437  # the same number on every architecture that has it: include/uapi/asm-generic/unistd.h

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE = RESOLVE_NO_XDEV | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY

_BATCH = 1000  # names of a directory that are held at once: it may have been filled to exhaust memory
_DEEP = 32  # directories inside each other that are held open at once: they may have been nested to exhaust descriptors


class _OpenHow(ctypes.Structure):
    """`struct open_how` of linux/openat2.h."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(root: int, path: bytes, flags: int, mode: int = 0) -> int:
    """Open `path` beneath the directory `root` and return the descriptor; b"" is `root` itself.

    No component may be a symbolic link or a mount point: such a path raises `OSError` (ELOOP, EXDEV), as does one
    that leaves the tree (EXDEV). `flags` are those of `os.open`; O_CLOEXEC and O_NOFOLLOW are added. `mode` is for O_CREAT.
    """
    how = _OpenHow(flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode, RESOLVE)
    while True:
        # The arguments are passed as C longs: syscall(2) is variadic.
        fd: int = libc.syscall(
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


def reached(fd: int) -> str:
    """A path by which calls that take one act on what `fd` has open, a symbolic link itself included.

    The calls that take a descriptor refuse one opened with O_PATH, and a link, FIFO or device is opened in no other way.
    """
    return f"/proc/self/fd/{fd}"


class NotRegular(OSError):
    """The entry of this name is no regular file, but a directory, FIFO, socket or device."""


class Beneath:
    """A directory that is open, and what is beneath it by relative path."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        """As `open_beneath`; "" is the directory itself."""
        return open_beneath(self.fd, os.fsencode(path), flags, mode)

    def open_regular(self, path: str, flags: int = os.O_RDONLY) -> int:
        """Open a regular file that is there. Raises `NotRegular` for anything else, which is not opened: that may have effects."""
        handle = self.open(path, os.O_PATH)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise NotRegular(errno.EINVAL, "not a regular file", path)
            return os.open(reached(handle), flags | os.O_CLOEXEC)
        finally:
            os.close(handle)

    @contextmanager
    def opened(self, path: str, flags: int) -> Iterator[int]:
        """Open something for a while."""
        fd = self.open(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def place(self, path: str) -> Iterator[tuple[int, str]]:
        """The directory that holds `path`, open for a while, and the name there, for calls that follow nothing."""
        directory, _, name = path.rpartition("/")
        if name in ("", ".", ".."):
            raise ValueError(f"no name: {path!r}")
        with self.opened(directory, DIRECTORY) as fd:
            yield fd, name

    def stat(self, path: str) -> os.stat_result:
        """What has this name; of a link, the link itself."""
        with self.opened(path, os.O_PATH) as fd:
            return os.fstat(fd)


def remove(place: int, name: bytes) -> None:
    """Remove the entry `name` of the directory `place` with all that is below it. Follows no link and enters no mount.

    Raises `OSError`. However deep and wide the tree is, it takes a bounded number of descriptors and little memory.
    """
    try:
        os.unlink(name, dir_fd=place)
    except IsADirectoryError:
        directory = open_beneath(place, name, DIRECTORY)
        try:
            empty(directory)
        finally:
            os.close(directory)
        os.rmdir(name, dir_fd=place)


def empty(directory: int) -> None:
    """Remove all that is in a directory, as `remove` does."""
    _empty(directory, directory, 1)


def _empty(directory: int, top: int, depth: int) -> None:
    """Remove what is in `directory`; what lies too deep is hung up in `top`, whose turn comes again."""
    while names := _some_names(directory):
        for name in names:
            try:
                os.unlink(name, dir_fd=directory)
                continue
            except IsADirectoryError:
                pass
            if depth == _DEEP:
                os.rename(name, b".%s" % secrets.token_hex(16).encode(), src_dir_fd=directory, dst_dir_fd=top)
                continue
            below = open_beneath(directory, name, DIRECTORY)
            try:
                _empty(below, top, depth + 1)
            finally:
                os.close(below)
            os.rmdir(name, dir_fd=directory)


def _some_names(directory: int) -> list[bytes]:
    with os.scandir(directory) as listing:
        return [os.fsencode(item.name) for item in islice(listing, _BATCH)]
