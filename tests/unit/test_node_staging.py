"""What arrives before its place is there: out of every local user's reach, and renamed to its place."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from upper_tree import Gardener, move, picture

from podferry.engine.journal import Journal
from podferry.errors import Failed
from podferry.node import outside, staging
from podferry.node.cri import SharedMountKind, Volume
from podferry.node.staging import Staged, discard
from podferry.node.upper import Receiver, TreeSource
from podferry.workload import target
from podferry.workload.config import Config
from podferry.workload.target import TargetWorkload

pytestmark = pytest.mark.unit
ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="needs root: mounts, and other users")
CLOSED = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC


@pytest.fixture
def state() -> Iterator[Path]:
    """A state directory that everybody may enter, as a kubelet makes it, with a staging directory of an older version."""
    base = Path(tempfile.mkdtemp(dir="/var/tmp"))
    base.chmod(0o755)
    (base / "staging").mkdir()
    (base / "staging").chmod(0o755)
    yield base
    subprocess.run(["umount", "-q", *staged_mounts(base)], check=False) if staged_mounts(base) else None
    shutil.rmtree(base)


def staged_mounts(base: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [point for point in (line.split()[4] for line in lines) if Path(point).is_relative_to(base)]


def fill(receiver: Receiver, source: Path) -> None:
    with TreeSource(source) as sender:
        move(sender, receiver, frozen=True)


def setuid_tree(base: Path) -> Path:
    """What a container may have in a volume: all may enter, and a program that makes a user of whoever runs it."""
    tree = base / "source"
    tree.mkdir()
    shutil.copy("/usr/bin/id", tree / "program")
    (tree / "program").chmod(0o4755)
    tree.chmod(0o777)
    return tree


def as_nobody(*argv: str) -> subprocess.CompletedProcess[str]:
    who = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
    return subprocess.run([*who, *argv], capture_output=True, text=True, check=False)


@needs_root
def test_no_local_user_gets_at_a_program_in_a_staged_volume(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config("node", "127.0.0.1:1", tmp_path, state=state, run=state / "run")
    journal = Journal(tmp_path / "journal" / "id")
    volumes = (Volume("data", SharedMountKind.DISK), Volume("cache", SharedMountKind.MEMORY))
    pod = TargetWorkload(config, journal, [], cast(Any, None), volumes)
    old = os.umask(0)
    try:
        pod._stage_volumes()
    finally:
        os.umask(old)
    source = setuid_tree(tmp_path)
    for number in range(2):
        receiver = pod._volumes[number].receiver
        fill(receiver, source)
        place = Path(os.readlink(f"/proc/self/fd/{receiver._root}"))  # noqa: PTH115
        assert (place / "program").stat().st_mode & 0o7777 == 0o4755
        assert os.statvfs(place).f_flag & CLOSED == CLOSED
        for argv in ((str(place / "program"),), ("ls", str(place)), ("cat", str(place / "program"))):
            done = as_nobody(*argv)
            assert done.returncode != 0, done.stdout
            assert "ermission denied" in done.stderr
        with pytest.raises(PermissionError):  # noexec: whoever holds a descriptor does not run it, either
            subprocess.run([place / "program"], check=False)
    for directory in (journal.held("staged-volumes") or {})["directories"]:
        target.discard_all(Path(directory))
        assert not Path(directory).exists()
    assert staged_mounts(state) == []


def test_staged_files_are_renamed_to_their_place(state: Path, tmp_path: Path) -> None:
    source, place = tmp_path / "source", state / "place"
    for one in (source, place):
        one.mkdir()
    (place / "was here").mkdir()
    (place / "was here" / "deep").touch()
    Gardener(source, random.Random(7)).work(60)
    source.chmod(0o1770)
    staged = Staged(state / "staging" / "id", below=state)
    fill(staged.receiver, source)
    inodes = {path.name: path.lstat().st_ino for path in staged.tree.iterdir()}
    assert inodes
    root = place.stat().st_ino
    staged.move_to(place)
    assert {path.name: path.lstat().st_ino for path in place.iterdir()} == inodes
    assert place.stat().st_ino == root  # an overlay has it open
    assert picture(place) == picture(source)
    assert not staged.directory.exists()
    assert staged_mounts(state) == []
    (source / "later").write_bytes(b"another pass")
    fill(staged.receiver, source)
    assert picture(place) == picture(source)
    staged.close()


def test_a_renamed_program_can_be_run_again(state: Path, tmp_path: Path) -> None:
    source, place = setuid_tree(tmp_path), state / "place"
    place.mkdir()
    staged = Staged(state / "staging" / "id", below=state)
    fill(staged.receiver, source)
    staged.move_to(place)
    staged.close()
    assert subprocess.run([place / "program"], check=False, capture_output=True).returncode == 0


def test_staged_files_are_copied_where_their_place_is_on_another_file_system(state: Path, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        place = Path(other) / "place"
        place.mkdir()
        if place.stat().st_dev == state.stat().st_dev:
            pytest.skip("needs a second file system at /dev/shm")
        source = tmp_path / "source"
        source.mkdir()
        (source / "file").write_bytes(b"content")
        os.link(source / "file", source / "link")
        staged = Staged(state / "staging" / "id", below=state)
        fill(staged.receiver, source)
        staged.move_to(place)
        staged.close()
        assert picture(place) == picture(source)
        assert not staged.directory.exists()


def test_what_cannot_be_renamed_half_way_is_copied_whole(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A project quota on a directory, of which its volume's root knows nothing: EXDEV for some entries."""
    source, place = tmp_path / "source", state / "place"
    place.mkdir()
    source.mkdir()
    for name in "abc":
        (source / name).write_text(name)
    staged = Staged(state / "staging" / "id", below=state)
    fill(staged.receiver, source)
    rename, calls = os.rename, []

    def quota(old: str, new: str, **where: int) -> None:
        calls.append(old)
        if len(calls) == 3:
            raise OSError(18, "Invalid cross-device link")
        rename(old, new, **where)

    monkeypatch.setattr(os, "rename", quota)
    staged.move_to(place)
    staged.close()
    assert len(calls) == 5  # two went back
    assert picture(place) == picture(source)


