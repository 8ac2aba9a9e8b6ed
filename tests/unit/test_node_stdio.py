"""Where output goes, and that it is waited for."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from podferry.errors import TimedOut
from podferry.node.process import spawn
from podferry.node.stdio import drained, log_file

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///var/log/job.log", Path("/var/log/job.log")),
        ("file:///var/log/a%20job.log", Path("/var/log/a job.log")),
        ("/run/containerd/fifo/1/job-stdout", None),
        ("binary:///usr/bin/logger?id=job", None),
        ("file://elsewhere/var/log/job.log", None),
        ("", None),
    ],
)
def test_the_log_of_a_task(uri: str, path: Path | None) -> None:
    assert log_file(uri) == path


def writer(pipe: int) -> subprocess.Popen[bytes]:
    """A process whose stdout is a pipe with something in it."""
    child = spawn(["sh", "-c", "echo under way; kill -STOP $$"], stdout=pipe)
    os.waitpid(child.pid, os.WUNTRACED)
    return child


def test_output_under_way_is_waited_for() -> None:
    reader, pipe = os.pipe()
    child = writer(pipe)
    os.close(pipe)
    took: list[bytes] = []
    shim = threading.Timer(0.05, lambda: took.append(os.read(reader, 100)))
    shim.start()
    drained(child.pid)
    assert took == [b"under way\n"]
    child.kill()
    child.wait()
    os.close(reader)


def test_a_reader_that_hangs_is_named() -> None:
    reader, pipe = os.pipe()
    child = writer(pipe)
    os.close(pipe)
    with pytest.raises(TimedOut, match="10 bytes"):
        drained(child.pid, timeout=0)
    child.kill()
    child.wait()
    os.close(reader)


def test_fifos_further_on_count_too(tmp_path: Path) -> None:
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    drained(os.getpid(), [fifo, tmp_path / "none"])  # nobody reads it: nobody will
    reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    os.write(reader, b"line\n")
    child = spawn(["sleep", "60"])
    with pytest.raises(TimedOut):
        drained(child.pid, [fifo], timeout=0)
    os.read(reader, 10)
    drained(child.pid, [fifo])
    child.kill()
    child.wait()
    os.close(reader)
