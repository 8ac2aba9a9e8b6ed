"""Processes that whoever did not start them finds again: runc and CRIU of a dump, helpers, podferry-runc."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Process:
    """A process, named so that another one which got its pid later is not taken for it."""

    pid: int
    started: int  # clock ticks since boot

    @staticmethod
    def of(pid: int) -> Process | None:
        """Process `pid` as it is now; `None` where there is none."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        return Process(pid, int(stat.rpartition(")")[2].split()[19]))

    def alive(self) -> bool:
        """Whether it is still there, and not a zombie."""
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[19]) == self.started and fields[0] not in "ZX"
        return False

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for its end; whether it came."""
        with self._pidfd() as pidfd:
            return pidfd is None or bool(is_readable(pidfd, timeout))

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self.send(signal.SIGKILL)

    def send(self, what: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        with self._pidfd() as pidfd, contextlib.suppress(ProcessLookupError):
            if pidfd is not None:
                signal.pidfd_send_signal(pidfd, what)

    @contextlib.contextmanager
    def _pidfd(self) -> Iterator[int | None]:
        """A descriptor of the process; `None` where it has ended."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            yield None
            return
        try:
            yield pidfd if self.alive() else None  # asked after the open: from here on the pid is nobody else's
        finally:
            os.close(pidfd)


def find_process(matches: Callable[[Path], bool], among: Iterable[int] | None = None) -> Process | None:
    """The first process, of those `among` or of all, whose directory in /proc matches."""
    for proc in Path("/proc").glob("[0-9]*") if among is None else (Path(f"/proc/{pid}") for pid in among):
        with contextlib.suppress(OSError):
            if matches(proc):
                return Process.of(int(proc.name))
    return None


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def process_of_pair(data: Any) -> Process | None:
    if data is None:
        return None
    pid, started = data
    return Process(int(pid), int(started))


def is_readable(fd: int, timeout: float) -> bool:
    return bool(readable_among([fd], timeout))


def readable_among(fds: Iterable[int], timeout: float) -> list[int]:
    """Which of them can be read, within `timeout` seconds."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(timeout * 1000)]
