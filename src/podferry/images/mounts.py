"""Mounting layers on this node: by descriptor, since names on the share may come to stand for something else."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

from podferry.fs.beneath import reached
from podferry.images.loops import loop_device

MS_RDONLY, MS_NODEV, MS_REMOUNT, MS_BIND = 0x1, 0x4, 0x20, 0x1000  # linux/mount.h
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

_libc = ctypes.CDLL(None, use_errno=True)


def mount_image(image: int, at: Path) -> None:
    """Mount the open EROFS image read-only, from the file itself or, before Linux 6.12, through a loop device. Device nodes in it
    cannot be opened there. Raises OSError.
    """
    try:
        _mount(reached(image), str(at), "erofs", MS_RDONLY | MS_NODEV)
    except OSError as error:
        if error.errno not in (errno.ENOTBLK, errno.EINVAL):
            raise
        with loop_device(image) as device:
            _mount(device, str(at), "erofs", MS_RDONLY | MS_NODEV)


def mount_directory(directory: int, at: Path) -> None:
    """Show the open directory at `at` as well, read-only: whatever takes its name later, this stays."""
    _mount(reached(directory), str(at), "", MS_BIND)
    try:
        _mount("", str(at), "", MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NODEV)
    except OSError:
        unmount(at)
        raise


def unmount(at: Path) -> None:
    """Detach what is mounted at `at`; what still uses it keeps it until it ends. Nothing mounted is no error."""
    if _libc.umount2(os.fsencode(at), MNT_DETACH | UMOUNT_NOFOLLOW) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOENT):
            raise OSError(number, os.strerror(number), str(at))


def mount_points(under: Path) -> dict[Path, str]:
    """What is mounted below a directory, and of what kind, from the kernel's own list: nothing that might hang is touched."""
    points = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = Path(left.split()[4].encode().decode("unicode_escape"))
        if point.is_relative_to(under):
            points[point] = right.split()[0]
    return points


def mounted_read_only(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether the mount that holds `path` was made read-only. One whose file system takes no writes for now was not."""
    best, options = Path("/"), ""
    for line in mountinfo.read_text().splitlines():
        words = line.split()
        point = Path(words[4].encode().decode("unicode_escape"))
        if path.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, options = point, words[5]
    return "ro" in options.split(",")


def _mount(source: str, target: str, kind: str, flags: int) -> None:
    call: Callable[..., int] = _libc.mount
    if call(os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)
