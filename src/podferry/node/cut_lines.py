"""A line of a pod's output of which the job had written only the beginning when it was frozen.

containerd's CRI plugin reads a pod's output line by line and keeps the beginning of a line in its memory until the end has come
(containerd, internal/cri/io/logger.go, `redirectLogs`). The rest of the line is written on the target, whose log would have that
alone: of `step 1 ... done` only ` done`. So the agent ends such a line itself, and marks it in the log as partial, the tag `P` of
Kubernetes' log format (design/kubelet-cri-logging.md), as containerd does with lines that are too long: what follows belongs to
the same line, on the target, or here if the job goes on.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

PARTIAL = b"P"
PATIENCE = 1.0
"""Seconds to wait for the lines to be in the log. What is not there then (a full disk) is not waited for: the job stands still."""
POLL = 0.0005
"""Seconds between two looks at the log."""
_LINE = re.compile(rb"\S+ (stdout|stderr) (F)(?::\S*)? [^\n]*\n")
"""A whole line of the log: time, stream, tags, content."""


def end_lines(log: Path, fifos: Sequence[Path], *, patience: float = PATIENCE) -> None:
    """Have the log at `log` hold all that came through `fifos`, which containerd reads: also the beginnings of lines.

    The job must be frozen, and its pipes empty. `fifos` are named as containerd names them, `ID-stdout` and `ID-stderr`;
    others, and those that nobody reads, are left alone. Where nothing was cut, a partial line without content comes into the
    log, which adds nothing to what its readers show. `patience` is in seconds.
    """
    try:
        file = os.open(log, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # no log yet: nothing was printed
        return
    try:
        before = os.fstat(file).st_size
        ended = {stream for fifo in fifos if (stream := _stream(fifo)) and _end_line(fifo)}
        for at in _newest(file, before, ended, patience).values():
            os.pwrite(file, PARTIAL, at)  # in its place: whoever reads the log keeps his position
    finally:
        os.close(file)


def _stream(fifo: Path) -> str:
    name = fifo.name.rpartition("-")[2]
    return name if name in ("stdout", "stderr") else ""


def _end_line(fifo: Path) -> bool:
    """Whether somebody reads the FIFO, and has been sent the end of a line."""
    try:
        pipe = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.write(pipe, b"\n") == 1
    except OSError:  # it is full: whoever reads it hangs
        return False
    finally:
        os.close(pipe)


def _newest(file: int, before: int, streams: set[str], patience: float) -> dict[str, int]:
    """Of each stream where the tag of its newest line behind `before` stands, when all have one and nothing more comes."""
    deadline, size = time.monotonic() + patience, before
    while True:
        last, size = size, os.fstat(file).st_size
        new = os.pread(file, size - before, before)
        found = {line[1].decode(): before + line.start(2) for line in _LINE.finditer(new)}
        if (found.keys() >= streams and size == last) or time.monotonic() > deadline:
            return {stream: at for stream, at in found.items() if stream in streams}
        time.sleep(POLL)
