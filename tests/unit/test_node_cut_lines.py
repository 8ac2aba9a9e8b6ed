"""The beginning of a line that containerd keeps to itself is in the log when a job has been frozen."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from podferry.node.cut_lines import end_lines

pytestmark = pytest.mark.unit

STAMP = b"2026-11-30T20:00:00.123456789Z"


@contextmanager
def logger(fifo: Path, log: Path, stream: bytes) -> Iterator[Callable[[bytes], None]]:
    """What containerd does with one stream: it writes a line to the log when it has its end. Yields how the container prints."""
    os.mkfifo(fifo)
    pipe = os.open(fifo, os.O_RDWR)

    def read() -> None:
        held = b""
        with log.open("ab", buffering=0) as file:
            while (data := os.read(pipe, 4096)) != b"END":
                *lines, held = (held + data).split(b"\n")
                for line in lines:
                    file.write(b"%s %s F %s\n" % (STAMP, stream, line))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield lambda data: os.write(pipe, data) and None
    finally:
        os.write(pipe, b"END")
        thread.join()
        os.close(pipe)


def shown(log: bytes) -> dict[bytes, bytes]:
    """What `kubectl logs` makes of a log, by stream: a partial line goes on with the next one."""
    texts: dict[bytes, bytes] = {b"stdout": b"", b"stderr": b""}
    for line in log.splitlines():
        _, stream, tag, content = line.split(b" ", 3)
        texts[stream] += content + (b"\n" if tag == b"F" else b"")
    return texts


@pytest.mark.parametrize(
    ("out", "err"),
    [
        (b"one\nstep 2 ... ", b""),
        (b"one\n", b"warning: "),
        (b"step 1 ... ", b"45 %"),
        (b"one\ntwo\n", b"three\n"),
        (b"", b""),
    ],
)
def test_a_line_that_was_begun_goes_on_after_the_freeze(tmp_path: Path, out: bytes, err: bytes) -> None:
    log = tmp_path / "0.log"
    log.touch()
    fifos = [tmp_path / "abc-stdout", tmp_path / "abc-stderr"]
    with logger(fifos[0], log, b"stdout") as say, logger(fifos[1], log, b"stderr") as warn:
        if out:
            say(out)
        if err:
            warn(err)
        end_lines(log, fifos, patience=60)
        assert shown(log.read_bytes()) == {b"stdout": out, b"stderr": err}
        say(b"done\n")
        warn(b"done\n")
        end_lines(log, fifos, patience=60)  # a second freeze, of a move that was rolled back
    assert shown(log.read_bytes()) == {b"stdout": out + b"done\n", b"stderr": err + b"done\n"}


def test_a_log_that_is_read_meanwhile_keeps_its_length(tmp_path: Path) -> None:
    log, fifo = tmp_path / "0.log", tmp_path / "abc-stdout"
    log.touch()
    with logger(fifo, log, b"stdout") as say:
        say(b"step 1 ... ")
        end_lines(log, [fifo], patience=60)
        assert log.read_bytes() == STAMP + b" stdout P step 1 ... \n"


def test_a_fifo_without_a_reader_and_one_of_another_kind_are_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    end_lines(log, [tmp_path / "abc-stdout"])
    assert not log.exists()
    log.write_bytes(STAMP + b" stdout F one\n")
    for name in ("abc-stdout", "stdin"):
        os.mkfifo(tmp_path / name)
    reader = os.open(tmp_path / "stdin", os.O_RDONLY | os.O_NONBLOCK)
    end_lines(log, [tmp_path / "abc-stdout", tmp_path / "stdin", tmp_path / "none-stderr"])
    assert os.read(reader, 10) == b""
    assert log.read_bytes() == STAMP + b" stdout F one\n"
    os.close(reader)


def test_a_reader_that_writes_nothing_holds_no_job_up(tmp_path: Path) -> None:
    log, fifo = tmp_path / "0.log", tmp_path / "abc-stdout"
    log.touch()
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDWR)
    end_lines(log, [fifo], patience=0.01)
    assert os.read(reader, 10) == b"\n"
    assert log.read_bytes() == b""
    os.close(reader)
