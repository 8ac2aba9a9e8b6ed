"""Freezing a job apart from the moments in which one of its processes waits in vfork."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from podferry.criu import vfork
from podferry.criu.vfork import freeze_apart_from_vfork, waiting_in_vfork
from podferry.errors import Failed

pytestmark = pytest.mark.unit
VFORK = """
import ctypes, os
CLONE_VM, CLONE_VFORK, SIGCHLD = 0x100, 0x4000, 17
stack = ctypes.create_string_buffer(1 << 20)
run = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: ctypes.CDLL(None).pause())
top = ctypes.c_void_p((ctypes.addressof(stack) + (1 << 20)) & ~15)
ctypes.PyDLL(None).clone(run, top, CLONE_VM | CLONE_VFORK | SIGCHLD, None)
"""


@pytest.fixture
def waiting() -> Iterator[list[int]]:
    """A process that waits in vfork, and its child, which does not exec."""
    parent = subprocess.Popen([sys.executable, "-c", VFORK])
    children: list[int] = []
    deadline = time.monotonic() + 60
    while not children or not waiting_in_vfork([parent.pid, *children]):
        children = [int(one) for one in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield [parent.pid, *children]
    for pid in children:
        os.kill(pid, 9)
    parent.kill()
    parent.wait()


def test_who_waits_in_vfork_is_found(waiting: list[int]) -> None:
    assert waiting_in_vfork(waiting) == [waiting[0]]
    assert waiting_in_vfork([os.getpid(), waiting[1]]) == []


def test_the_job_is_let_go_until_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    found = iter([[7], [7, 8], []])
    monkeypatch.setattr(vfork, "waiting_in_vfork", lambda pids: next(found))
    assert freeze_apart_from_vfork(lambda: done.append("freeze"), lambda: done.append("thaw"), lambda: [7, 8]) == 2
    assert done == ["freeze", "thaw", "freeze", "thaw", "freeze"]


def test_a_job_that_waits_all_the_time_is_let_go_and_the_error_names_it(waiting: list[int]) -> None:
    done: list[str] = []
    with pytest.raises(Failed, match="vfork") as raised:
        freeze_apart_from_vfork(lambda: done.append("freeze"), lambda: done.append("thaw"), lambda: waiting, 3)
    assert done == ["freeze", "thaw"] * 3
    assert str(waiting[0]) in raised.value.why
    assert raised.value.remedy
