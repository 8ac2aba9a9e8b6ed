"""Where CRIU is told to look for what a job watches; and what a job has open that it cannot save at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from podferry.core.preflight import CONTROLLING, PACKET_PIPE, SEMAPHORE, SHARED_LOCK
from podferry.fs.mountinfo import MountEntry
from podferry.node import unsaved_files, watched

pytestmark = pytest.mark.unit

WATCHER = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
watch = libc.inotify_init()
for path in sys.argv[1:]:
    assert libc.inotify_add_watch(watch, path.encode(), 0x100) > 0
print('.', flush=True)
sys.stdin.read()
"""


@contextmanager
def job(script: str, *argv: str) -> Iterator[int]:
    argv = (sys.executable, "-Ic", script, *argv)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as child:
        assert child.stdout is not None
        child.stdout.read(1)
        yield child.pid
        child.kill()


def test_what_is_watched_is_found_by_device_and_inode(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "er"
    directory.mkdir(parents=True)
    file = directory / "file"
    file.touch()
    with job(WATCHER, str(directory), str(file)) as pid:
        wanted = watched.watched([pid])
        assert {inode for _, inode in wanted} == {directory.stat().st_ino, file.stat().st_ino}
        entries = list(watched._entries(str(tmp_path)))
    assert {path for path, one in entries if one in wanted} == {"/deep/er", "/deep/er/file"}
    assert [path for path, _ in entries] == ["/", "/deep", "/deep/er", "/deep/er/file"]


def test_criu_is_told_the_files_first_and_never_what_would_be_a_setting_of_its_own() -> None:
    found = {
        (1, 1): "/a",
        (1, 2): "/a/b c",
        (1, 3): "/x\naction-script /evil",
        (1, 4): "/a/file",
        (1, 5): "/",
        (1, 6): '/"',
    }
    assert watched.settings(found) == "irmap-scan-path /a/file\nirmap-scan-path /a\n"


def test_a_pipe_in_packet_mode_is_told() -> None:
    ready = "print('.', flush=True); sys.stdin.read()"
    with job(f"import os, sys; os.pipe2(os.O_DIRECT); {ready}") as pid:
        assert list(unsaved_files.unsaved_files(pid, [pid])) == [PACKET_PIPE]
    with job(f"import os, sys; os.pipe(); {ready}") as pid:
        assert list(unsaved_files.unsaved_files(pid, [pid])) == []


def test_an_eventfd_that_is_a_semaphore_is_told() -> None:
    ready = "print('.', flush=True); sys.stdin.read()"
    with job(f"import os, sys; fd = os.eventfd(1, os.EFD_SEMAPHORE); {ready}") as pid:
        info = Path(f"/proc/{pid}/fdinfo/3").read_text()
        if "eventfd-semaphore" not in info:
            pytest.skip("this kernel does not tell what an eventfd is: Linux 6.6 is the first that does")
        assert list(unsaved_files.unsaved_files(pid, [pid])) == [SEMAPHORE]
    with job(f"import os, sys; fd = os.eventfd(1); {ready}") as pid:
        assert list(unsaved_files.unsaved_files(pid, [pid])) == []


TERMINAL = """
import os, pty, sys
child, master = pty.fork()
if child == 0:
    terminal = os.open('/dev/tty', os.O_RDWR) if sys.argv[1:] else -1
    os.write(1, b'ready')
    os.read(0, 1)
os.read(master, 5)
print('.', flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("by_dev_tty", [True, False])
def test_a_terminal_that_is_open_as_dev_tty_beside_its_master_is_told(by_dev_tty: bool) -> None:
    with job(TERMINAL, *["yes"] * by_dev_tty) as pid:
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        assert list(unsaved_files.unsaved_files(pid, [pid, *children])) == [CONTROLLING] * by_dev_tty


@pytest.mark.parametrize(("other", "gone"), [(True, True), (False, False)])
def test_a_file_whose_name_is_gone_and_that_has_another_is_told(tmp_path: Path, other: bool, gone: bool) -> None:
    path = tmp_path / "first"
    path.touch()
    if other:
        os.link(path, tmp_path / "second")
    script = "import os, sys; f = open(sys.argv[1]); os.unlink(sys.argv[1]); print('.', flush=True); sys.stdin.read()"
    with job(script, str(path)) as pid:
        assert unsaved_files.names_gone([pid]) is gone


@pytest.mark.parametrize(
    ("kind", "options", "what", "found"),
    [
        ("nfs4", "rw,vers=4.2,local_lock=none", "fcntl.flock(held, fcntl.LOCK_SH)", [SHARED_LOCK]),
        ("ceph", "rw", "fcntl.lockf(held, fcntl.LOCK_EX, 1, 7)", [SHARED_LOCK]),
        ("nfs4", "rw,local_lock=none", "held.write(b'.')", []),
        ("nfs", "rw,vers=3,nolock,local_lock=all", "fcntl.flock(held, fcntl.LOCK_EX)", []),
        ("ext4", "rw", "fcntl.flock(held, fcntl.LOCK_EX)", []),
        ("fuse.glusterfs", "rw", "fcntl.flock(held, fcntl.LOCK_EX)", []),
    ],
)
def test_a_lock_that_a_server_keeps_is_told(
    kind: str, options: str, what: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    device = (tmp_path / "file").stat().st_dev
    mounted = MountEntry(1, device, "/", "/claim", ("rw",), kind, "server:/", tuple(options.split(",")))
    monkeypatch.setattr(unsaved_files, "mounts", lambda init: [mounted])
    script = f"import fcntl, sys; held = open(sys.argv[1], 'r+b'); {what}; print('.', flush=True); sys.stdin.read()"
    with job(script, str(tmp_path / "file")) as pid:
        assert list(unsaved_files.unsaved_files(pid, [pid])) == found
