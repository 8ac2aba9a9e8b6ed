"""What a mounted overlay must be told after its upper directory was filled behind its back."""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path

from podferry.errors import Failed
from podferry.fs.libc import checked, libc, system_call

OVERLAYFS = 0x794C7630  # linux/magic.h
FSCONFIG, FSPICK = 431, 433  # the same on all architectures
AT_FDCWD, FSPICK_CLOEXEC, FSCONFIG_CMD_RECONFIGURE = -100, 1, 7  # linux/fcntl.h, linux/mount.h


def refresh_root(merged: Path) -> None:
    """Let the overlay mounted at `merged` read anew what it has looked at: its root's mode and owner, and names.

    Raises `Failed`.

    The root's inode is the one that an overlay holds from the mount on; permissions are checked by its cached copy of
    the upper directory's mode and owner (measured, kernel 6.18), which setting them through the overlay renews. The
    mode is set to what it is, so nothing else changes but the root's ctime.

    Below the root it keeps what somebody has looked up since the mount, as CRI-O does: a directory that it found in the upper layer
    then, and that was replaced, takes no new files (measured: ENOENT). To reconfigure it drops all that nobody has open
    (`shrink_dcache_sb` in fs/super.c); nothing is changed by that.
    """
    try:
        _forget_names(merged)
        root = os.open(merged, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fchmod(root, stat.S_IMODE(os.fstat(root).st_mode))
        finally:
            os.close(root)
    except OSError as error:
        raise Failed.because(f"the root of the overlay at {merged} cannot be refreshed", error) from error


def _forget_names(merged: Path) -> None:
    if _kind(merged) != OVERLAYFS:  # behind a bind mount is the node's own file system
        return
    context = system_call(FSPICK, AT_FDCWD, os.fsencode(merged), FSPICK_CLOEXEC, of=str(merged))
    try:
        system_call(FSCONFIG, context, FSCONFIG_CMD_RECONFIGURE, None, None, 0, of=str(merged))
    finally:
        os.close(context)


def _kind(path: Path) -> int:
    """The magic number of a path's file system: the first word of struct statfs."""
    buffer = (ctypes.c_long * 32)()
    checked(libc.statfs(os.fsencode(path), buffer), str(path))
    return buffer[0]
