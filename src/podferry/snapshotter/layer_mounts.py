"""Mounting layers on this node: by descriptor, since names on the share may come to stand for something else."""

from __future__ import annotations

import errno
from pathlib import Path

from podferry.fs.beneath import reached
from podferry.fs.mountinfo import holding, mounts, mounts_in
from podferry.fs.mounts import MS_NODEV, MS_RDONLY, bind, mount
from podferry.snapshotter.loops import loop_device


def mount_image(image: int, at: Path) -> None:
    """Mount the open EROFS image read-only, from the file itself or, before Linux 6.12, through a loop device. Device nodes in it
    cannot be opened there. Raises OSError.
    """
    try:
        mount(reached(image), at, "erofs", MS_RDONLY | MS_NODEV)
    except OSError as error:
        if error.errno not in (errno.ENOTBLK, errno.EINVAL):
            raise
        with loop_device(image) as device:
            mount(device, at, "erofs", MS_RDONLY | MS_NODEV)


def mount_directory(directory: int, at: Path) -> None:
    """Show the open directory at `at` as well, read-only: whatever takes its name later, this stays."""
    bind(reached(directory), at, MS_RDONLY | MS_NODEV)


def mount_points(under: Path) -> dict[Path, str]:
    """What is mounted below a directory, and of what kind, from the kernel's own list: nothing that might hang is touched."""
    return {Path(one.point): one.kind for one in mounts() if Path(one.point).is_relative_to(under)}


def mounted_read_only(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether the mount that holds `path` was made read-only. One whose file system takes no writes for now was not."""
    found = holding(str(path), mounts_in(mountinfo))
    return found is not None and "ro" in found.options
