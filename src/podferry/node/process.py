"""The only module of podferry that starts processes.

Every command runs with a small, known environment, closed stdin and its own session, so that a Ctrl-C in the
terminal or a killed agent does not take half of a cut-over with it. A failed command raises `CommandFailed` with the
command as it can be pasted into a shell, the signal's name where one ended it, and the last lines it printed.

The idea of one such module is mkosi's (`mkosi/run.py`).
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from podferry.errors import EVIDENCE_LINES, CommandFailed, TimedOut

PATH = "/opt/podferry/criu/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/libexec/crio"
"""CRI-O's own packages have runc in the last."""
CLEAN_ENVIRONMENT = {"PATH": PATH, "LC_ALL": "C.UTF-8", "HOME": "/root"}

Arg = str | Path
File = int | IO[bytes] | None
Child = subprocess.Popen[bytes]


@dataclass(frozen=True)
class Completed:
    """A command that has ended; `stdout` and `stderr` are what it printed, decoded leniently."""

    argv: list[str]
    returncode: int
    stdout: str
    stderr: str


def pasteable(argv: Sequence[Arg]) -> str:
    """The command as a shell takes it."""
    return shlex.join(str(arg) for arg in argv)


def run(
    argv: Sequence[Arg],
    *,
    check: bool = True,
    input: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = None,
    log: Path | None = None,
    remedy: str = "",
    pass_fds: Sequence[int] = (),
) -> Completed:
    """Run `argv` to its end and return what it printed.

    `timeout` is in seconds. `log` names the file in which the tool itself writes why it failed (CRIU, runc); its last
    lines go into the error before those of stderr. Raises `CommandFailed` (unless `check` is false) and `TimedOut`.
    """
    words = [str(arg) for arg in argv]
    try:
        done = subprocess.run(
            words,
            input=input.encode() if input is not None else None,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            env={**CLEAN_ENVIRONMENT, **(env or {})},
            cwd=cwd,
            timeout=timeout,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
            check=False,
        )
    except FileNotFoundError as missing:
        raise CommandFailed(f"cannot run {words[0]}", why="no such program", remedy=remedy, argv=words) from missing
    except subprocess.TimeoutExpired as late:
        raise TimedOut(
            f"no end after {timeout} s: {pasteable(words)}", remedy=remedy, evidence=last_lines(log)
        ) from late
    result = Completed(
        words, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    )
    if check:
        raise_for(result, log=log, remedy=remedy)
    return result


def spawn(
    argv: Sequence[Arg],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: File = None,
    stdout: File = None,
    stderr: File = None,
    pass_fds: Sequence[int] = (),
) -> Child:
    """Start `argv` in its own session and return at once; what is not given is /dev/null."""
    words = [str(arg) for arg in argv]
    try:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.DEVNULL if stdout is None else stdout,
            stderr=subprocess.DEVNULL if stderr is None else stderr,
            env={**CLEAN_ENVIRONMENT, **(env or {})},
            cwd=cwd,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
    except FileNotFoundError as missing:
        raise CommandFailed(f"cannot run {words[0]}", why="no such program", argv=words) from missing


def raise_for(done: Completed, *, log: Path | None = None, remedy: str = "") -> None:
    """Raise `CommandFailed` if `done` did not end with 0."""
    if done.returncode == 0:
        return
    evidence = last_lines(log) + (done.stderr.strip() or done.stdout.strip()).splitlines()[-EVIDENCE_LINES:]
    raise CommandFailed(
        f"failed: {pasteable(done.argv)}",
        why=ending(done.returncode),
        remedy=remedy,
        evidence=evidence,
        argv=done.argv,
        returncode=done.returncode,
    )


def ending(returncode: int) -> str:
    """How a process ended, in words: `exit status 3` or `killed by SIGKILL`."""
    if returncode < 0:
        try:
            return f"killed by {signal.Signals(-returncode).name}"
        except ValueError:
            return f"killed by signal {-returncode}"
    return f"exit status {returncode}"


def last_lines(log: Path | None, count: int = EVIDENCE_LINES) -> list[str]:
    """The last `count` lines of a log; an empty list where there is none."""
    if log is None:
        return []
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 200 * count))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []
