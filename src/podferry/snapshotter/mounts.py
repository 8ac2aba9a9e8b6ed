"""Mounting layers on this node: by descriptor, since names on the share may come to stand for something else."""

from __future__ import annotations

import errno
from pathlib import Path

from podferry.fs.beneath import reached
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
