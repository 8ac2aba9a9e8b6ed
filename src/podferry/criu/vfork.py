"""Find parents that wait in vfork: CRIU cannot stop such a parent as long as its child is frozen.

Between `vfork` and its child's `exec` or end, the parent sleeps in the kernel where only a signal that kills reaches it. A freezer
counts it as frozen, but ptrace does not get it to stop before the child goes on: CRIU tries for 10 s and gives up. Most programs
start others so (`posix_spawn`, Python's `subprocess`, Go, Java), and some all the time. So the job is frozen at another moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

from podferry.errors import Failed

TRIES = 40
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.02
"""Seconds: a child is on its way for less than a millisecond, unless the machine is busy."""

WAITING = frozenset({"wait_for_vfork_done", "kernel_clone", "_do_fork"})
"""The content of /proc/PID/wchan then: the function that waits, or the one that the compiler has put it into."""


def freeze_apart_from_vfork(
    freeze: Callable[[], object], thaw: Callable[[], object], pids: Callable[[], Collection[int]], tries: int = TRIES
) -> int:
    """Freeze at a moment at which nobody waits in vfork. Returns how often the job was let go for it.

    Raises `Failed`, with the job thawed, where no such moment came.
    """
    pause = FIRST_PAUSE
    for number in range(tries):
        freeze()
        waiting = waiting_in_vfork(pids())
        if not waiting:
            return number
        thaw()
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    raise Failed(
        "the job cannot be dumped: whenever it is frozen, a process waits in vfork for its child",
        why=f"{', '.join(map(_named, waiting[:4]))}: CRIU cannot stop a process there, {tries} times",
        remedy="migrate when it starts fewer programs, or look at why the children do not exec",
    )


def waiting_in_vfork(pids: Collection[int]) -> list[int]:
    """The threads that wait in vfork, of these processes, which are frozen. A child is another process: one alone has none."""
    return list(_waiting(pids)) if len(pids) > 1 else []


def _waiting(pids: Collection[int]) -> Iterator[int]:
    for pid in pids:
        with suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with suppress(OSError):
                    if (thread / "wchan").read_text() in WAITING:
                        yield int(thread.name)


def _named(tid: int) -> str:
    with suppress(OSError):
        return f"{Path(f'/proc/{tid}/comm').read_text().strip()} ({tid})"
    return str(tid)
