"""The one way to put a file in the place of another: whoever opens it meets the old one or the new one, and both are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def replace_file(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Put `content` at `path` in one step, with `mode` or, where that is None, as the process' umask has it.

    Raises `OSError`; then what was at `path` is still there, and nothing beside it.
    """
    with replacement(path, mode=mode) as file:
        file.write(content)


@contextmanager
def replacement(path: Path, *, mode: int | None = None) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends. Where it ends with an error, the file is gone."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)  # of a process that was killed, or of somebody who would like to read what is written
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666 if mode is None else mode & 0o700)
    try:
        with open(file, "wb") as opened:  # noqa: PTH123 - it is open already
            if mode is not None:
                os.fchmod(file, mode)
            yield opened
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
