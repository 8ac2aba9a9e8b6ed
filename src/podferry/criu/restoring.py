"""The outcome of a restore, as CRIU reports it.

A job may end within microseconds of its resume: that no process is there says nothing. CRIU's log does. CRIU writes `Running
pre-resume scripts` when every task is restored and stopped at its last system call, and lets go of them right after that line,
whatever else fails (`restore_root_task` in criu/cr-restore.c, the same from 3.x to 4.2). So a restore whose log has the line has
run the job; one that ended without it has not, and never will. runc has CRIU log at the level that shows the line; a node's own
settings may lower it, and then the log cannot tell.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from podferry.criu.processes import Process

LOG = "restore.log"
END_TIMEOUT = 10.0  # seconds
POLL_INTERVAL = 0.02
_TAIL = 1 << 20  # bytes; after the resume CRIU writes a few lines
_HEAD = 1 << 16
_RESUMED = re.compile(rb"\) (?:Running pre-resume scripts|Restore finished successfully)")
_AT_DEBUG_LEVEL = re.compile(rb"\) Running [a-z-]+ scripts")


class RestoreProcess:
    """A restore in CRIU's work directory `work`, by podferry-runc's process `wrapper`, which becomes runc's; None where it is not
    known."""

    def __init__(self, work: Path, wrapper: Process | None = None) -> None:
        self.work, self.wrapper = work, wrapper

    def resumed(self) -> bool | None:
        """Whether CRIU has let go of the tasks. None where its log cannot tell. False may become true while CRIU is there."""
        try:
            with (self.work / LOG).open("rb") as log:
                head = log.read(_HEAD)
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL))
                tail = log.read()
        except FileNotFoundError:
            return False
        if _RESUMED.search(tail):
            return True
        return False if _AT_DEBUG_LEVEL.search(head) else None

    def settle(self, patience: float = END_TIMEOUT) -> bool | None:
        """`resumed`, once it cannot change any more: runc and CRIU have ended, by themselves within `patience` seconds or killed.

        What they were restoring is killed before them: tasks whose CRIU is killed would run.
        """
        deadline = time.monotonic() + patience
        while not (found := self.resumed()) and (there := self._processes()):
            if time.monotonic() > deadline:
                for process in reversed([*there, *self._restored(there)]):
                    process.kill()
            time.sleep(POLL_INTERVAL)
        return found or self.resumed()

    def _processes(self) -> list[Process]:
        """runc and CRIU, as far as they are there."""
        found = [self.wrapper] if self.wrapper is not None and self.wrapper.alive() else []
        work = self.work.resolve()
        for proc in Path("/proc").iterdir():
            if not proc.name.isdecimal():
                continue
            with suppress(OSError):
                if (proc / "comm").read_text() != "criu\n" or (proc / "cwd").readlink() != work:
                    continue
                process = Process.of(int(proc.name))
                if process is not None and process.alive():
                    found.append(process)
        return found

    def _restored(self, roots: list[Process]) -> Iterator[Process]:
        """The descendants of `roots`, each after its parent."""
        children: dict[int, list[int]] = {}
        for proc in Path("/proc").iterdir():
            if proc.name.isdecimal():
                with suppress(OSError, IndexError, ValueError):
                    parent = int((proc / "stat").read_text().rpartition(")")[2].split()[1])
                    children.setdefault(parent, []).append(int(proc.name))
        known = {root.pid for root in roots}
        queue = list(known)
        while queue:
            for pid in children.get(queue.pop(0), ()):
                if pid not in known:
                    known.add(pid)
                    queue.append(pid)
                    if (process := Process.of(pid)) is not None:
                        yield process
