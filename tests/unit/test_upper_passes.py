"""A tree arrives whole, in passes, however it changes between them."""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from upper_tree import BLOCK, ROOT, Gardener, move, picture

from podferry.errors import Failed, Refused
from podferry.node.upper import MAX_CHUNK, Receiver, TreePolicy, TreeSource, shared_files
from podferry.node.upper.scan import scan

pytestmark = pytest.mark.unit


class Pair:
    def __init__(self, base: Path) -> None:
        self.here, self.there = base / "source", base / "target"
        self.here.mkdir()
        self.there.mkdir()
        self.source, self.receiver = TreeSource(self.here), Receiver(self.there)

    def move(self, *, frozen: bool = False, suspects: tuple[bytes, ...] = ()) -> int:
        return move(self.source, self.receiver, frozen=frozen, suspects=suspects)

    def check(self) -> None:
        assert picture(self.there) == picture(self.here)

    def close(self) -> None:
        self.source.close()
        self.receiver.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), steps=st.lists(st.integers(0, 25), min_size=1, max_size=5))
def test_random_trees_are_equal_after_every_pass(seed: int, steps: list[int]) -> None:
    with tempfile.TemporaryDirectory() as base:
        pair = Pair(Path(base))
        gardener = Gardener(pair.here, random.Random(seed))
        for number, count in enumerate(steps):
            gardener.work(count)
            if gardener.rng.random() < 0.5:
                settle(pair.here)
            pair.move(frozen=number == len(steps) - 1)
            pair.check()
        pair.close()


def test_a_pass_over_a_tree_that_did_not_change_sends_nothing(pair: Pair) -> None:
    Gardener(pair.here, random.Random(1)).work(60)
    pair.move()
    settle(pair.here)
    pair.move()
    plan = pair.source.plan(frozen=True)
    assert plan.empty
    assert plan.bytes == 0


def test_a_change_in_the_tick_of_the_last_look_is_seen(pair: Pair) -> None:
    path = pair.here / "file"
    for value in range(200):
        times = path.stat() if value else None
        path.write_bytes(b"%03d" % value)
        if times:
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        pair.move()
        assert (pair.there / "file").read_bytes() == b"%03d" % value


def test_a_log_that_grew_by_a_line_costs_one_block(pair: Pair) -> None:
    log = pair.here / "log"
    log.write_bytes(os.urandom(40 * BLOCK + 1000))
    assert pair.move() == 40 * BLOCK + 1000
    with log.open("ab") as file:
        file.write(b"a line\n")
    assert pair.move(frozen=True) == 1007
    pair.check()


def test_a_renamed_file_is_not_sent_again(pair: Pair) -> None:
    (pair.here / "checkpoint.tmp").mkdir()
    (pair.here / "checkpoint.tmp" / "weights").write_bytes(os.urandom(10 * BLOCK))
    pair.move()
    (pair.here / "checkpoint.tmp").rename(pair.here / "checkpoint")
    assert pair.move(frozen=True) == 0
    pair.check()


def test_log_rotation_moves_names_not_bytes(pair: Pair) -> None:
    for name in ("log", "log.1", "log.2"):
        (pair.here / name).write_bytes(os.urandom(4 * BLOCK))
    pair.move()
    (pair.here / "log.1").rename(pair.here / "log.2")
    (pair.here / "log").rename(pair.here / "log.1")
    (pair.here / "log").write_bytes(b"fresh")
    assert pair.move(frozen=True) == 5
    pair.check()


def test_links_made_and_removed_between_passes(pair: Pair) -> None:
    one = pair.here / "one"
    one.write_bytes(b"x" * 3 * BLOCK)
    pair.move()
    os.link(one, pair.here / "two")
    assert pair.move() == 0
    pair.check()
    one.unlink()
    os.link(pair.here / "two", pair.here / "three")
    assert pair.move(frozen=True) == 0
    pair.check()
    assert (pair.there / "two").stat().st_ino == (pair.there / "three").stat().st_ino


