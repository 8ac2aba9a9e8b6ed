"""A hostile source: whatever it sends, nothing outside the target's tree is touched, and the receiver says so."""

from __future__ import annotations

import os
import random
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from upper_tree import Gardener, picture

from podferry.errors import Failed, PeerMisbehaved
from podferry.node.upper import MAX_CHUNK, Entry, Receiver, Summary, TreePolicy, TreeSource
from podferry.node.upper import tree_records as records
from podferry.node.upper.tree_records import How, Record

pytestmark = pytest.mark.unit


def entry(kind: int, **changes: object) -> Entry:
    plain = Entry(kind, 0o644, os.geteuid(), os.getegid(), 1, 2, 1, 0, 0, 0, 0, 0, 0, b"", (), True)
    return plain._replace(**changes)  # type: ignore[arg-type]


def directory(path: bytes) -> Record:
    return records.make(path, entry(stat.S_IFDIR))


def symlink(path: bytes, target: bytes) -> Record:
    return records.make(path, entry(stat.S_IFLNK, target=target))


class Prey:
    """A target tree with something worth stealing beside it."""

    def __init__(self, base: Path) -> None:
        self.base, self.root = base, base / "tree"
        self.outside = base / "outside"
        self.outside.mkdir()
        (self.outside / "secret").write_bytes(b"secret")
        (self.outside / "empty").mkdir()
        self.root.mkdir()
        self.before = self.look()
        self.receiver = Receiver(self.root)

    def look(self) -> object:
        return picture(self.outside), sorted(path.name for path in self.base.iterdir())

    def feed(self, *told: Record) -> None:
        self.receiver.feed(b"".join(part for record in (records.begin(fresh=True), *told) for part in record))

    def check(self) -> None:
        self.receiver.close()
        assert self.look() == self.before


@pytest.fixture
def prey(tmp_path: Path) -> Iterator[Prey]:
    prey = Prey(tmp_path)
    yield prey
    prey.check()


BAD_PATHS = [
    b"",
    b"/etc/passwd",
    b"..",
    b".",
    b"a/../../outside/secret",
    b"../outside/secret",
    b"a//b",
    b"a/",
    b"a/./b",
    b"nul\0byte",
    b"n" * 256,
    b"/".join([b"d"] * 600),
    b"x/" * 2047 + b"xx",
]

SAYINGS: dict[str, Callable[[bytes], Record]] = {
    "make": directory,
    "file": lambda path: records.file(path, How.CREATE, 0),
    "patch": lambda path: records.file(path, How.PATCH, 0),
    "remove": records.remove,
    "park": lambda path: records.park(path, 0),
    "link": lambda path: records.link(path, b"a/file"),
    "leader": lambda path: records.link(b"new", path),
    "attributes": lambda path: records.attributes(path or b"missing", entry(stat.S_IFREG)),
}


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda path: repr(path[:12]))
@pytest.mark.parametrize("say", SAYINGS.values(), ids=SAYINGS)
def test_a_path_that_is_not_plain_names_is_refused(prey: Prey, path: bytes, say: Callable[[bytes], Record]) -> None:
    prey.feed(directory(b"a"), records.file(b"a/file", How.CREATE, 0))
    with pytest.raises(PeerMisbehaved):
        prey.receiver.feed(b"".join(say(path)))


@pytest.mark.parametrize("target", [b"../outside", b"/", b"/proc/self/cwd", b"."])
@pytest.mark.parametrize("say", SAYINGS.values(), ids=SAYINGS)
def test_no_path_goes_through_a_symbolic_link(prey: Prey, target: bytes, say: Callable[[bytes], Record]) -> None:
    prey.feed(directory(b"a"), records.file(b"a/file", How.CREATE, 0), symlink(b"a/out", target))
    with pytest.raises(PeerMisbehaved):
        prey.receiver.feed(b"".join(say(b"a/out/secret")))


def test_a_link_itself_is_never_followed(prey: Prey) -> None:
    prey.feed(
        symlink(b"out", b"../outside/secret"),
        records.attributes(b"out", entry(stat.S_IFLNK, mode=0o777, mtime_ns=5)),
        records.link(b"same", b"out"),
        records.remove(b"out"),
    )
    assert (prey.root / "same").is_symlink()
    for how in How:
        with pytest.raises(PeerMisbehaved), Receiver(prey.root) as receiver:
            receiver.feed(b"".join(records.begin(fresh=False) + records.file(b"same", how, 1)))