def test_where_labels_belong_to_places_files_are_copied(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "SELINUX", tmp_path)
    place = state / "place"
    place.mkdir()
    staged = Staged(state / "staging" / "id", below=state)
    (staged.tree / "file").touch()
    inode = (staged.tree / "file").stat().st_ino
    staged.move_to(place)
    staged.close()
    assert (place / "file").stat().st_ino != inode


@needs_root
def test_what_a_killed_agent_staged_is_removed(state: Path) -> None:
    staged = Staged(state / "staging" / "id", below=state)
    staged.close()
    assert staged_mounts(state) == [str(staged.tree)]
    with pytest.raises(Failed):
        Staged(state / "staging" / "id", below=state)
    discard(staged.directory)
    discard(staged.directory)
    assert staged_mounts(state) == []
    assert list((state / "staging").iterdir()) == []


@needs_root
def test_an_agent_in_a_pod_renames_among_the_nodes_mounts(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own view has a mount for each directory, across which nothing is renamed."""
    source, place = setuid_tree(tmp_path), state / "containers"
    place.mkdir()
    node = subprocess.Popen(["unshare", "--mount", "--propagation=private", "sleep", "60"])
    try:
        while os.readlink(f"/proc/{node.pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt"):  # noqa: PTH115
            pass
        monkeypatch.setenv(outside.IN_POD, "1")
        monkeypatch.setattr(outside, "FIRST", node.pid)
        subprocess.run(["mount", "--bind", place, place], check=True)
        ours = os.readlink("/proc/self/ns/mnt")  # noqa: PTH115
        staged = Staged(state / "staging" / "id", below=state)
        assert staged_mounts(state) == [str(place)]
        seen = Path(f"/proc/{node.pid}/mountinfo").read_text()
        assert f" {staged.tree} " in seen
        assert "nosuid,nodev,noexec" in next(line for line in seen.splitlines() if f" {staged.tree} " in line)
        fill(staged.receiver, source)
        inode = (staged.tree / "program").stat().st_ino
        staged.move_to(place)
        staged.close()
        assert (place / "program").stat().st_ino == inode
        assert f" {staged.tree} " not in Path(f"/proc/{node.pid}/mountinfo").read_text()
        assert os.readlink("/proc/self/ns/mnt") == ours  # noqa: PTH115
    finally:
        node.kill()
        node.wait()
        subprocess.run(["umount", place], check=False)


@needs_root
def test_what_the_node_does_not_see_is_staged_and_copied_all_the_same(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tmpfs was mounted there on the node after the agent's pod began: the agent goes on below it."""
    source, place = setuid_tree(tmp_path), state / "containers"
    place.mkdir()
    hide = 'mount -t tmpfs over "$1" && exec sleep 60'
    node = subprocess.Popen(
        ["unshare", "--mount", "--propagation=private", "sh", "-c", hide, "sh", str(state / "staging")]
    )
    try:
        while f" {state}/staging " not in Path(f"/proc/{node.pid}/mountinfo").read_text():
            pass
        monkeypatch.setenv(outside.IN_POD, "1")
        monkeypatch.setattr(outside, "FIRST", node.pid)
        staged = Staged(state / "staging" / "id", below=state)
        fill(staged.receiver, source)
        staged.move_to(place)
        staged.close()
        assert picture(place) == picture(source)
        assert not staged.directory.exists()
    finally:
        node.kill()
        node.wait()
