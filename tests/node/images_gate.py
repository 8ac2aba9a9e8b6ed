"""A snapshotter that stops at a chosen step, between any two of its calls on the share and its transactions.

The file GATE holds the number of the step; it stands there, having made GATE.reached, until GATE is gone. Each time that GATE is
written it counts anew. GATE.steps holds the count.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from podferry.snapshotter import program
from podferry.snapshotter.metadata import Metadata
from podferry.snapshotter.posix import PosixShare

GATE = Path("/run/podferry/snapshotter-gate")


class Gate:
    """The steps of the threads that do containerd's bidding and publish."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed, self._count = 0, 0

    def step(self) -> None:
        """One step: counted, and waited at."""
        with self._lock:
            try:
                armed, wanted = GATE.stat().st_mtime_ns, int(GATE.read_text())
            except (FileNotFoundError, ValueError):
                return
            if armed != self._armed:
                self._armed, self._count = armed, 0
            self._count += 1
            GATE.with_suffix(".steps").write_text(str(self._count))
            if self._count != wanted:
                return
            GATE.with_suffix(".reached").touch()
        while GATE.exists():
            time.sleep(0.02)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with a step before it."""

        def stepped(*arguments: Any, **more: Any) -> Any:
            if not threading.current_thread().name.startswith("Housekeeping"):
                self.step()
            return function(*arguments, **more)

        return stepped


if __name__ == "__main__":
    gate = Gate()
    PosixShare.call = gate.around(PosixShare.call)  # type: ignore[method-assign]
    for name in ("create", "commit", "remove", "refer", "move"):
        setattr(Metadata, name, gate.around(getattr(Metadata, name)))
    program.main()
