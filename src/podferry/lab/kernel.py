"""The one setting of the whole machine that a lab needs: pipes of 4 MiB, for CRIU's page server."""

from __future__ import annotations

from pathlib import Path

from podferry.lab.progress import Progress
from podferry.lab.state import STATE, locked

PIPE_MAX_SIZE = Path("/proc/sys/fs/pipe-max-size")
NEEDED = 4194304
"""Bytes. Without CAP_SYS_RESOURCE a pipe cannot grow beyond fs.pipe-max-size, and CRIU's lazy dump fails."""

_BEFORE = STATE / "pipe-max-size.before"
_LOCK = STATE / "pipe-max-size.lock"


def raise_pipe_size(progress: Progress) -> None:
    """Let pipes grow to 4 MiB while a lab is up; the value before is kept for `restore_pipe_size`."""
    with locked(_LOCK):
        current = int(PIPE_MAX_SIZE.read_text())
        if current >= NEEDED:
            return
        _BEFORE.write_text(f"{current}\n")
        try:
            PIPE_MAX_SIZE.write_text(f"{NEEDED}\n")
        except OSError as error:
            progress(f"warning: cannot raise fs.pipe-max-size to {NEEDED} ({error.strerror}): lazy dumps may fail here")
        else:
            progress(f"fs.pipe-max-size: {current} -> {NEEDED} for the whole machine, until the last lab is down")


def restore_pipe_size() -> None:
    """Put the value back that was there before the first lab, unless somebody has set another since."""
    with locked(_LOCK):
        if _BEFORE.exists() and int(PIPE_MAX_SIZE.read_text()) == NEEDED:
            PIPE_MAX_SIZE.write_text(_BEFORE.read_text())
        _BEFORE.unlink(missing_ok=True)
