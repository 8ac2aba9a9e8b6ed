"""What arrives in the upper directory of a mounted overlay is what its users see.

The kernel's documentation calls a change to the layers of a mounted overlay undefined (overlayfs.rst, "Changes to
underlying filesystems"). The target changes its upper directory while it is mounted but before anything was looked up
in it; these tests hold the kernel to what that gives. The mounts are detached ones (`fsmount(2)`): they belong to no
namespace and go when their descriptor is closed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from podferry.node.upper import Receiver, TreeSource, refresh_root, shared_files

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from upper_tree import BLOCK, Gardener, move, picture, remove

pytestmark = [pytest.mark.node, pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts an overlay")]

FSOPEN, FSCONFIG, FSMOUNT = 430, 431, 432  # include/uapi/asm-generic/unistd.h
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6
CLOEXEC = 1
MOVE_MOUNT, MOVE_MOUNT_F_EMPTY_PATH, AT_FDCWD = 429, 4, -100
CLONE_NEWNS, MS_REC, MS_PRIVATE, MNT_DETACH = 0x20000, 0x4000, 0x40000, 2

libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: int | bytes | None) -> int:
    got: int = libc.syscall(number, *(ctypes.c_long(item) if isinstance(item, int) else item for item in arguments))
    if got < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return got


@contextmanager
def overlay(lower: Path, base: Path) -> Iterator[tuple[Path, Path]]:
    """The merged view and the upper directory of an overlay with the options that containerd gives."""
    upper, work = base / "upper", base / "work"
    upper.mkdir(parents=True)
    work.mkdir()
    context = call(FSOPEN, b"overlay", CLOEXEC)
    try:
        options = {"lowerdir": lower, "upperdir": upper, "workdir": work, "index": "off"}
        for key, value in options.items():
            call(FSCONFIG, context, FSCONFIG_SET_STRING, key.encode(), os.fsencode(str(value)), 0)
        call(FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        mount = call(FSMOUNT, context, CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        yield Path(f"/proc/self/fd/{mount}"), upper
    finally:
        os.close(mount)


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    lower = tmp_path / "lower"
    lower.mkdir()
    for name in ("etc", "var", "opt"):
        (lower / name).mkdir()
        (lower / name / "one").write_text(f"{name} one")
        (lower / name / "two").write_text(f"{name} two")
    (lower / "var" / "deep").mkdir()
    (lower / "var" / "deep" / "file").write_bytes(b"x" * 3 * BLOCK)
    os.link(lower / "opt" / "one", lower / "opt" / "three")
    (lower / "link").symlink_to("etc/one")
    return lower


def test_everything_that_a_container_can_do_to_its_image(tmp_path: Path, lower: Path) -> None:
    with overlay(lower, tmp_path / "a") as (here, upper_here), overlay(lower, tmp_path / "b") as (there, upper_there):
        (here / "etc" / "one").unlink()
        remove(here / "var")
        (here / "var").mkdir()
        (here / "var" / "fresh").write_text("fresh")
        (here / "opt" / "two").write_text("replaced")
        os.link(here / "opt" / "two", here / "opt" / "four")
        (here / "link").unlink()
        (here / "link").mkdir()
        (here / "new").write_text("new")
        os.mkfifo(here / "fifo")
        assert stat.S_ISCHR((upper_here / "etc" / "one").lstat().st_mode)
        assert os.getxattr(upper_here / "var", "trusted.overlay.opaque") == b"y"
        with TreeSource(upper_here) as source, Receiver(upper_there) as receiver:
            move(source, receiver, frozen=True)
        assert stat.S_ISCHR((upper_there / "etc" / "one").lstat().st_mode)
        assert sorted(path.name for path in there.iterdir()) == ["etc", "fifo", "link", "new", "opt", "var"]
        assert [path.name for path in (there / "etc").iterdir()] == ["two"]
        assert [path.name for path in (there / "var").iterdir()] == ["fresh"]
        assert (there / "opt" / "four").samefile(there / "opt" / "two")
        assert (there / "opt" / "four").read_text() == "replaced"
        assert picture(there) == picture(here)


@pytest.mark.parametrize("seed", range(25))
def test_merged_views_are_equal_after_any_passes(tmp_path: Path, lower: Path, seed: int) -> None:
    with overlay(lower, tmp_path / "a") as (here, upper_here), overlay(lower, tmp_path / "b") as (there, upper_there):
        gardener = Gardener(here, random.Random(seed), overlay=True)
        with TreeSource(upper_here) as source, Receiver(upper_there) as receiver:
            for number in range(4):
                gardener.work(20)
                move(source, receiver, frozen=number == 3)
        assert picture(upper_there) == picture(upper_here)
        assert picture(there) == picture(here)
        # And it goes on being a working overlay.
        gardener = Gardener(there, random.Random(seed), overlay=True, count=1000)
        gardener.work(20)


def test_the_roots_own_mode_needs_a_refresh(tmp_path: Path, lower: Path) -> None:
    """The overlay holds its root's inode from the mount on, and with it the mode that permissions are checked by."""
    with overlay(lower, tmp_path / "a") as (here, upper_here), overlay(lower, tmp_path / "b") as (there, upper_there):
        here.chmod(0o700)
        with TreeSource(upper_here) as source, Receiver(upper_there) as receiver:
            move(source, receiver, frozen=True)
        refresh_root(there)
        assert picture(there) == picture(here)
        assert not readable_by_others(there / "etc" / "one")
        assert not readable_by_others(here / "etc" / "one")


