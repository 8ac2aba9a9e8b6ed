"""Mounting layer images on this node."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

from podferry.node.process import run

MS_RDONLY, MS_NODEV = 1, 4  # linux/mount.h
MNT_DETACH = 2
NO_LOOP = "where there is no /dev/loop-control: modprobe loop"

_libc = ctypes.CDLL(None, use_errno=True)


def mount_image(image: Path, at: Path) -> None:
    """Mount an EROFS image read-only, from the file itself or, before Linux 6.12, through a loop device. Device nodes in it
    cannot be opened there.

    Raises OSError, or `CommandFailed` from mount(8).
    """
    try:
        _mount(str(image), str(at), "erofs", MS_RDONLY | MS_NODEV)
    except OSError as error:
        if error.errno not in (errno.ENOTBLK, errno.EINVAL):
            raise
        run(["mount", "-t", "erofs", "-o", "ro,nodev,loop", image, at], timeout=60.0, remedy=NO_LOOP)


def unmount(at: Path) -> None:
    """Detach what is mounted at `at`; what still uses it keeps it until it ends. Nothing mounted is no error."""
    if _libc.umount2(os.fsencode(at), MNT_DETACH) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOENT):
            raise OSError(number, os.strerror(number), str(at))


def mount_points(under: Path) -> set[Path]:
    """What is mounted below a directory, from the kernel's own list: nothing that might hang is touched."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = (Path(line.split()[4].encode().decode("unicode_escape")) for line in lines)
    return {point for point in points if point.is_relative_to(under)}


def _mount(source: str, target: str, kind: str, flags: int) -> None:
    call: Callable[..., int] = _libc.mount
    if call(os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)
