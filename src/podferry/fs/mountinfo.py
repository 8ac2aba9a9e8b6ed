"""What is mounted, as the kernel lists it (proc_pid_mountinfo(5)).

A name may hold any byte but a slash and NUL. The kernel writes blanks, tabs, newlines, backslashes and `#` as a backslash and three
octal digits, and everything else as it is: so lines and words are told apart as bytes, before anything is decoded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ESCAPED = re.compile(rb"\\([0-7]{3})")


class MountEntry(NamedTuple):
    """One mount. `root` is the directory of its file system that is seen at `point`; both are paths as that process sees them.
    `options` are the mount's own, `settings` those of the file system, in the kernel's order."""

    id: int
    device: int
    root: str
    point: str
    options: tuple[str, ...]
    kind: str
    source: str
    settings: tuple[str, ...]


def mounts(pid: int | str = "self") -> list[MountEntry]:
    """What process `pid` sees mounted, the oldest first. Raises `OSError`."""
    return mounts_in(Path(f"/proc/{pid}/mountinfo"))


def mounts_in(mountinfo: Path) -> list[MountEntry]:
    """The same, from that file."""
    return list(parsed(mountinfo.read_bytes()))


def parsed(listing: bytes) -> Iterator[MountEntry]:
    """The mounts of a listing."""
    for line in listing.split(b"\n"):
        if not line:
            continue
        left, _, right = line.partition(b" - ")
        words, (kind, source, settings) = left.split(b" "), right.split(b" ", 2)
        major, minor = map(int, words[2].split(b":"))
        yield MountEntry(
            int(words[0]),
            os.makedev(major, minor),
            _unescaped(words[3]),
            _unescaped(words[4]),
            tuple(os.fsdecode(words[5]).split(",")),
            os.fsdecode(kind),
            _unescaped(source),
            tuple(os.fsdecode(settings).split(",")),
        )


def holding(path: str, found: list[MountEntry]) -> MountEntry | None:
    """The mount that `path`, in which there are no links, is on: of those mounted upon one another, the last."""
    best = None
    for one in found:
        if (path.rstrip("/") + "/").startswith(one.point.rstrip("/") + "/") and (
            best is None or len(one.point) >= len(best.point)
        ):
            best = one
    return best


def _unescaped(word: bytes) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), word))