def test_holes_stay_holes(pair: Pair) -> None:
    sparse = pair.here / "sparse"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"island")
    pair.move()
    copy = pair.there / "sparse"
    assert copy.stat().st_size == 1 << 40
    assert copy.stat().st_blocks <= sparse.stat().st_blocks + 8
    with sparse.open("r+b") as file:
        file.seek(5)
        file.write(b"another")
    assert pair.move(frozen=True) <= 4096
    with copy.open("rb") as file:
        assert os.pread(file.fileno(), 12, 0) == b"\0" * 5 + b"another"
        assert os.pread(file.fileno(), 8, 1 << 39) == b"island\0\0"


def test_data_that_became_a_hole_is_gone(pair: Pair) -> None:
    path = pair.here / "file"
    path.write_bytes(b"x" * 6 * BLOCK)
    pair.move()
    with path.open("r+b") as file:
        file.truncate(BLOCK // 2)
        file.truncate(6 * BLOCK)
        file.seek(4 * BLOCK + 5)
        file.write(b"y")
    pair.move(frozen=True)
    pair.check()
    assert (pair.there / "file").stat().st_blocks * 512 < 2 * BLOCK


def test_an_abandoned_pass_is_made_good_by_a_fresh_one(pair: Pair) -> None:
    Gardener(pair.here, random.Random(2)).work(40)
    pair.move()
    Gardener(pair.here, random.Random(3)).work(0)
    (pair.here / "late").write_bytes(b"late")
    next(iter(pair.source.send(pair.source.plan())))
    plan = pair.source.plan()
    assert plan.fresh
    receiver = Receiver(pair.there)
    (pair.there / "left over").mkdir()
    for chunk in pair.source.send(plan):
        receiver.feed(chunk)
    assert receiver.finish() == pair.source.summary
    receiver.close()
    pair.check()


def test_what_vanishes_or_changes_while_it_is_read_is_taken_up_later(pair: Pair) -> None:
    for name in ("goes", "stays", "shrinks", "replaced"):
        (pair.here / name).write_bytes(os.urandom(5 * BLOCK))
    plan = pair.source.plan()
    (pair.here / "goes").unlink()
    os.truncate(pair.here / "shrinks", 7)
    (pair.here / "replaced").unlink()
    os.mkfifo(pair.here / "replaced")
    for chunk in pair.source.send(plan):
        pair.receiver.feed(chunk)
    assert pair.receiver.finish() == pair.source.summary
    pair.move(frozen=True)
    pair.check()


def test_a_file_that_shrinks_in_the_middle_of_being_read(pair: Pair) -> None:
    path = pair.here / "file"
    path.write_bytes(os.urandom(100 * BLOCK))
    pair.move()
    path.write_bytes(os.urandom(100 * BLOCK))
    sending = pair.source.send(pair.source.plan())
    pair.receiver.feed(next(sending))
    os.truncate(path, 10 * BLOCK)
    os.truncate(path, 12 * BLOCK)
    for chunk in sending:
        pair.receiver.feed(chunk)
    pair.receiver.finish()
    pair.move(frozen=True)
    pair.check()


@pytest.mark.parametrize("change", ["unlink", "append"])
def test_a_frozen_tree_must_stand_still(pair: Pair, change: str) -> None:
    path = pair.here / "file"
    path.write_bytes(os.urandom(20 * BLOCK))
    plan = pair.source.plan(frozen=True)
    if change == "unlink":
        path.unlink()
    else:
        with path.open("ab") as file:
            file.write(b"x")
    with pytest.raises(Failed):
        list(pair.source.send(plan))


def test_a_store_through_a_mapping_is_seen_where_the_path_is_suspect(pair: Pair) -> None:
    path = pair.here / "mapped"
    path.write_bytes(b"a" * 2 * BLOCK)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[0] = ord("b")
        settle(pair.here)
        pair.move()
        memory[BLOCK] = ord("c")
        assert b"mapped" in shared_files(os.getpid(), os.fsencode(pair.here))
        pair.move(suspects=(b"mapped",))
        pair.check()
        settle(pair.here)
        pair.move()
        memory[5] = ord("d")
    pair.move(frozen=True)
    pair.check()


def test_a_default_acl_leaves_no_trace_on_what_the_receiver_makes(pair: Pair) -> None:
    acl = posix_acl(owner=7, user=(1234, 6), group=5, mask=7, other=0)
    directory = pair.here / "shared"
    directory.mkdir()
    (directory / "before").write_bytes(b"")
    try:
        os.setxattr(directory, "system.posix_acl_default", acl)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("no POSIX ACLs on this file system")
    pair.move()
    (directory / "after").write_bytes(b"")
    os.removexattr(directory, "system.posix_acl_default")
    (directory / "later").write_bytes(b"")
    pair.move(frozen=True)
    pair.check()
    assert "system.posix_acl_access" in os.listxattr(pair.there / "shared" / "after")


@pytest.mark.skipif(not ROOT, reason="needs root: ownership, file capabilities")
def test_set_user_id_and_capabilities_survive_the_change_of_owner(pair: Pair) -> None:
    path = pair.here / "tool"
    path.write_bytes(b"#!")
    os.chown(path, 1000, 1000)
    capability = bytes.fromhex("0000000200040000000000000000000000000000")
    os.setxattr(path, "security.capability", capability)
    path.chmod(0o6755)
    pair.move(frozen=True)
    pair.check()
    assert os.getxattr(pair.there / "tool", "security.capability") == capability
    assert stat.S_IMODE((pair.there / "tool").stat().st_mode) == 0o6755


@pytest.mark.skipif(not ROOT, reason="needs root: trusted extended attributes")
def test_overlay_attributes_move_unless_they_are_the_nodes_own(pair: Pair) -> None:
    directory = pair.here / "directory"
    directory.mkdir()
    (pair.there).mkdir(exist_ok=True)
    for name in ("opaque", "redirect", "origin", "impure", "uuid", "nlink", "upper", "overlay.opaque"):
        os.setxattr(directory, f"trusted.overlay.{name}", b"y")
    os.setxattr(pair.there, "trusted.overlay.uuid", b"of the target's own mount")
    pair.move(frozen=True)
    moved = set(os.listxattr(pair.there / "directory"))
    assert moved == {f"trusted.overlay.{name}" for name in ("opaque", "redirect", "overlay.opaque")}
    assert os.getxattr(pair.there, "trusted.overlay.uuid") == b"of the target's own mount"


@pytest.mark.skipif(not ROOT, reason="needs root: device nodes")
def test_device_nodes_move_only_where_the_policy_says_so(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    os.mknod(here / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with TreeSource(here) as strict, pytest.raises(Refused, match="device node"):
        strict.plan()
    policy = TreePolicy(devices=True)
    with TreeSource(here, policy) as source, Receiver(there, policy) as receiver:
        move(source, receiver, frozen=True)
    assert picture(there) == picture(here)


def test_a_tree_that_is_too_deep_is_refused_by_name(pair: Pair) -> None:
    fd = os.open(pair.here, os.O_RDONLY)
    for _ in range(600):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    with pytest.raises(Refused, match="deep"):
        pair.source.plan()


def test_chunks_are_bounded(pair: Pair) -> None:
    Gardener(pair.here, random.Random(5)).work(100)
    (pair.here / "big").write_bytes(os.urandom(20 * BLOCK))
    sizes = [len(chunk) for chunk in pair.source.send(pair.source.plan())]
    assert max(sizes) <= MAX_CHUNK
    assert len(sizes) > 5


def settle(root: Path) -> None:
    """Wait until the kernel's clock has left the tick of the last change."""
    probe = os.open(root, os.O_RDONLY)
    while not all(entry.settled for entry in scan(probe).entries.values()):
        os.sched_yield()
    os.close(probe)


def posix_acl(*, owner: int, user: tuple[int, int], group: int, mask: int, other: int) -> bytes:
    """The value of system.posix_acl_*: linux/posix_acl_xattr.h."""
    undefined = 0xFFFFFFFF
    entries = [(1, owner, undefined), (2, user[1], user[0]), (4, group, undefined), (16, mask, undefined)]
    entries.append((32, other, undefined))
    value = (2).to_bytes(4, "little")
    for tag, permissions, who in entries:
        value += tag.to_bytes(2, "little") + permissions.to_bytes(2, "little") + who.to_bytes(4, "little")
    return value
