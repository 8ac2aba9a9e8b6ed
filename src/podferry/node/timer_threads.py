"""The threads that timers of `timer_create` tell of their expiration (SIGEV_THREAD_ID), as the job's pid namespace numbers them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from podferry.node.pid_namespace import number_inside

TimerThreads = Mapping[int, Mapping[int, int]]
"""By process, the threads by the number of the timer."""
_TOLD = re.compile(r"^ID: (\d+)\n.*\nnotify: \w+/tid\.(\d+)$", re.MULTILINE)


def timer_threads(pids: Iterable[int]) -> TimerThreads:
    """Those of the processes `pids`; what ends meanwhile is left out."""
    found: dict[int, dict[int, int]] = {}
    for pid in pids:
        with suppress(OSError):
            for id, thread in _TOLD.findall(Path(f"/proc/{pid}/timers").read_text()):
                found.setdefault(number_inside(pid), {})[int(id)] = number_inside(pid, int(thread))
    return found