def test_a_directory_that_became_a_symbolic_link_is_not_entered(prey: Prey) -> None:
    """The receiver keeps the last directory open; it must not outlive its removal under the same name."""
    prey.feed(directory(b"d"), directory(b"d/e"), records.file(b"d/e/f", How.CREATE, 0))
    with pytest.raises(PeerMisbehaved):
        prey.receiver.feed(
            b"".join(
                part
                for record in (
                    records.remove(b"d/e"),
                    symlink(b"d/e", b"../../outside"),
                    records.file(b"d/e/secret", How.PATCH, 0),
                )
                for part in record
            )
        )


SENSELESS: dict[str, list[Record]] = {
    "content without a file": [records.data(0, b"x")],
    "a hole without a file": [records.hole(0, 1)],
    "content past the end": [records.file(b"f", How.CREATE, 3), records.data(2, b"xx")],
    "content far past the end": [records.file(b"f", How.CREATE, 3), records.data(2**64 - 1, b"xx")],
    "a hole past the end": [records.file(b"f", How.CREATE, 3), records.hole(0, 4)],
    "an impossible size": [records.file(b"f", How.CREATE, 2**63)],
    "a file twice": [records.file(b"f", How.CREATE, 0), records.file(b"f", How.CREATE, 0)],
    "content for a FIFO": [records.make(b"p", entry(stat.S_IFIFO)), records.file(b"p", How.PATCH, 0)],
    "content for a directory": [directory(b"d"), records.file(b"d", How.PATCH, 0)],
    "a directory twice": [directory(b"d"), directory(b"d")],
    "a link to a directory": [directory(b"d"), records.link(b"e", b"d")],
    "a link to nothing": [records.link(b"e", b"d")],
    "a child of a file": [records.file(b"f", How.CREATE, 0), directory(b"f/d")],
    "nothing to remove": [records.remove(b"f")],
    "a parked directory": [directory(b"d"), records.park(b"d", 0)],
    "an empty slot": [records.unpark(0, b"f")],
    "a slot twice": [
        records.file(b"f", How.CREATE, 0),
        records.file(b"g", How.CREATE, 0),
        records.park(b"f", 0),
        records.park(b"g", 0),
    ],
    "an end with something parked": [
        records.file(b"f", How.CREATE, 0),
        records.park(b"f", 0),
        records.end(Summary(0, 0, "00" * 16)),
    ],
    "wrong totals": [records.end(Summary(1, 0, "00" * 16))],
    "a device": [records.make(b"null", entry(stat.S_IFCHR, rdev=os.makedev(1, 3)))],
    "a disk": [records.make(b"disk", entry(stat.S_IFBLK, rdev=0))],
    "an unknown kind": [records.make(b"x", entry(0))],
    "a regular file without content": [records.make(b"x", entry(stat.S_IFREG))],
    "a symbolic link to nowhere": [symlink(b"x", b"")],
    "a symbolic link with a NUL": [symlink(b"x", b"a\0b")],
    "a FIFO with a target": [records.make(b"x", entry(stat.S_IFIFO, target=b"x"))],
    "a begin in a pass": [records.begin(fresh=True)],
    "a wild mode": [directory(b"d"), records.attributes(b"d", entry(stat.S_IFDIR, mode=0o100000))],
    "no owner": [directory(b"d"), records.attributes(b"d", entry(stat.S_IFDIR, uid=0xFFFFFFFF))],
    "a label": [directory(b"d"), records.attributes(b"d", entry(stat.S_IFDIR, xattrs=(("security.selinux", b"x"),)))],
    "an origin": [
        directory(b"d"),
        records.attributes(b"d", entry(stat.S_IFDIR, xattrs=(("trusted.overlay.origin", b"x"),))),
    ],
    "attributes of nothing": [records.attributes(b"d", entry(stat.S_IFDIR))],
}


