"""Only members of the group are killed, whoever has their pids later."""

from __future__ import annotations

import subprocess

import pytest

from podferry.node.members import killed

pytestmark = pytest.mark.unit


def test_members_are_killed_and_waited_for() -> None:
    members = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    with killed(lambda: [one.pid for one in members]) as ends:
        assert ends.wait(20.0) == 0
        assert ends.count == 3
    assert [one.wait() for one in members] == [-9, -9, -9]


def test_a_stranger_with_a_members_pid_lives_on() -> None:
    stranger = subprocess.Popen(["sleep", "60"])
    lists = [[stranger.pid], []]
    try:
        with killed(lambda: lists.pop(0)) as ends:
            assert (ends.count, ends.wait(1.0)) == (0, 0)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_nobody_is_nobody() -> None:
    with killed(lambda: [1 << 22]) as ends:
        assert ends.wait(1.0) == 0