def test_names_that_were_looked_up_since_the_mount_need_a_refresh(tmp_path: Path, lower: Path) -> None:
    """CRI-O writes into a container's root before it has it made; a directory that it found in the upper layer is replaced."""
    with overlay(lower, tmp_path / "a") as (there, upper):
        (there / "etc" / "mtab").touch()
        assert not (there / "etc" / "arrived").exists()
        shutil.rmtree(upper / "etc")
        (upper / "etc").mkdir()
        (upper / "etc" / "arrived").write_text("from the source")
        refresh_root(there)
        (there / "etc" / "resolv.conf").touch()
        assert (there / "etc" / "arrived").read_text() == "from the source"
        assert not (there / "etc" / "mtab").exists()


def test_a_root_that_is_no_overlay_is_left_as_it_is(tmp_path: Path) -> None:
    """A directory that is no mount of its own, on the node's file system, cannot be reconfigured, and need not."""
    refresh_root(tmp_path)


def test_a_containers_mappings_are_named_by_their_paths_in_the_tree(tmp_path: Path, lower: Path) -> None:
    with overlay(lower, tmp_path / "a") as (here, upper):
        (here / "var" / "a b\nc").write_bytes(b"x" * 4096)
        ready, ended = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(ended[1])
                enter(int(here.name), tmp_path)
                with Path("/var/a b\nc").open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
                    memory[0] = 1
                    os.write(ready[1], b"x")
                    os.read(ended[0], 1)
            finally:
                os._exit(0)
        os.close(ready[1])
        assert os.read(ready[0], 1) == b"x", "the child could not enter the overlay"
        found = shared_files(child)
        os.close(ended[1])
        os.waitpid(child, 0)
        os.close(ready[0])
        os.close(ended[0])
        with TreeSource(upper) as source:
            assert found & source.plan().manifest.entries.keys() == {b"var/a b\nc"}


def enter(mount: int, place: Path) -> None:
    """Make the mount the root of a mount namespace of this process's own, as runc does."""
    root = os.fsencode(place / "root")
    (place / "root").mkdir()
    os.chdir("/")
    checked(libc.unshare(CLONE_NEWNS))
    checked(libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None))
    call(MOVE_MOUNT, mount, b"", AT_FDCWD, root, MOVE_MOUNT_F_EMPTY_PATH)
    os.chdir(root)
    checked(libc.pivot_root(b".", b"."))
    checked(libc.umount2(b".", MNT_DETACH))
    os.chdir("/")


def checked(got: int) -> None:
    if got != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def readable_by_others(path: Path) -> bool:
    child = os.fork()
    if child == 0:
        status = 2
        try:
            os.setgroups([])
            os.setgid(2000)
            os.setuid(2000)
            path.read_bytes()
            status = 0
        except PermissionError:
            status = 1
        finally:
            os._exit(status)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, 1)
    return ended == 0
