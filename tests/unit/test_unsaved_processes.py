"""Processes that CRIU cannot dump are found by `check`, and not at the dump."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from podferry.core.preflight import TRACED, USER_NAMESPACE
from podferry.node.jobfacts import unsaved_processes

pytestmark = pytest.mark.unit
TRACEME = "import ctypes; print(ctypes.CDLL(None).ptrace(0, 0, 0, 0), flush=True); input()"


def test_a_process_that_another_one_traces() -> None:
    with subprocess.Popen([sys.executable, "-c", TRACEME], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"0\n"
        me = os.getpid()
        assert list(unsaved_processes(me, [me, child.pid])) == [TRACED]
        assert list(unsaved_processes(child.pid, [child.pid])) == []  # a tracer from outside, as podferry's own
        child.kill()


def test_a_process_in_a_user_namespace_of_its_own() -> None:
    argv = ["unshare", "--user", "sh", "-c", "echo; cat"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        if child.stdout.readline() != b"\n":
            pytest.skip("the kernel lets this process make no user namespace")
        me = os.getpid()
        assert list(unsaved_processes(me, [me, child.pid])) == [USER_NAMESPACE]
        child.kill()
