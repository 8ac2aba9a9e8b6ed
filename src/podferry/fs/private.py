"""Directories of podferry's own, below its run and state directories: nobody but their owner gets in.

What is kept there is other people's memory and files, setuid programs included, so a local user must not reach it whatever
mode is inside. Directories that an older version, an installer or a kubelet made are checked, not believed.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from podferry.errors import Failed, Refused

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OTHERS = 0o077
_OTHERS_WRITE = 0o022


def private_directory(path: Path, *, below: Path, new: bool = False) -> Path:
    """Make `path`, and what is missing on the way to it, so that only we get in; returns it.

    `below` is a directory on the way, which somebody else may have made: others stop writing to it, or it is refused. What is
    between it and `path` is ours: it may be no link, and is closed to others where an older version left it open. With `new` the
    last one must not be there yet. Raises `Refused`, and `Failed` for what this node cannot do.
    """
    try:
        return _make(path, below, new=new)
    except OSError as error:
        raise Failed.because(f"cannot make the directory {path}", error) from error


def _make(path: Path, below: Path, *, new: bool) -> Path:
    names = path.relative_to(below).parts
    if ".." in path.parts:
        raise Refused(f"{path} is not below {below}")
    _make_root(below)
    at = os.open(below, _FLAGS)
    try:
        found = os.fstat(at)
        if found.st_uid not in (0, os.geteuid()):
            raise _refused(below, f"it belongs to user {found.st_uid}")
        if found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
            if found.st_uid != os.geteuid():
                raise _refused(below, f"others may write to it: its mode is {stat.S_IMODE(found.st_mode):04o}")
            os.fchmod(at, stat.S_IMODE(found.st_mode) & ~_OTHERS_WRITE)  # what they have put there is looked at below
        place = below
        for number, name in enumerate(names, 1):
            place /= name
            at = _enter(at, place, new=new and number == len(names))
    finally:
        os.close(at)
    return path


def _make_root(below: Path) -> None:
    """What is missing up to there is made as private as what will be in it."""
    for one in (*reversed(below.parents), below):
        if not one.exists():
            with suppress(FileExistsError):
                one.mkdir(mode=0o700)


def _enter(at: int, place: Path, *, new: bool) -> int:
    """Make and open the directory `place` in the directory `at`, which is closed."""
    try:
        os.mkdir(place.name, 0o700, dir_fd=at)
    except FileExistsError:
        if new:
            raise
    try:
        inside = os.open(place.name, _FLAGS | os.O_NOFOLLOW, dir_fd=at)
    except NotADirectoryError as error:
        raise _refused(place, "it is a link, or no directory") from error
    try:
        found = os.fstat(inside)
        if found.st_uid != os.geteuid():
            raise _refused(place, f"it belongs to user {found.st_uid}")
        if found.st_mode & _OTHERS:
            os.fchmod(inside, 0o700)
    except BaseException:
        os.close(inside)
        raise
    os.close(at)
    return inside


def _refused(place: Path, why: str) -> Refused:
    return Refused(
        f"{place} cannot hold what podferry keeps",
        why=why,
        remedy=f"look at who made it; then: chown {os.geteuid()} {place} && chmod 0700 {place}, or remove it",
    )
