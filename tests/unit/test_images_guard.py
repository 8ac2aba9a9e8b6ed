"""Calls that never return, and what they leave behind."""

from __future__ import annotations

import errno
import threading

import pytest

from podferry.snapshotter.deadlines import Guard
from podferry.snapshotter.faults import (
    ShareFull,
    ShareHung,
    ShareReadOnly,
    ShareUnavailable,
    faults,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


def test_answers_and_errors_come_back() -> None:
    guard = Guard(5.0)
    assert guard.call("add", lambda: 1 + 1) == 2
    with pytest.raises(ZeroDivisionError):
        guard.call("divide", lambda: 1 // 0)


def test_a_call_that_hangs_is_left_behind(gate: threading.Event) -> None:
    guard = Guard(0.05)
    with pytest.raises(ShareHung, match="cannot read x: no answer"):
        guard.call("read x", gate.wait)
    assert guard.stuck == ["read x"]
    assert guard.call("read y", lambda: 7) == 7


def test_too_many_are_refused_at_once_until_the_share_is_back(gate: threading.Event) -> None:
    guard = Guard(0.05, most_stuck=2)
    left = threading.Event()

    def hang() -> None:
        gate.wait()
        left.set()

    for _ in range(2):
        with pytest.raises(ShareHung):
            guard.call("write", hang)
    reached = threading.Event()
    with pytest.raises(ShareHung, match="still has not answered: write"):
        guard.call("read", reached.set, deadline=60.0)
    assert not reached.is_set()
    gate.set()
    left.wait()
    while guard.stuck:  # the worker says so right after
        threading.Event().wait(0.001)
    assert guard.call("read", lambda: 1, deadline=60.0) == 1


def test_workers_are_used_again() -> None:
    guard = Guard(5.0)
    threads = {guard.call("name", lambda: threading.current_thread().ident) for _ in range(50)}
    assert len(threads) <= 2


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, ShareFull),
        (errno.EDQUOT, ShareFull),
        (errno.EROFS, ShareReadOnly),
        (errno.EACCES, ShareReadOnly),
        (errno.ENOTCONN, ShareUnavailable),
        (errno.EIO, ShareUnavailable),
        (errno.ESTALE, ShareUnavailable),
    ],
)
def test_an_errno_becomes_an_error_with_a_remedy(number: int, kind: type[ShareFull]) -> None:
    with pytest.raises(kind) as caught, faults("cannot write x"):
        raise OSError(number, "simulated")
    assert caught.value.what == "cannot write x"
    assert caught.value.remedy


def test_what_a_caller_asks_for_is_an_answer() -> None:
    with pytest.raises(FileNotFoundError), faults("x"):
        raise FileNotFoundError(2, "x")
    with pytest.raises(FileExistsError), faults("x"):
        raise OSError(errno.ENOTEMPTY, "x")
