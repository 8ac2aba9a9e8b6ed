"""What a mounted overlay must be told after its upper directory was filled behind its back."""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path

from podferry.errors import Failed
from podferry.fs.mounts import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REMOUNT, mount
from podferry.node.outside import among_node_mounts

OVERLAYFS = 0x794C7630  # linux/magic.h
_KEPT = {os.ST_RDONLY: MS_RDONLY, os.ST_NOSUID: MS_NOSUID, os.ST_NODEV: MS_NODEV, os.ST_NOEXEC: MS_NOEXEC}

_libc = ctypes.CDLL(None, use_errno=True)


def refresh_root(merged: Path) -> None:
    """Let the overlay mounted at `merged` read anew what it has looked at: its root's mode and owner, and names.

    Raises `Failed`.

    The root's inode is the one that an overlay holds from the mount on; permissions are checked by its cached copy of
    the upper directory's mode and owner (measured, kernel 6.18), which setting them through the overlay renews. The
    mode is set to what it is, so nothing else changes but the root's ctime.

    Below the root it keeps what somebody has looked up since the mount, as CRI-O does: a directory that it found in the upper layer
    then, and that was replaced, takes no new files (measured: ENOENT). To remount it drops all that nobody has open
    (`shrink_dcache_sb` in fs/super.c), and ignores every option.
    """
    try:
        among_node_mounts(lambda: _forget_names(merged))
        root = os.open(merged, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fchmod(root, stat.S_IMODE(os.fstat(root).st_mode))
        finally:
            os.close(root)
    except OSError as error:
        raise Failed.because(f"the root of the overlay at {merged} cannot be refreshed", error) from error


def _forget_names(merged: Path) -> None:
    if _kind(merged) != OVERLAYFS or os.geteuid() != 0:  # of a bind mount it would be the node's own file system
        return
    flags = os.statvfs(merged).f_flag
    mount("", merged, "", MS_REMOUNT | sum(bit for said, bit in _KEPT.items() if flags & said))


def _kind(path: Path) -> int:
    """The magic number of a path's file system: the first word of struct statfs."""
    buffer = (ctypes.c_long * 32)()
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return buffer[0]
