"""Processes that CRIU cannot dump are found by `check`, and not at the dump."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from podferry.core.preflight import FIRST_THREAD, GHOST, GHOST_BYTES, OTHER_ROOT, SECRET, TRACED, USER_NAMESPACE
from podferry.criu.checkpoint import CRIU_CONF
from podferry.node import jobfacts
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


def test_a_process_whose_first_thread_has_ended() -> None:
    script = (
        "import ctypes, threading; threading.Thread(target=input).start(); print(flush=True); "
        "ctypes.CDLL(None).syscall(EXIT, 0)"
    )
    exit = {"x86_64": 60, "aarch64": 93}[os.uname().machine]
    argv = [sys.executable, "-c", script.replace("EXIT", str(exit))]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        me, found = os.getpid(), []
        while not found and child.poll() is None:
            found = list(unsaved_processes(me, [me, child.pid]))
        assert found == [FIRST_THREAD]
        child.kill()


def test_a_process_that_a_signal_has_stopped() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        assert not jobfacts.is_stopped(child.pid)
        child.send_signal(signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        assert jobfacts.is_stopped(child.pid)
        child.kill()
    assert not jobfacts.is_stopped(child.pid), "it has ended"


SECRETIVE = """
import ctypes, mmap
libc = ctypes.CDLL(None)
fd = libc.syscall(447, 0)
if fd >= 0:
    libc.ftruncate(fd, 4096)
    memory = mmap.mmap(fd, 4096)
print(fd, flush=True)
input()
"""


def test_a_process_with_secret_memory() -> None:
    with subprocess.Popen([sys.executable, "-c", SECRETIVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        if int(child.stdout.readline()) < 0:
            pytest.skip("the kernel has no memfd_secret (CONFIG_SECRETMEM, secretmem.enable)")
        assert list(unsaved_processes(os.getpid(), [child.pid])) == [SECRET]
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


def test_a_deleted_file_that_is_larger_than_what_criu_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is what is on disk, as for CRIU: a hole is not copied."""
    monkeypatch.setattr(jobfacts, "GHOST_BYTES", 1 << 20)
    with (tmp_path / "deleted").open("w+b") as file, holding(file.fileno()) as pid:
        (tmp_path / "deleted").unlink()
        file.truncate(4 << 20)
        assert GHOST not in jobfacts._Open.by([pid]).unsaved
        file.write(b"x" * (2 << 20))
        file.flush()
        os.fsync(file.fileno())
        assert GHOST in jobfacts._Open.by([pid]).unsaved
    memory = os.memfd_create("large")
    os.write(memory, b"x" * (2 << 20))
    with holding(memory) as pid:
        assert GHOST not in jobfacts._Open.by([pid]).unsaved
    os.close(memory)


@contextmanager
def holding(descriptor: int) -> Iterator[int]:
    """The pid of a process that has this descriptor open, and none that other tests have left open in this one."""
    nothing = subprocess.DEVNULL
    child = subprocess.Popen(["sleep", "600"], pass_fds=[descriptor], stdin=nothing, stdout=nothing, stderr=nothing)
    yield child.pid
    child.kill()
    child.wait()


def test_check_knows_what_criu_is_told() -> None:
    assert f"ghost-limit {GHOST_BYTES >> 20}M" in CRIU_CONF.read_text().splitlines()


def test_a_first_process_with_another_root(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root: chroot")
    script = "import os, sys; os.chroot(sys.argv[1]); print(flush=True); input()"
    argv = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert list(unsaved_processes(child.pid, [child.pid])) == [OTHER_ROOT]
        assert list(unsaved_processes(os.getpid(), [os.getpid(), child.pid])) == []
        child.kill()
