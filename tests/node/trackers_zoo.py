"""Driver processes for the tests of trackers and injector, and what is asked of processes there."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

DRIVER = Path(__file__).with_name("trackers_driver.py")
PATIENCE = 60.0
"""Seconds: more than anything takes that is asked of a process here."""


class Job:
    """One driver process, and the line to it."""

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rw")
        self.pid = int(self._file.readline().split()[0])
        self._owed = 0

    def ask(self, line: str) -> None:
        """Give an order without waiting for the answer."""
        self._file.write(line + "\n")
        self._file.flush()
        self._owed += 1

    def answer(self) -> str:
        """Wait until all orders are done; the last answer."""
        last = ""
        while self._owed:
            last = self._file.readline().strip()
            assert last, f"job {self.pid} died"
            self._owed -= 1
        return last

    def do(self, expression: str) -> str:
        self.ask(f"do {expression}")
        return self.answer()


class Zoo:
    """Driver processes; the first is a warm one that others are forked from."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(512)
        self._listener.settimeout(PATIENCE)  # a driver that died never arrives
        self._program = subprocess.Popen([sys.executable, "-S", "-I", str(DRIVER), str(path)])
        self.mother = self.arrival()
        self.jobs: dict[int, Job] = {}

    def arrival(self) -> Job:
        sock, _ = self._listener.accept()
        sock.settimeout(PATIENCE)
        return Job(sock)

    def fork(self, parent: Job | None = None) -> Job:
        parent = parent or self.mother
        parent.answer()
        parent.ask("fork")
        child = self.arrival()
        assert int(parent.answer()) == child.pid
        self.jobs[child.pid] = child
        return child

    def exec(self, job: Job) -> Job:
        job.answer()
        job.ask("exec")
        job.answer()
        self.jobs[job.pid] = self.arrival()
        assert job.pid in self.jobs
        return self.jobs[job.pid]

    def exit(self, job: Job) -> None:
        job.answer()
        job.ask("exit")
        del self.jobs[job.pid]

    def freeze(self) -> None:
        for job in self.jobs.values():
            job.answer()
            os.kill(job.pid, signal.SIGSTOP)
        for job in self.jobs.values():
            wait_for_state(job.pid, "T")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop all jobs in the middle of what they do, as a cgroup's freezer does."""
        for pid in self.jobs:
            os.kill(pid, signal.SIGSTOP)
        for pid in self.jobs:
            wait_for_state(pid, "TZX")
        yield
        for pid in self.jobs:
            os.kill(pid, signal.SIGCONT)

    def clear(self) -> None:
        for pid in self.jobs:
            os.kill(pid, signal.SIGKILL)
        self.jobs.clear()

    def close(self) -> None:
        self.clear()
        self._program.kill()
        self._program.wait()
        self._listener.close()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for_state(pid: int, states: str) -> None:
    eventually(lambda: state_of(pid) in states, lambda: f"process {pid} is {state_of(pid)}, not {states}")


def wait_gone(pids: Iterable[int]) -> None:
    """Until these processes are gone, and reaped."""
    for pid in pids:
        eventually(lambda: not Path(f"/proc/{pid}").exists(), lambda: f"process {pid} is {state_of(pid)}")  # noqa: B023


def eventually(true: Callable[[], bool], trouble: Callable[[], str]) -> None:
    """Until it is true, looking without a pause: what follows is to meet the process as early as can be."""
    until = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < until, trouble()
        os.sched_yield()
