"""Where a container's output goes, and when all of it has arrived there.

A container writes into pipes; containerd's shim copies from them into a file, or into a FIFO from which the kubelet's
side of containerd writes the pod's log. What is still under way at the freeze would miss the migration.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from podferry.errors import TimedOut

DRAIN_TIMEOUT = 5.0  # seconds
FIRST_POLL, LAST_POLL = 0.0002, 0.005  # seconds between looks: pipes tell their writers nothing of their readers


def log_file(uri: str) -> Path | None:
    """The file behind a task's `file:///PATH`; `None` for FIFOs, logging programs, and no output at all."""
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" and not parts.netloc else None


def drained(pid: int, fifos: Sequence[Path] = (), *, timeout: float = DRAIN_TIMEOUT) -> None:
    """Wait until nothing is left in the pipes that are process `pid`'s stdout and stderr, nor in `fifos`.

    The writers must be frozen. Each pipe is looked at until it was empty twice in a row, so that its reader has also
    handed on what it took. `timeout` is in seconds. Raises `TimedOut`: a reader that hangs.
    """
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        pipes = []
        for path in (*(Path(f"/proc/{pid}/fd/{number}") for number in (1, 2)), *fifos):
            if (pipe := _pipe(path)) is not None:
                stack.callback(os.close, pipe)
                pipes.append(pipe)
        quiet, pause = 0, FIRST_POLL
        while pipes and quiet < 2:
            left = sum(_waiting(pipe) for pipe in pipes)
            quiet = quiet + 1 if left == 0 else 0
            if time.monotonic() > deadline:
                raise TimedOut(
                    f"the output of process {pid} is not read",
                    why=f"{left} bytes are left in its pipes",
                    remedy="see whether containerd's shim or the pod's log has a disk that is full or slow",
                )
            time.sleep(pause)
            pause = min(2 * pause, LAST_POLL)


def _pipe(path: Path) -> int | None:
    """A pipe, opened as one more writer; `None` for anything else, or where no reader is left."""
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(path.stat().st_mode):
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return None


def _waiting(pipe: int) -> int:
    """Bytes in a pipe."""
    return int(struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))[0])
