"""A process that is started in steps: it waits for a word, and says when it is so far."""

from __future__ import annotations

import contextlib
import os
import select
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Self

from podferry.errors import TimedOut
from podferry.node.process import Arg, Completed, pasteable, spawn


class Stepwise:
    """`argv`, whose programs read a line each time they are to go on, and write one (or end) when they have. A context manager.

    `seconds` bounds the whole. What is still running in the end is killed.
    """

    def __init__(self, argv: Sequence[Arg], environment: Mapping[str, str] | None, seconds: float) -> None:
        self._argv = [str(word) for word in argv]
        self._deadline = time.monotonic() + seconds
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        input, self._input = os.pipe()
        self._output, output = os.pipe()
        try:
            self._child = spawn(argv, env=environment, stdin=input, stdout=output, stderr=self._errors)
        finally:
            os.close(input)
            os.close(output)
        self.pid = self._child.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        os.close(self._input)
        os.close(self._output)
        self._errors.close()

    def go_on(self) -> None:
        """Let it take its next step."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `hear` and `finish` tell
            os.write(self._input, b"\n")

    def receive(self) -> str:
        """Wait until it has said a line, and return that; nothing where it has ended instead. Raises `TimedOut`."""
        return self._read(until=b"\n")

    def finish(self) -> Completed:
        """Wait until nobody holds its output any more. Returns what was said since the last step. Raises `TimedOut`."""
        said = self._read(until=None)
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace")
        return Completed(self._argv, self._child.wait(), said, errors)

    def _read(self, until: bytes | None) -> str:
        said = b""
        while until is None or until not in said:
            left = self._deadline - time.monotonic()
            if left <= 0 or not select.select([self._output], [], [], left)[0]:
                raise TimedOut(f"not ready in time: {pasteable(self._argv)}")
            # Byte by byte, where a line is waited for: what follows belongs to the next step.
            data = os.read(self._output, 1 if until else 65536)
            if not data:
                break
            said += data
        return said.decode(errors="replace")
