"""A share to which somebody hostile may write: nothing outside it is touched or read, whatever he puts in place of what."""

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
from test_images_share import CHAIN, OTHER, Clock, needs_root, store
from upper_tree import picture

from podferry.errors import PodferryError
from podferry.snapshotter import initialise, layout, open_share
from podferry.snapshotter.checking import check_layers
from podferry.snapshotter.collect import DAY, Collector
from podferry.snapshotter.deadlines import Guard
from podferry.snapshotter.erofs import ErofsForm
from podferry.snapshotter.faults import LayerDamaged, ShareTampered
from podferry.snapshotter.layout import FormName, LayerRecord
from podferry.snapshotter.leases import Leases
from podferry.snapshotter.posix import PosixShare
from podferry.snapshotter.prefetch import Prefetcher
from podferry.snapshotter.references import References
from podferry.snapshotter.share_report import images_report

pytestmark = pytest.mark.unit

RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)
NAME = layout.name_of(CHAIN)


class Scene:
    """A share with a layer, and something worth stealing beside it."""

    def __init__(self, base: Path) -> None:
        self.root, self.outside, self.source = base / "share", base / "outside", base / "source"
        for one in (self.root, self.outside, self.outside / "etc", self.outside / NAME):
            one.mkdir()
        for one in ("etc/shadow", f"{NAME}/layer.json", "layer.json", "victim", "manifest"):
            (self.outside / one).write_bytes(b'{"safe": 1}')
        os.mkfifo(self.outside / "pipe")
        self.source.mkdir()
        (self.source / "etc").mkdir()
        (self.source / "etc/name").write_text("value")
        (self.source / "etc/program").write_text("#!")
        (self.source / "etc/program").chmod(0o4755)
        (self.source / "link").symlink_to("etc/name")
        os.link(self.source / "etc/name", self.source / "again")
        initialise(self.root)
        self.share = open_share(self.root, guard=Guard(20.0))
        self.listener = os.open(self.outside / "pipe", os.O_RDWR | os.O_NONBLOCK)
        self.before = picture(self.outside)

    def put(self, path: str, target: Path | str) -> None:
        """A link in place of what is there."""
        place = self.root / path
        with suppress(FileNotFoundError):
            place.rename(self.root / f"was.{layout.new_token()}")
        place.symlink_to(target)

    def collect(self) -> None:
        clock = Clock()
        collector = Collector(self.share, clock, grace=0.0)
        for _ in range(4):
            with suppress(PodferryError, FileNotFoundError, FileExistsError):
                collector.collect()
            clock.now += 2 * DAY

    def check(self) -> None:
        assert picture(self.outside) == self.before
        with pytest.raises(BlockingIOError):
            os.read(self.listener, 1)
        os.close(self.listener)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.check()


# -- deleting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [layout.DOOMED, layout.STAGING, layout.TRASH])
@pytest.mark.parametrize("form", ["link", "link below", "link to a file", "deep link"])
def test_who_collects_deletes_links_and_not_what_they_point_to(scene: Scene, folder: str, form: str) -> None:
    """`doomed/x -> /` made every node that collects delete its own root file system."""
    place = scene.root / folder / f"{NAME}.x"
    if form == "link":
        place.symlink_to(scene.outside)
    elif form == "link below":
        place.mkdir()
        (place / "fs").symlink_to(scene.outside)
        (place / "up").symlink_to("../../../outside")
    elif form == "link to a file":
        place.symlink_to(scene.outside / "victim")
    else:
        (place / "a/b/c").mkdir(parents=True)
        (place / "a/b/c/d").symlink_to(scene.outside)
    scene.collect()
    assert not place.is_symlink()
    assert scene.share.names(layout.DOOMED) == []


