"""A new file below a directory of this node's, under a name that a peer has chosen: no link is followed, nothing is overwritten."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from podferry.core.limits import Limit
from podferry.errors import Refused

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def check_new(root: Path, path: Path) -> None:
    """Raise `Refused` unless `path` is a plain path below `root` at which there is nothing, and no link on the way."""
    _names(root, path)
    place = root
    for name in path.relative_to(root).parts:
        place /= name
        try:
            found = place.lstat()
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(found.st_mode) or place == path:
            raise _taken(path)


def create_new(root: Path, path: Path, mode: int = 0o640) -> int:
    """Create and open `path` below `root`, and the directories on its way (0755). Raises `Refused` where something is there."""
    *directories, name = _names(root, path)
    root.mkdir(parents=True, exist_ok=True)
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for directory in directories:
            with suppress(FileExistsError):
                os.mkdir(directory, 0o755, dir_fd=at)
            below = os.open(directory, _DIRECTORY, dir_fd=at)
            os.close(at)
            at = below
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(name, flags, mode, dir_fd=at)
    except (FileExistsError, NotADirectoryError) as error:
        raise _taken(path) from error
    except OSError as error:  # ELOOP: a link
        raise Refused.because(f"cannot create {path}", error) from error
    finally:
        os.close(at)


def _names(root: Path, path: Path) -> tuple[str, ...]:
    if not path.is_absolute() or ".." in path.parts or not path.is_relative_to(root) or path == root:
        raise Refused(f"{path} is not below {root}", why="files that peers name are created there only")
    return path.relative_to(root).parts


def _taken(path: Path) -> Refused:
    return Refused(f"there is something at {path} already", remedy="remove or rename it; nothing is overwritten")


def small_file(path: Path, limit: Limit) -> bytes:
    """The content of a file that a container may have made anything of: sparse and huge, a FIFO, a link. Raises `TooMuch` for what
    is larger than `limit`, and OSError for what is no plain file or cannot be read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        limit.demand(found.st_size)
        return file.read(limit.most)
