"""Files that a job watches with inotify or fanotify, and where they are: CRIU has to find each one's name.

The kernel tells a watched file by device and inode. CRIU opens it by its file handle, which overlayfs, and so a container's own
root, does not allow as a rule; then it looks below the directories that it is told of (`irmap-scan-path`) and below a few of its
own choice, such as /etc. So they are looked for here while the job still runs, and CRIU is told of each.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from podferry.fs.mountinfo import mounts

Watched = tuple[int, int]
"""Device, as the kernel numbers it, and inode."""
PATIENCE = 5.0
"""Seconds for which a root is searched; that is a few million files."""
_LINE = re.compile(r"^(?:inotify|fanotify) .*?ino:([0-9a-f]+) sdev:([0-9a-f]+)", re.MULTILINE)
_PLAIN = re.compile(r"/[A-Za-z0-9._+@:,=/-]*")
"""What may stand in CRIU's settings, which the job must not write."""


def watched(pids: Iterable[int]) -> set[Watched]:
    """What these processes watch. What ends or is closed meanwhile is left out."""
    found: set[Watched] = set()
    for pid in pids:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if str(descriptor.readlink()) in ("anon_inode:inotify", "anon_inode:[fanotify]"):
                        text = Path(f"/proc/{pid}/fdinfo/{descriptor.name}").read_text()
                        found |= {(int(sdev, 16), int(inode, 16)) for inode, sdev in _LINE.findall(text)}
    return found


def of_the_root(init: int, wanted: Collection[Watched]) -> set[Watched]:
    """Those on the file system of the root of process `init`, where that is an overlay. Raises `OSError`."""
    for mount in mounts(init):
        if mount.point == "/" and mount.kind == "overlay":
            return {one for one in wanted if one[0] == os.major(mount.device) << 20 | os.minor(mount.device)}
    return set()


def paths(init: int, wanted: Collection[Watched], patience: float = PATIENCE) -> dict[Watched, str]:
    """Where the container of process `init` has each of these files, as far as they are found in time. Raises `OSError`."""
    if not wanted:
        return {}
    root = f"/proc/{init}/root"
    found: dict[Watched, str] = {}
    deadline = time.monotonic() + patience
    for path, one in _entries(root):
        if one in wanted:
            found.setdefault(one, path)
        if len(found) == len(wanted) or time.monotonic() > deadline:
            break
    return found


def settings(found: Mapping[Watched, str]) -> str:
    """CRIU's settings that tell it of these paths: the files first, since it searches a directory that is not the one it wants."""
    told = sorted(
        {path for path in found.values() if _PLAIN.fullmatch(path) and path != "/"}, key=lambda path: (-len(path), path)
    )
    return "".join(f"irmap-scan-path {path}\n" for path in told)


def unfindable(init: int, wanted: Collection[Watched]) -> set[Watched]:
    """What CRIU will not find. Raises `OSError`."""
    on_root = of_the_root(init, wanted)
    found = paths(init, on_root)
    return {one for one in on_root if not _PLAIN.fullmatch(found.get(one, ""))}


def _entries(root: str) -> Iterator[tuple[str, Watched]]:
    """Every path on the root's own file system, the shallow ones first, and what CRIU will see there. A directory does not show the
    inodes of what is in it, where an overlay's layers lie on several file systems."""
    top = _of(os.stat(f"{root}/"))  # noqa: PTH116 - `Path` drops the last slash, and this is not the link itself
    yield "/", top
    waiting = [""]
    for directory in waiting:
        with suppress(OSError), os.scandir(f"{root}{directory}/") as entries:
            for entry in entries:
                with suppress(OSError, UnicodeError):
                    entry.name.encode()
                    one = _of(entry.stat(follow_symlinks=False))
                    yield f"{directory}/{entry.name}", one
                    if entry.is_dir(follow_symlinks=False) and one[0] == top[0]:
                        waiting.append(f"{directory}/{entry.name}")


def _of(found: os.stat_result) -> Watched:
    return os.major(found.st_dev) << 20 | os.minor(found.st_dev), found.st_ino
