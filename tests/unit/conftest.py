"""What unit tests of several modules need."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest


@pytest.fixture
def process() -> Iterator[int]:
    """The pid of a process that waits: `cat`."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(b".")
        assert child.stdout.read(1) == b"."  # it is `cat` by now
        yield child.pid
        child.kill()
