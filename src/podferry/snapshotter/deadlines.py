"""Calls that may never return, each within a deadline.

A file system whose server is gone holds its callers in the kernel, out of reach of any signal that leaves the process
alive. So every call on the share runs in a worker thread; when the deadline passes, the caller gets `ShareHung` and the
worker is left behind. A few of these are tolerated; after that calls are refused at once, until one of the abandoned
workers comes back and thereby tells that the share does too. Nothing is restarted and nothing piles up.

An abandoned call may still take effect later. Whoever uses a guard must bear that, as with any remote call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

from podferry.snapshotter.faults import ShareHung

T = TypeVar("T")

REMEDY = "look at the share's server and its network; running containers keep what is in their page cache"


class _Job:
    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:  # noqa: BLE001  it is raised again in the caller's thread
            self.error = error
        self.done.set()


class Guard:
    """Runs calls within `deadline` seconds; refuses at once while `most_stuck` earlier ones have not come back."""

    def __init__(self, deadline: float = 15.0, most_stuck: int = 4) -> None:
        self.deadline = deadline
        self.most_stuck = most_stuck
        self._lock = threading.Lock()
        self._idle: list[SimpleQueue[_Job]] = []
        self._stuck: dict[_Job, str] = {}

    @property
    def stuck(self) -> list[str]:
        """What the calls that have not come back wanted."""
        with self._lock:
            return list(self._stuck.values())

    def call(self, what: str, function: Callable[[], T], deadline: float | None = None) -> T:
        """`function()`, or `ShareHung` when it takes longer than `deadline` seconds. `what` names it in the error."""
        limit = self.deadline if deadline is None else deadline
        job = _Job(function)
        with self._lock:
            if len(self._stuck) >= self.most_stuck:
                first = next(iter(self._stuck.values()))
                raise ShareHung(f"cannot {what}", why=f"the share still has not answered: {first}", remedy=REMEDY)
            inbox = self._idle.pop() if self._idle else self._hire()
        inbox.put(job)
        if not job.done.wait(limit):
            with self._lock:
                if not job.done.is_set():
                    self._stuck[job] = what
            if not job.done.is_set():
                raise ShareHung(f"cannot {what}", why=f"no answer from the share in {limit:g} s", remedy=REMEDY)
        if job.error is not None:
            raise job.error
        return job.result  # type: ignore[no-any-return]

    def _hire(self) -> SimpleQueue[_Job]:
        inbox: SimpleQueue[_Job] = SimpleQueue()
        threading.Thread(target=self._work, args=(inbox,), name="share", daemon=True).start()
        return inbox

    def _work(self, inbox: SimpleQueue[_Job]) -> None:
        while True:
            job = inbox.get()
            job.run()
            with self._lock:
                self._stuck.pop(job, None)
                self._idle.append(inbox)
            del job