@pytest.mark.parametrize("folder", layout.FOLDERS)
def test_a_folder_that_became_a_link_is_not_entered(scene: Scene, folder: str) -> None:
    (scene.outside / f"{NAME}.x").mkdir()
    (scene.outside / f"{NAME}.x/kept").touch()
    scene.before = picture(scene.outside)
    scene.put(folder, scene.outside)
    scene.collect()
    share, clock = scene.share, Clock()
    for attempt in (
        lambda: share.names(folder),
        lambda: share.read(f"{folder}/layer.json"),
        lambda: share.create(f"{folder}/new", b"x"),
        lambda: share.rewrite(f"{folder}/victim", b"x"),
        lambda: share.replace(f"{folder}/victim", b"x"),
        lambda: share.remove(f"{folder}/victim"),
        lambda: share.remove_tree(f"{folder}/{NAME}.x"),
        lambda: share.make(f"{folder}/new"),
        lambda: share.rename(f"{folder}/victim", "stolen"),
        lambda: share.rename(layout.MARKER, f"{folder}/given"),
        lambda: share.refresh(folder),
        lambda: share.digest(f"{folder}/victim"),
        lambda: share.copy_in(scene.source / "etc/name", f"{folder}/victim"),
    ):
        with pytest.raises(ShareTampered):
            attempt()
    for careless in (
        lambda: References(share, clock, "a", "0").heartbeat(),
        lambda: Leases(share, clock, "a").take(NAME),
        lambda: store(share, clock).find(CHAIN),
        lambda: Prefetcher(share, lambda: [CHAIN]).note(),
        lambda: images_report(share),
        lambda: list(check_layers(share)),
    ):
        with suppress(PodferryError, FileNotFoundError, FileExistsError):
            careless()


@needs_root
@pytest.mark.parametrize("folder", [layout.DOOMED, layout.STAGING])
def test_what_is_mounted_in_the_share_is_not_deleted(scene: Scene, folder: str) -> None:
    place = scene.root / folder / "x"
    place.mkdir()
    assert _libc.mount(os.fsencode(scene.outside), os.fsencode(place), None, 4096, None) == 0
    try:
        with pytest.raises(PodferryError):
            scene.share.remove_tree(f"{folder}/x")
    finally:
        _libc.umount2(os.fsencode(place), 2)


def test_a_tree_deeper_than_any_path_is_deleted(scene: Scene) -> None:
    place = scene.root / layout.DOOMED / "x"
    place.mkdir()
    at = os.open(place, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d" * 100, dir_fd=at)
        os.symlink(scene.outside, "link", dir_fd=at)
        below = os.open("d" * 100, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    scene.share.remove_tree(f"{layout.DOOMED}/x")
    assert scene.share.names(layout.DOOMED) == []


def test_a_directory_that_is_exchanged_for_a_link_while_it_is_deleted_is_not_followed(scene: Scene) -> None:
    """At every call that the deletion makes."""
    for at in itertools.count(1):
        place, bait = scene.root / layout.DOOMED / "x", scene.root / "bait"
        (place / "etc/deep").mkdir(parents=True)
        for name in ("etc/shadow", "etc/deep/victim", "victim"):
            (place / name).touch()
        bait.symlink_to(scene.outside)
        (scene.root / "bait2").symlink_to(scene.outside / "etc")
        count = 0

        def exchange(at: int = at, place: Path = place) -> None:
            nonlocal count
            count += 1
            if count == at:
                for one, other in ((place / "etc", scene.root / "bait2"), (place, scene.root / "bait")):
                    _libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), RENAME_EXCHANGE)

        with pytest.MonkeyPatch.context() as patched:
            for name in ("unlink", "open", "rmdir", "scandir", "rename", "stat", "lstat", "listdir"):
                patched.setattr(os, name, before(getattr(os, name), exchange))
            with suppress(PodferryError, FileExistsError):
                scene.share.remove_tree(f"{layout.DOOMED}/x")
        assert picture(scene.outside) == scene.before
        for left in ("bait", "bait2", f"{layout.DOOMED}/x"):
            scene.share.remove_tree(left)
        if count < at:
            assert at > 10
            return


def before(call: Callable[..., object], act: Callable[[], None]) -> Callable[..., object]:
    def wrapped(*args: object, **more: object) -> object:
        act()
        return call(*args, **more)

    return wrapped


