"""A snapshotter that kills itself at a chosen step: before or after any transaction, call on the share or deletion."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from podferry.snapshotter import program
from podferry.snapshotter.metadata import Metadata
from podferry.snapshotter.posix import PosixShare


def serve(arguments: list[str], log: str, crash_at: int, counted: str) -> None:
    """Run `podferry-snapshotter` in this process; SIGKILL at the given step (0: never). Steps are counted in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    _instrument(crash_at, counted)
    sys.argv = ["podferry-snapshotter", *arguments]
    program.main()


def _instrument(crash_at: int, counted: str) -> None:
    numbers = itertools.count(1)
    lock = threading.Lock()

    def step() -> None:
        with lock:
            number = next(numbers)
            if number == crash_at:
                os.kill(os.getpid(), signal.SIGKILL)
            Path(counted).write_text(str(number))

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            if threading.current_thread().name.startswith("Housekeeping"):
                return function(*arguments, **more)
            step()
            result = function(*arguments, **more)
            step()
            return result

        return wrapped

    transaction = Metadata._transaction

    @contextmanager
    def counted_transaction(self: Metadata) -> Iterator[Any]:
        if self._db.in_transaction or threading.current_thread().name.startswith("Housekeeping"):
            with transaction(self) as db:
                yield db
            return
        step()
        with transaction(self) as db:
            yield db
            step()
        step()

    Metadata._transaction = counted_transaction  # type: ignore[method-assign]
    PosixShare.call = around(PosixShare.call)  # type: ignore[method-assign]
    shutil.rmtree = around(shutil.rmtree)  # type: ignore[assignment]
