"""What CRIU's log says of a restore. The lines are CRIU 4.1's."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from podferry.criu.processes import Process
from podferry.criu.restoring import LOG, RestoreProcess
from podferry.node.process import spawn

pytestmark = pytest.mark.unit

BEGINS = "(00.010000) Running pre-restore scripts\n(00.013000) \tRPC\n"
LETS_GO = "(00.050000) Running pre-resume scripts\n"
ENDS = "(00.050600) Restore finished successfully. Tasks resumed.\n(00.050700) Writing stats\n"
FAILS = (
    "(00.051000) Error (criu/cr-restore.c:2100): Unable to detach 7: No such process\n(00.051100) Killing processes\n"
)
OLD_ERROR = "(00.011000) Warn  (criu/rlimit.c:1): Can't set RLIMIT_NOFILE\n"


@pytest.mark.parametrize(
    ("log", "resumed"),
    [
        (None, False),
        (BEGINS, False),
        (BEGINS + OLD_ERROR + FAILS, False),
        (BEGINS + OLD_ERROR + LETS_GO, True),
        (BEGINS + OLD_ERROR + LETS_GO + ENDS, True),
        (BEGINS + LETS_GO + FAILS, True),  # the first process let go of had ended, and all others with it
        (ENDS, True),
        (OLD_ERROR + FAILS, None),
        ("", None),
    ],
)
def test_what_the_log_says(log: str | None, resumed: bool | None, tmp_path: Path) -> None:
    if log is not None:
        (tmp_path / LOG).write_text(log)
    assert RestoreProcess(tmp_path).resumed() is resumed
    assert RestoreProcess(tmp_path).settle() is resumed


def test_a_restore_that_does_not_end_is_ended_with_what_it_restores(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text(BEGINS)
    runc = spawn(["sh", "-c", "sleep 1000 & sleep 1000; :"])
    wrapper = Process.of(runc.pid)
    assert wrapper is not None
    children = Path(f"/proc/{runc.pid}/task/{runc.pid}/children")
    while len(children.read_text().split()) < 2:
        time.sleep(0.01)
    tasks = [Process.of(int(pid)) for pid in children.read_text().split()]
    assert RestoreProcess(tmp_path, wrapper).settle(0.0) is False
    assert not any(task and task.alive() for task in tasks)
    assert not wrapper.alive()
    os.waitpid(runc.pid, 0)
