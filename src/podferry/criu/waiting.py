"""How `podferry-runc` waits for the agent: each has a FIFO in $PODFERRY_RUN/waiting, and reads a line when it may look again.

The FIFO's name is what it waits for (a container, or the key of one that arrives) and, behind a dot, its pid.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path


def wake(run: Path, name: str) -> None:
    """Have everybody who waits for `name` look again. FIFOs of those that are gone are removed."""
    with suppress(FileNotFoundError):
        for path in (run / "waiting").iterdir():
            waits_for, _, pid = path.name.rpartition(".")
            if waits_for == name and pid.isdecimal():
                _wake(path)


def _wake(path: Path) -> None:
    try:
        fifo = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nobody reads
            path.unlink(missing_ok=True)
        return
    try:
        with suppress(OSError):  # it is full of lines that were not read yet
            os.write(fifo, b"\n")
    finally:
        os.close(fifo)
