"""Killing the members of a group of processes, and nobody who has got the pid of one meanwhile."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress


class Ends:
    """Processes that were sent a SIGKILL. They are waited for with `wait`."""

    def __init__(self) -> None:
        self._poll, self._left = select.poll(), set[int]()
        self.count = 0

    def add(self, pidfd: int) -> None:
        """One more."""
        self._poll.register(pidfd, select.POLLIN)
        self._left.add(pidfd)
        self.count += 1

    def wait(self, timeout: float) -> int:
        """Wait up to `timeout` seconds until all have ended; how many have not."""
        deadline = time.monotonic() + timeout
        while self._left:
            ended = self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ended:
                break
            for pidfd, _ in ended:
                self._poll.unregister(pidfd)
                self._left.discard(pidfd)
        return len(self._left)


@contextmanager
def killed(pids: Callable[[], Collection[int]]) -> Iterator[Ends]:
    """Send SIGKILL to the members that `pids` lists.

    It is asked twice: a descriptor names a process for good, so one whose pid is listed after it was opened is a member.
    """
    with ExitStack() as stack:
        opened = {}
        for pid in pids():
            with suppress(ProcessLookupError):
                opened[pid] = os.pidfd_open(pid)
                stack.callback(os.close, opened[pid])
        members, ends = set(pids()) if opened else set[int](), Ends()
        for pid, pidfd in opened.items():
            if pid in members:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    ends.add(pidfd)
        yield ends
