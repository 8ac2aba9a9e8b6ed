"""mount(2) and umount2(2), for mounts of podferry's own."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from podferry.fs.libc import checked, libc

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 0x1, 0x2, 0x4, 0x8, 0x20, 0x1000  # linux/mount.h
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8


def mount(source: Path | str, at: Path, kind: str, flags: int) -> None:
    """Mount at `at`. Raises `OSError`."""
    checked(libc.mount(os.fsencode(source), os.fsencode(at), kind.encode(), ctypes.c_ulong(flags), None), str(at))


def bind(source: Path | str, at: Path, flags: int) -> None:
    """Show the directory `source` at `at` as well, with these `flags`. Raises `OSError`; nothing is mounted then."""
    mount(source, at, "", MS_BIND)
    try:
        mount("", at, "", MS_BIND | MS_REMOUNT | flags)  # a bind mount takes flags only when it is there
    except OSError:
        unmount(at)
        raise


def unmount(at: Path) -> None:
    """Detach what is mounted at `at`; what still uses it keeps it until it ends. Nothing mounted, or not there, is no error."""
    try:
        checked(libc.umount2(os.fsencode(at), MNT_DETACH | UMOUNT_NOFOLLOW), str(at))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
