"""Somebody on the target writes to the tree while it arrives: he may spoil it, but nothing outside it is touched through it."""

from __future__ import annotations

import ctypes
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from upper_tree import picture

from podferry.errors import Failed, PeerMisbehaved
from podferry.fs import beneath
from podferry.node.upper import Entry, Receiver
from podferry.node.upper import receive as receiving
from podferry.node.upper import tree_records as records
from podferry.node.upper.tree_records import How, Record

pytestmark = pytest.mark.unit

RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)


def exchange(one: Path, other: Path) -> None:
    """Each takes the other's name at once; nothing happens while one of them is missing."""
    _libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), RENAME_EXCHANGE)


def entry(kind: int, mode: int) -> Entry:
    return Entry(
        kind=kind,
        mode=mode,
        uid=os.geteuid(),
        gid=os.getegid(),
        dev=1,
        ino=2,
        nlink=1,
        size=0,
        allocated=0,
        rdev=0,
        atime_ns=7,
        mtime_ns=7,
        ctime_ns=7,
        target=b"../outside/file" if kind == stat.S_IFLNK else b"",
        xattrs=(("user.mark", b"x"),) if kind in (stat.S_IFREG, stat.S_IFDIR) else (),
        settled=True,
    )


FILE, DIRECTORY, PIPE, LINK = (
    entry(stat.S_IFREG, 0o4777),
    entry(stat.S_IFDIR, 0o1777),
    entry(stat.S_IFIFO, 0o666),
    entry(stat.S_IFLNK, 0o777),
)

PASSES: list[list[Record]] = [
    [
        records.begin(fresh=True),
        records.file(b"a", How.CREATE, 6),
        records.data(0, b"seized"),
        records.attributes(b"a", FILE),
        records.make(b"d", DIRECTORY),
        records.file(b"d/a", How.CREATE, 6),
        records.data(0, b"seized"),
        records.attributes(b"d/a", FILE),
        records.make(b"p", PIPE),
        records.attributes(b"p", PIPE),
        records.make(b"l", LINK),
        records.attributes(b"l", LINK),
        records.link(b"d/b", b"a"),
        records.attributes(b"d", DIRECTORY),
        records.attributes(b"", DIRECTORY),
    ],
    [
        records.begin(fresh=False),
        records.park(b"l", 0),
        records.unpark(0, b"d/l"),
        records.attributes(b"d/l", LINK),
        records.file(b"a", How.PATCH, 6),
        records.hole(0, 3),
        records.data(3, b"zed"),
        records.attributes(b"a", FILE),
        records.file(b"d/a", How.DISCARD, 6),
        records.data(0, b"seized"),
        records.attributes(b"d/a", FILE),
        records.attributes(b"p", PIPE),
        records.attributes(b"d", DIRECTORY),
        records.remove(b"d"),
    ],
]
NAMES = ("a", "d", "p", "l", "d/a", "d/b", "d/l")

BAITS: dict[str, Callable[[Path, Path], None]] = {
    "link to a file": lambda bait, outside: bait.symlink_to(outside / "file"),
    "link to a directory": lambda bait, outside: bait.symlink_to(outside),
    "link to a device": lambda bait, outside: bait.symlink_to(outside / "device"),
    "link to a pipe": lambda bait, outside: bait.symlink_to(outside / "pipe"),
    "file of two names": lambda bait, outside: os.link(outside / "file", bait),
    "pipe of two names": lambda bait, outside: os.link(outside / "pipe", bait),
    "device of two names": lambda bait, outside: os.link(outside / "device", bait),
}
if os.geteuid() != 0:
    del BAITS["link to a device"], BAITS["device of two names"]


