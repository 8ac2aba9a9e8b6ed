"""What waits in a job's terminals, of real ones."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import tty
from collections.abc import Iterator

import pytest

from podferry.node.terminals import flags, put_back, unread

pytestmark = pytest.mark.unit
Pair = tuple[int, int]


@pytest.fixture
def pair() -> Iterator[Pair]:
    master, slave = pty.openpty()
    tty.setraw(slave)
    yield master, slave
    os.close(master)
    os.close(slave)


def mine() -> tuple[str, ...]:
    return unread(os.getpid(), [os.getpid()])


def arrived(descriptor: int) -> None:
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    assert waiting.poll(10_000)


def test_input_that_nobody_has_read_is_found_till_it_is_read(pair: Pair) -> None:
    master, slave = pair
    assert os.ttyname(slave) not in mine()
    os.write(master, b"typed")
    arrived(slave)
    assert os.ttyname(slave) in mine()
    os.read(slave, 5)
    assert os.ttyname(slave) not in mine()


def test_output_that_nobody_has_read_is_found_till_it_is_read(pair: Pair) -> None:
    master, slave = pair
    os.write(slave, b"printed")
    arrived(master)
    assert os.ttyname(slave) in mine()
    os.read(master, 7)
    assert os.ttyname(slave) not in mine()


def test_a_terminal_whose_master_is_somebody_elses_does_not_count(pair: Pair) -> None:
    master, slave = pair
    os.write(master, b"typed")
    arrived(slave)
    ready, says = os.pipe()
    over, ends = os.pipe()
    if (child := os.fork()) == 0:
        os.close(master)
        os.write(says, b"x")
        os.read(over, 1)
        os._exit(0)
    os.read(ready, 1)
    try:
        assert unread(child, [child]) == ()
    finally:
        os.write(ends, b"x")
        os.waitpid(child, 0)
        for one in (ready, says, over, ends):
            os.close(one)


def test_a_terminal_waits_again_as_it_did(pair: Pair) -> None:
    """CRIU leaves both ends without O_APPEND, too: they are given all their flags."""
    master, slave = pair
    fcntl.fcntl(slave, fcntl.F_SETFL, os.O_RDWR | os.O_NONBLOCK | os.O_APPEND)
    had = [fcntl.fcntl(one, fcntl.F_GETFL) for one in pair]
    noted = flags([os.getpid()])
    for one in pair:
        fcntl.fcntl(one, fcntl.F_SETFL, os.O_RDWR | os.O_NONBLOCK)
    put_back([], noted)
    assert fcntl.fcntl(master, fcntl.F_GETFL) & os.O_NONBLOCK, "its process is not of the container any more"
    put_back([os.getpid()], noted)
    assert [fcntl.fcntl(one, fcntl.F_GETFL) for one in pair] == had
