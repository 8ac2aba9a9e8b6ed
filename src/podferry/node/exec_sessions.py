"""Processes that came into a container from outside: what `exec` started, a probe or somebody's shell.

They are no descendants of the container's first process, so CRIU cannot dump them, and they could not move: whoever started them
waits on this node. So they leave before a container does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from podferry.node.members import killed

PATIENCE = 0.3
"""Seconds that they are given to end by themselves: a probe mostly does."""
LAST = 2.0
POLL_INTERVAL = 0.02


def exec_sessions(first: int, pids: Iterable[int]) -> tuple[int, ...]:
    """Those of the processes `pids` of a container that do not descend from its first process."""
    parents = {pid: parent for pid in pids if (parent := _parent(pid)) is not None}
    ours = {first}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return tuple(sorted(set(parents) - ours))


def terminate(first: int, pids: Callable[[], Iterable[int]]) -> int:
    """Wait until there are no exec sessions, and kill those that stay; returns how many were killed."""
    deadline = time.monotonic() + PATIENCE
    while exec_sessions(first, pids()) and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL)
    with killed(lambda: exec_sessions(first, pids())) as ends:
        ends.wait(LAST)
        return ends.count


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None
