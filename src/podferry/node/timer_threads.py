"""The threads that timers of `timer_create` tell of their expiration (SIGEV_THREAD_ID), as the job's pid namespace numbers them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

TimerThreads = Mapping[int, Mapping[int, int]]
"""By process, the threads by the number of the timer."""
_TOLD = re.compile(r"^ID: (\d+)\n.*\nnotify: \w+/tid\.(\d+)$", re.MULTILINE)


def timer_threads(pids: Iterable[int]) -> TimerThreads:
    """Those of the processes `pids`; what ends meanwhile is left out."""
    found: dict[int, dict[int, int]] = {}
    for pid in pids:
        with suppress(OSError):
            for id, thread in _TOLD.findall(Path(f"/proc/{pid}/timers").read_text()):
                found.setdefault(_inside(pid, pid), {})[int(id)] = _inside(pid, int(thread))
    return found


def _inside(pid: int, thread: int) -> int:
    status = Path(f"/proc/{pid}/task/{thread}/status").read_text()
    return int(status.partition("\nNSpid:")[2].split("\n", 1)[0].split()[-1])