class Scene:
    """A tree that arrives, what lies outside, and a bait on the same file system."""

    def __init__(self, base: Path, lay: Callable[[Path, Path], None]) -> None:
        self.tree, self.outside, self.bait = base / "tree", base / "outside", base / "bait"
        self.outside.mkdir()
        self.tree.mkdir()
        (self.outside / "file").write_bytes(b"safe")
        (self.outside / "file").chmod(0o600)
        os.mkfifo(self.outside / "pipe", 0o600)
        for name in ("a", "b", "l"):
            (self.outside / name).write_bytes(b"safe")
        if os.geteuid() == 0:
            os.mknod(self.outside / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        lay(self.bait, self.outside)
        self.listener = os.open(self.outside / "pipe", os.O_RDWR | os.O_NONBLOCK)
        self.before = picture(self.outside)

    def receive(self) -> None:
        with suppress(PeerMisbehaved, Failed), Receiver(self.tree) as receiver:
            for told in PASSES:
                for record in told:
                    receiver.feed(b"".join(record))
                receiver._in_pass = False  # its END would need a digest

    def check(self) -> None:
        assert picture(self.outside) == self.before
        with pytest.raises(BlockingIOError):
            os.read(self.listener, 1)
        os.close(self.listener)


class Seams:
    """Calls `act` just before the system call number `at` of the receiver; counts them all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> None:
        self.count, self.at, self.act, self.within = 0, at, act, False
        for name in ("chown", "chmod", "utime", "setxattr", "listxattr", "removexattr", "open", "stat", "fstat"):
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))
        for name in (
            "unlink",
            "rename",
            "link",
            "mkdir",
            "rmdir",
            "symlink",
            "mknod",
            "pwrite",
            "ftruncate",
            "scandir",
        ):
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))
        for module in (receiving, beneath):
            monkeypatch.setattr(module, "open_beneath", self._wrapped(module.open_beneath))

    def _wrapped(self, call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **more: object) -> object:
            if not self.within:
                self.count += 1
                if self.count == self.at:
                    self.within = True
                    self.act()
                    self.within = False
            return call(*args, **more)

        return wrapped


@pytest.mark.parametrize("lay", BAITS.values(), ids=BAITS)
@pytest.mark.parametrize("name", NAMES)
def test_an_entry_exchanged_between_any_two_calls_is_not_followed(
    tmp_path: Path, lay: Callable[[Path, Path], None], name: str
) -> None:
    for at in itertools.count(1):
        base = tmp_path / str(at)
        base.mkdir()
        scene = Scene(base, lay)
        with pytest.MonkeyPatch.context() as patched:
            seams = Seams(patched, at, lambda scene=scene: exchange(scene.tree / name, scene.bait))  # type: ignore[misc]
            scene.receive()
        scene.check()
        if seams.count < at:
            assert at > 50
            return


@pytest.fixture(params=["link to a file", "link to a directory", "file of two names", "pipe of two names"])
def restless(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    scene, over = Scene(tmp_path, BAITS[request.param]), threading.Event()

    def exchange_on() -> None:
        while not over.is_set():
            for name in ("a", "p", "d"):
                exchange(scene.tree / name, scene.bait)
                exchange(scene.tree / name, scene.bait)

    thread = threading.Thread(target=exchange_on)
    thread.start()
    yield scene
    over.set()
    thread.join()
    scene.check()


def test_a_thread_that_exchanges_entries_all_the_time_gets_nothing_outside_touched(restless: Scene) -> None:
    for _ in range(400):
        restless.receive()


def test_a_deep_and_wide_tree_goes_with_few_descriptors(tmp_path: Path) -> None:
    at = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):  # deeper than a path can say, and than descriptors there are
        os.mkdir("d", dir_fd=at)
        os.close(os.open("f", os.O_CREAT, 0o600, dir_fd=at))
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    for number in range(2500):
        (tmp_path / "d" / str(number)).touch()
    with Receiver(tmp_path) as receiver:
        receiver.feed(b"".join(records.begin(fresh=True)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts")
def test_what_is_mounted_in_the_tree_is_not_emptied(tmp_path: Path) -> None:
    tree, other = tmp_path / "tree", tmp_path / "other"
    (tree / "d").mkdir(parents=True)
    other.mkdir()
    (other / "kept").touch()
    assert _libc.mount(os.fsencode(other), os.fsencode(tree / "d"), None, 4096, None) == 0  # MS_BIND
    try:
        with pytest.raises(PeerMisbehaved), Receiver(tree) as receiver:
            receiver.feed(b"".join(records.begin(fresh=True)))
    finally:
        _libc.umount2(os.fsencode(tree / "d"), 2)
    assert (other / "kept").exists()
