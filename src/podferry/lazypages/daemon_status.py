"""The status of the lazy-pages daemon: a small JSON file, replaced atomically, which the agent reads."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from podferry.fs.replacing import replace_file

PERIOD = 0.1
"""Seconds between two writes while nothing but numbers changes."""


class DaemonState(StrEnum):
    """The phases of the lazy-pages daemon."""

    LISTENING = "listening"
    RESTORING = "restoring"
    FILLING = "filling"
    DONE = "done"
    FAILED = "failed"


@dataclass
class DaemonStatus:
    """The contents of the file. Bytes, counts, and milliseconds; `error` is a `PodferryError` as its `to_dict` gives it.

    `resumed_ns` is when CRIU said that the tasks run, on the node's monotonic clock; 0 before.
    `slowest_ms` bounds from above how long a fault has waited for its answer. `waiting` says why nothing moves, if so.
    """

    state: DaemonState = DaemonState.LISTENING
    tasks: int = 0
    bytes_fed: int = 0
    bytes_left: int = 0
    faults: int = 0
    slowest_ms: float = 0.0
    waiting: str = ""
    error: dict[str, Any] | None = None
    pid: int = 0
    resumed_ns: int = 0


@dataclass
class StatusFile:
    """Writes a `DaemonStatus` at every change of state, else at most every `PERIOD`.

    Once it listens, the job's memory depends on the daemon: that there is no room for the file is no reason to end. It is written
    as soon as it can be.
    """

    path: Path
    status: DaemonStatus = field(default_factory=DaemonStatus)
    _written: float = 0.0
    _is_current: bool = True

    def enter(self, state: DaemonState) -> None:
        """Note a new state, at once. Raises `OSError` where it is not known yet that anybody listens."""
        self.status.state = state
        if state is DaemonState.LISTENING:
            self._write()
        else:
            self._try()

    def tick(self) -> None:
        """Write if it is time."""
        if time.monotonic() - self._written >= PERIOD:
            self._try()

    def insist(self) -> None:
        """Return once what was last noted stands in the file: nothing comes after it."""
        while not self._is_current:
            time.sleep(PERIOD)
            self._try()

    def _try(self) -> None:
        self._is_current = False
        with suppress(OSError):
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        replace_file(self.path, json.dumps(asdict(self.status)).encode() + b"\n")
        self._is_current = True


def read_status(path: Path) -> DaemonStatus:
    """The status another process wrote. Raises OSError, or ValueError where it is none."""
    try:
        fields = json.loads(path.read_text())
        return DaemonStatus(**{**fields, "state": DaemonState(fields["state"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is no lazy-pages daemon's status") from error
