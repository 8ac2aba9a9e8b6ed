"""Who in a container does not descend from its first process, and how they leave."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from podferry.node.exec_sessions import exec_sessions, terminate
from podferry.node.process import Child, spawn

pytestmark = pytest.mark.unit

FAMILY = "sleep 60 & sleep 60 & wait"


def children(child: Child) -> list[int]:
    """The processes that a shell has started, once there are two."""
    while True:
        found = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        if len(found) == 2:
            return list(map(int, found))
        time.sleep(0.01)


@pytest.fixture
def job() -> Iterator[Child]:
    child = spawn(["sh", "-c", FAMILY])
    yield child
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def test_descendants_are_at_home_and_others_are_guests(job: Child) -> None:
    family = [job.pid, *children(job)]
    session = spawn(["sh", "-c", FAMILY])
    try:
        party = [session.pid, *children(session)]
        assert exec_sessions(job.pid, [*family, *party]) == tuple(sorted(party))
        assert exec_sessions(job.pid, family) == ()
        assert exec_sessions(job.pid, [*family, 1 << 22]) == (), "who has ended is nobody"
    finally:
        os.killpg(session.pid, signal.SIGKILL)
        session.wait()


def test_guests_that_stay_are_killed_and_the_family_is_not(job: Child) -> None:
    family, session = [job.pid, *children(job)], spawn(["sleep", "60"])
    assert terminate(job.pid, lambda: [*family, session.pid]) == 1
    assert session.wait() == -signal.SIGKILL
    for pid in family:
        os.kill(pid, 0)


def test_guests_that_leave_by_themselves_are_let_go(job: Child) -> None:
    session = spawn(["sleep", "0.1"])

    def there() -> list[int]:
        session.poll()
        return [job.pid, session.pid]

    assert terminate(job.pid, there) == 0
    assert session.wait() == 0


def test_who_has_got_the_pid_of_a_guest_that_left_is_not_killed(job: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest ends, and a stranger, here a process of ours, has its pid before a descriptor of it is opened."""
    family, stranger, looks = [job.pid, *children(job)], spawn(["sleep", "60"]), []
    monkeypatch.setattr("podferry.node.exec_sessions.PATIENCE", 0.0)
    try:

        def there() -> list[int]:
            looks.append(1)
            return [*family, stranger.pid] if len(looks) < 3 else family

        assert terminate(job.pid, there) == 0
        assert len(looks) == 3
        assert stranger.poll() is None
    finally:
        os.killpg(stranger.pid, signal.SIGKILL)
        stranger.wait()