@pytest.mark.parametrize("told", SENSELESS.values(), ids=SENSELESS)
def test_what_makes_no_sense_is_refused(prey: Prey, told: list[Record]) -> None:
    with pytest.raises(PeerMisbehaved):
        prey.feed(*told)
    with pytest.raises(Failed):
        prey.receiver.feed(b"".join(records.begin(fresh=True)))
    with pytest.raises(PeerMisbehaved):
        prey.receiver.finish()


@pytest.mark.parametrize(
    "chunk",
    [b"\x01", b"\x63\0\0\0\0", b"\x01\xff\0\0\0\x01", bytes(MAX_CHUNK + 1), b"\x01\0\0\0\0", b"\x01\x02\0\0\0\x63\x01"],
)
def test_what_has_not_the_form_of_records_is_refused(prey: Prey, chunk: bytes) -> None:
    with pytest.raises(PeerMisbehaved):
        prey.receiver.feed(chunk)


def test_nothing_counts_outside_a_pass(prey: Prey) -> None:
    with pytest.raises(PeerMisbehaved):
        prey.receiver.feed(b"".join(directory(b"d")))
    assert list(prey.root.iterdir()) == []


def test_a_pass_without_an_end_is_no_pass(prey: Prey) -> None:
    prey.feed(directory(b"d"))
    with pytest.raises(PeerMisbehaved, match="no end"):
        prey.receiver.finish()


def test_content_beyond_what_was_agreed_is_refused(tmp_path: Path) -> None:
    with Receiver(tmp_path, TreePolicy(max_bytes=10)) as receiver:
        receiver.feed(b"".join(records.begin(fresh=True) + records.file(b"f", How.CREATE, 100)))
        receiver.feed(b"".join(records.data(0, b"0123456789")))
        with pytest.raises(PeerMisbehaved, match="agreed"):
            receiver.feed(b"".join(records.data(10, b"0")))


@pytest.mark.parametrize("what", ["files", "directories", "links", "parked"])
def test_no_pass_makes_more_entries_than_may_move(what: str, tmp_path: Path) -> None:
    """None of them has attributes, or an end, so that no total is claimed: each costs an inode, and memory."""
    with Receiver(tmp_path, TreePolicy(max_entries=20)) as receiver:
        receiver.feed(b"".join(records.begin(fresh=True) + directory(b"d") + records.file(b"f", How.CREATE, 0)))
        one: Callable[[int], Record] = {
            "files": lambda n: records.file(b"d/%d" % n, How.CREATE, 0),
            "directories": lambda n: directory(b"d/%d" % n),
            "links": lambda n: records.link(b"d/%d" % n, b"f"),
            "parked": lambda n: records.park(b"f", n) + records.unpark(n, b"f"),
        }[what]
        for number in range(18):
            receiver.feed(b"".join(one(number)))
        with pytest.raises(PeerMisbehaved, match="one pass may make"):
            receiver.feed(b"".join(one(18)))
    assert sum(1 for _ in tmp_path.rglob("*")) <= 20


def test_a_full_disk_is_not_the_sources_fault(prey: Prey, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Failed) as caught:
        prey.feed(records.file(b"f", How.CREATE, 3), records.data(0, b"abc"))
    assert not isinstance(caught.value, PeerMisbehaved)
    assert "free space" in caught.value.remedy


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 6))
def test_a_corrupted_stream_ends_in_an_error_and_touches_nothing_else(seed: int, flips: int) -> None:
    rng = random.Random(seed)
    open_before = open_descriptors()
    with tempfile.TemporaryDirectory() as base:
        prey = Prey(Path(base))
        here = prey.base / "outside" / "empty"
        Gardener(here, rng).work(20)
        prey.before = prey.look()
        with TreeSource(here) as source:
            stream = [bytearray(chunk) for chunk in source.send(source.plan())]
        for _ in range(flips):
            chunk = rng.choice(stream)
            chunk[rng.randrange(len(chunk))] = rng.randrange(256)
        changed = rng.random() < 0.5 and len(stream) > 2
        if changed:
            rng.shuffle(stream)
        try:
            for chunk in stream:
                prey.receiver.feed(bytes(chunk))
            assert prey.receiver.finish() == source.summary
        except (PeerMisbehaved, Failed):
            pass
        prey.check()
        for path in [prey.root, *prey.root.rglob("*")]:
            if not path.is_symlink() and path.is_dir():
                path.chmod(0o700)
    assert open_descriptors() == open_before


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