# -- layers ------------------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("level", ["", "layer.json", "fs", "manifest", "fs/etc", "fs/etc/name"])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "device", "socket"])
def test_what_stands_in_a_layers_place_is_not_followed_or_opened(scene: Scene, level: str, kind: str) -> None:
    clock = Clock()
    one = store(scene.share, clock)
    layer = one.publish(CHAIN, scene.source)
    place = scene.root / layer.at / level
    place.rename(scene.root / "was")
    if kind == "link":
        place.symlink_to(scene.outside / level if (scene.outside / level).exists() else scene.outside)
    elif kind == "dangling":
        place.symlink_to("/nonexistent")
    else:
        mode = {"fifo": stat.S_IFIFO, "device": stat.S_IFCHR, "socket": stat.S_IFSOCK}[kind]
        os.mknod(place, mode | 0o600, os.makedev(5, 1))
    if level != layout.RECORD:
        with pytest.raises(LayerDamaged):
            one.check(layer)
    with suppress(PodferryError):
        one.find(CHAIN)
    assert one.find(CHAIN) is None
    assert [found.wrong for found in check_layers(scene.share)] == []
    one.check(one.publish(CHAIN, scene.source))


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK])
@pytest.mark.parametrize("path", [f"{layout.NODES}/a.0.json", f"{layout.LEASES}/{NAME}.1", f"{layout.UNUSED}/{NAME}"])
def test_a_record_that_is_a_fifo_is_neither_waited_for_nor_written_to(scene: Scene, path: str, kind: int) -> None:
    os.mknod(scene.root / path, kind | 0o600)
    for attempt in (scene.share.read, lambda path: scene.share.rewrite(path, b"x"), scene.share.digest):
        with pytest.raises(ShareTampered):
            attempt(path)
    scene.collect()


def test_an_image_that_is_a_link_or_fifo_is_not_opened(scene: Scene, tmp_path: Path) -> None:
    form = ErofsForm(scene.share, tmp_path)
    record = LayerRecord(CHAIN, FormName.EROFS, "0" * 64, 1, 1, "a", "00", 0.0)
    place = scene.root / layout.LAYERS / NAME
    place.mkdir()
    for make in (lambda at: at.symlink_to(scene.outside / "victim"), os.mkfifo):
        make(place / "layer.erofs")
        with pytest.raises(LayerDamaged):
            form.glance(f"{layout.LAYERS}/{NAME}", record)
        with pytest.raises(LayerDamaged):
            form.check(f"{layout.LAYERS}/{NAME}", record)
        (place / "layer.erofs").unlink()


@needs_root
@pytest.mark.parametrize("name", ["fs", "fs/etc", "fs/etc/name", "fs/etc/program", "fs/link", ""])
def test_what_is_exchanged_while_a_layer_is_published_is_not_followed(scene: Scene, name: str) -> None:
    """chown, chmod and the others work on what was made, at whatever moment a link takes its name."""
    (scene.outside / "name").write_text("safe")
    (scene.outside / "program").write_text("safe")
    scene.before = picture(scene.outside)
    over = threading.Event()
    baits = itertools.cycle([scene.outside, scene.outside / "victim", scene.outside / "pipe"])
    bait = scene.root / "bait"

    def exchange() -> None:
        while not over.is_set():
            bait.symlink_to(next(baits))
            for stage in list((scene.root / layout.STAGING).iterdir()):
                for _ in range(2):
                    _libc.renameat2(-100, os.fsencode(stage / name), -100, os.fsencode(bait), RENAME_EXCHANGE)
            if bait.is_symlink():
                bait.unlink()
            else:
                bait.rename(scene.root / f"was.{layout.new_token()}")

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for number in range(12):
            with suppress(PodferryError, FileExistsError, FileNotFoundError):
                store(scene.share, Clock(), f"n{number}").publish(OTHER if number % 2 else CHAIN, scene.source)
            with suppress(PodferryError, FileExistsError, FileNotFoundError):
                scene.share.remove_tree(f"{layout.LAYERS}/{NAME}")
    finally:
        over.set()
        thread.join()


def test_a_folder_with_more_names_than_any_is_not_listed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("podferry.snapshotter.posix.MOST_NAMES", 10)
    for number in range(11):
        (scene.root / layout.LAYERS / str(number)).touch()
    with pytest.raises(PodferryError, match="more than 10 names"):
        scene.share.names(layout.LAYERS)


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_marker_that_is_no_file_makes_no_share(scene: Scene, kind: str) -> None:
    marker = scene.root / layout.MARKER
    marker.rename(scene.outside.with_name("marker"))
    marker.symlink_to(scene.outside.with_name("marker")) if kind == "link" else os.mkfifo(marker)
    with pytest.raises(PodferryError):
        open_share(scene.root, guard=Guard(5.0))
    with pytest.raises(PodferryError):
        initialise(scene.root)
    share = PosixShare(scene.root, scene.share.id, Guard(5.0))
    with pytest.raises(PodferryError):
        share.names(layout.LAYERS)
