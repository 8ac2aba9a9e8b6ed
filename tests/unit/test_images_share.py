"""A share as a directory: opening, what is refused, both ends of damage. The tests need no mount and no root."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from podferry.errors import PodferryError, UsageError
from podferry.snapshotter import forget, images_report, initialise, layout, open_share
from podferry.snapshotter.checking import check_layers
from podferry.snapshotter.collect import DAY, Collector
from podferry.snapshotter.deadlines import Guard
from podferry.snapshotter.faults import (
    LayerDamaged,
    LayerMissing,
    LayerUnfit,
    ShareFull,
    ShareRefused,
    ShareUnavailable,
)
from podferry.snapshotter.layer_ports import Payload
from podferry.snapshotter.layout import FormName, LayerRecord
from podferry.snapshotter.leases import Lease, Leases, Taken
from podferry.snapshotter.posix import PosixShare
from podferry.snapshotter.references import References, all_nodes
from podferry.snapshotter.store import Layer, LayerStore
from podferry.snapshotter.tree import TreeForm, walk

pytestmark = pytest.mark.unit

CHAIN = "sha256:" + "c" * 64
OTHER = "sha256:" + "d" * 64
ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="needs root: layers keep owners and device numbers")


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    def pause(self, seconds: float, stop: threading.Event | None = None) -> bool:
        self.now += seconds
        return False


@pytest.fixture
def where(tmp_path: Path) -> Path:
    path = tmp_path / "share"
    path.mkdir()
    initialise(path)
    return path


@pytest.fixture
def share(where: Path) -> PosixShare:
    return open_share(where, guard=Guard(20.0))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def store(share: PosixShare, clock: Clock, node: str = "a", *, read_only: bool = False) -> LayerStore:
    return LayerStore(
        share,
        clock,
        References(share, clock, node, "0"),
        Leases(share, clock, node, 30.0),
        forms={FormName.DIR: TreeForm(share)},
        form=FormName.DIR,
        read_only=read_only,
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    (path / "etc").mkdir(parents=True)
    (path / "etc/name").write_text("value")
    (path / "absolute").symlink_to("/etc/passwd")
    (path / "upwards").symlink_to("../../../../etc/passwd")
    return path


# -- opening -----------------------------------------------------------------------------------------------------------


def contents(path: Path) -> list[str]:
    return sorted(str(one.relative_to(path)) for one in path.rglob("*"))


def test_somebody_elses_files_are_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for call in (open_share, initialise):
        with pytest.raises(ShareRefused):
            call(tmp_path)
    with pytest.raises(ShareRefused, match=r"thesis\.tex"):
        open_share(tmp_path)
    assert contents(tmp_path) == ["thesis.tex"]


def test_an_empty_mount_point_is_not_taken_for_a_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("podferry.snapshotter.opening._mounted_kind", lambda root: None)
    with pytest.raises(ShareRefused, match="nothing is mounted"):
        open_share(tmp_path)
    assert contents(tmp_path) == []


def test_an_object_store_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("podferry.snapshotter.opening._mounted_kind", lambda root: "fuse.s3fs")
    with pytest.raises(ShareRefused, match=r"fuse\.s3fs renames by copying"):
        open_share(tmp_path)
    assert contents(tmp_path) == []


def test_a_share_without_atomic_rename_is_refused(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_copying(self: PosixShare, old: str, new: str) -> None:
        if self.names(new):
            raise FileExistsError(new)
        self.path(new).mkdir(exist_ok=True)
        for name in self.names(old):
            self.path(f"{old}/{name}").rename(self.path(f"{new}/{name}"))
            threading.Event().wait(0.002)
        self.path(old).rmdir()

    monkeypatch.setattr(PosixShare, "rename", by_copying)
    with pytest.raises(ShareRefused, match="seen half"):
        open_share(where)
    assert not list((where / layout.STAGING).iterdir())


def test_a_share_that_creates_a_name_twice_is_refused(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PosixShare, "create", lambda self, path, data: self.path(path).write_bytes(data))
    with pytest.raises(ShareRefused, match="O_EXCL"):
        open_share(where)


@pytest.mark.parametrize("lost", layout.FOLDERS)
def test_a_folder_that_two_nodes_made_at_once_is_made_again(
    where: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """GlusterFS tells both that it exists and takes it back: seen on a slow machine, where the second lab's nodes start at once."""
    taken_back: list[str] = []
    make = PosixShare.make

    def make_at_once(self: PosixShare, path: str) -> None:
        if path == lost and not taken_back:
            taken_back.append(path)
            raise FileExistsError(path)
        make(self, path)

    monkeypatch.setattr(PosixShare, "make", make_at_once)
    open_share(where)
    assert taken_back
    assert (where / lost).is_dir()


def test_a_folder_that_never_appears_is_named(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(self: PosixShare, path: str) -> None:
        raise FileExistsError(path)

    monkeypatch.setattr(PosixShare, "make", make)
    with pytest.raises(ShareUnavailable, match="cannot make the folder layers"):
        open_share(where)


def test_another_formats_share_is_refused(where: Path) -> None:
    (where / layout.MARKER).write_text(json.dumps({"format": 99, "id": "x"}))
    with pytest.raises(ShareRefused, match="format 99"):
        open_share(where)


def test_a_share_that_was_unmounted_or_swapped_is_noticed_and_its_return_too(where: Path, share: PosixShare) -> None:
    away = where.with_name("away")
    where.rename(away)
    with pytest.raises(ShareUnavailable, match="nothing, or something else"):
        share.names(layout.LAYERS)
    where.mkdir()
    initialise(where)
    share.device = -1  # another file system has another number; here both are directories of one
    with pytest.raises(ShareUnavailable, match="it holds the share"):
        share.names(layout.LAYERS)
    where.rename(where.with_name("other"))
    away.rename(where)
    assert share.names(layout.LAYERS) == []


def test_two_nodes_that_make_a_share_at_once_make_one(tmp_path: Path) -> None:
    ids: list[str] = []
    threads = [threading.Thread(target=lambda: ids.append(initialise(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1
    assert contents(tmp_path) == [layout.MARKER]


@pytest.mark.parametrize("path", ["../x", "/x", "layers/../../x", "a/.."])
def test_no_path_leaves_the_share(share: PosixShare, path: str) -> None:
    with pytest.raises(ValueError, match="not a path on the share"):
        share.read(path)


@pytest.mark.parametrize(
    "chain", ["", "sha256:", "sha256:" + "g" * 64, "sha256:" + "a" * 63, "../" + "a" * 64, "md5:" + "a" * 64]
)
def test_what_is_no_chain_id_names_no_file(chain: str) -> None:
    with pytest.raises(UsageError):
        layout.name_of(chain)


# -- layers ------------------------------------------------------------------------------------------------------------


@needs_root
def test_a_layer_is_published_once_and_found_by_others(share: PosixShare, clock: Clock, source: Path) -> None:
    first, second = store(share, clock), store(share, clock, "b")
    assert isinstance(first.claim(CHAIN), Lease)
    assert second.claim(CHAIN) == Taken("a")
    made = first.publish(CHAIN, source)
    assert second.claim(CHAIN) == made
    assert second.publish(CHAIN, source) == made
    assert share.names(layout.STAGING) == []
    assert {record.node: record.layers for record in all_nodes(share).values()} == {"a": {CHAIN}, "b": {CHAIN}}
    files = share.path(f"{made.at}/fs")
    assert (files / "etc/name").read_text() == "value"
    assert (files / "absolute").readlink() == Path("/etc/passwd")
    assert (files / "upwards").readlink() == Path("../../../../etc/passwd")


@needs_root
@pytest.mark.parametrize("hurt", ["content", "mode", "owner", "missing", "more", "link", "manifest"])
def test_a_damaged_layer_is_named_set_aside_and_made_again(
    share: PosixShare, clock: Clock, source: Path, hurt: str
) -> None:
    one = store(share, clock)
    layer = one.publish(CHAIN, source)
    files = share.path(f"{layer.at}/fs")
    match hurt:
        case "content":
            os.truncate(files / "etc/name", 5)
            about = (files / "etc/name").stat()
            (files / "etc/name").write_text("VALUE")
            os.utime(files / "etc/name", ns=(about.st_atime_ns, about.st_mtime_ns))
        case "mode":
            (files / "etc/name").chmod(0o777)
        case "owner":
            os.chown(files / "etc/name", 1, 1)
        case "missing":
            (files / "upwards").unlink()
        case "more":
            (files / "etc/zzz").touch()
        case "link":
            (files / "absolute").unlink()
            (files / "absolute").symlink_to("/etc/shadow")
        case "manifest":
            share.path(f"{layer.at}/manifest").write_text("")
    with pytest.raises(LayerDamaged, match=CHAIN):
        one.check(layer)
    assert len(share.names(layout.DAMAGED)) == 1
    assert one.find(CHAIN) is None
    one.check(one.publish(CHAIN, source))


@needs_root
@pytest.mark.parametrize("hurt", ["content", "manifest gone", "files gone", "record"])
def test_layers_are_read_whole_and_damaged_ones_set_aside(
    share: PosixShare, clock: Clock, source: Path, hurt: str
) -> None:
    one = store(share, clock)
    for chain in (CHAIN, OTHER):
        one.publish(chain, source)
    assert [(found.chain, found.wrong) for found in check_layers(share)] == [(CHAIN, ""), (OTHER, "")]
    at = share.path(f"{layout.LAYERS}/{layout.name_of(OTHER)}")
    match hurt:
        case "content":
            (at / "fs/etc/name").write_text("VALUE")
        case "manifest gone":
            (at / "manifest").unlink()
        case "files gone":
            (at / "fs").rename(at / "elsewhere")
        case "record":
            (at / layout.RECORD).write_bytes(b"{")
    whole, damaged = check_layers(share)
    assert (whole.chain, whole.wrong, damaged.chain) == (CHAIN, "", OTHER)
    assert damaged.wrong
    assert share.path(damaged.aside).is_dir()
    assert share.names(layout.LAYERS) == [layout.name_of(CHAIN)]
    one.publish(OTHER, source)
    assert [found.wrong for found in check_layers(share)] == ["", ""]


@needs_root
@pytest.mark.parametrize("again", [True, False])
def test_a_layer_that_goes_while_it_is_read_is_not_called_damaged(
    share: PosixShare, clock: Clock, source: Path, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed by the collector, or set aside by somebody else and made again."""
    one = store(share, clock)
    one.publish(CHAIN, source)
    check = TreeForm.check

    def meanwhile(form: TreeForm, at: str, record: Any) -> None:
        share.path(f"{at}/manifest").unlink()
        one.set_aside(CHAIN)
        if again:
            monkeypatch.undo()
            one.publish(CHAIN, source)
            raise LayerDamaged("what was there before")
        check(form, at, record)

    monkeypatch.setattr(TreeForm, "check", meanwhile)
    assert list(check_layers(share)) == []
    assert len(share.names(layout.LAYERS)) == again
    assert len(share.names(layout.DAMAGED)) == 1


@needs_root
@pytest.mark.parametrize("record", [b"", b"{", b"[]", b"{}", b'{"chain": 5}', b"\xff\xfe"])
def test_a_record_that_cannot_be_read_is_a_damaged_layer(
    share: PosixShare, clock: Clock, source: Path, record: bytes
) -> None:
    one = store(share, clock)
    layer = one.publish(CHAIN, source)
    share.path(f"{layer.at}/{layout.RECORD}").write_bytes(record)
    assert one.find(CHAIN) is None
    assert len(share.names(layout.DAMAGED)) == 1
    with pytest.raises(LayerMissing) as caught:
        one.need(CHAIN)
    assert "pull" in caught.value.remedy


@needs_root
def test_a_layer_under_anothers_name_is_not_believed(share: PosixShare, clock: Clock, source: Path) -> None:
    one = store(share, clock)
    layer = one.publish(CHAIN, source)
    share.rename(layer.at, f"{layout.LAYERS}/{layout.name_of(OTHER)}")
    assert one.find(OTHER) is None


@needs_root
@pytest.mark.parametrize("bad", ["device", "block", "socket"])
def test_what_must_not_be_shared_is_named(share: PosixShare, clock: Clock, source: Path, bad: str) -> None:
    kind = {"device": stat.S_IFCHR, "block": stat.S_IFBLK, "socket": stat.S_IFSOCK}[bad]
    os.mknod(source / "etc/evil", kind | 0o666, os.makedev(1, 1) if bad != "socket" else 0)
    with pytest.raises(LayerUnfit, match="etc/evil"):
        store(share, clock).publish(CHAIN, source)
    for folder in (layout.LAYERS, layout.STAGING, layout.DOOMED):
        assert share.names(folder) == []


@needs_root
@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
def test_device_nodes_that_every_containers_own_dev_hides_are_shared(
    share: PosixShare, clock: Clock, source: Path, kind: int
) -> None:
    (source / "dev").mkdir()
    os.mknod(source / "dev/console", kind | 0o600, os.makedev(5, 1))
    one = store(share, clock)
    layer = one.publish(CHAIN, source)
    files = share.path(f"{layer.at}/fs")
    there = files / "dev/console"
    assert there.lstat().st_rdev == os.makedev(5, 1)
    one.check(layer)
    there.unlink()
    os.mknod(there, kind | 0o600, os.makedev(8, 0))
    for name in ("dev/console", "dev"):
        os.utime(files / name, ns=((source / name).stat().st_mtime_ns,) * 2)
    with pytest.raises(LayerDamaged, match="dev/console"):
        one.check(layer)


@needs_root
def test_whiteouts_and_opaque_directories_come_through(share: PosixShare, clock: Clock, source: Path) -> None:
    os.mknod(source / "gone", stat.S_IFCHR, 0)
    os.setxattr(source / "etc", "trusted.overlay.opaque", b"y")
    os.setxattr(source / "etc", "trusted.overlay.origin", b"this node's own note")
    layer = store(share, clock).publish(CHAIN, source)
    files = share.path(f"{layer.at}/fs")
    assert stat.S_ISCHR((files / "gone").lstat().st_mode)
    assert os.listxattr(files / "etc") == ["trusted.overlay.opaque"]


@needs_root
def test_a_share_that_takes_no_attributes_is_told_apart(
    share: PosixShare, clock: Clock, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.setxattr(source / "etc", "trusted.overlay.opaque", b"y")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    with pytest.raises(LayerUnfit) as caught:
        store(share, clock).publish(CHAIN, source)
    assert "erofs" in caught.value.remedy
    assert share.names(layout.LAYERS) == []


class Interrupted(Exception):
    pass


@needs_root
def test_nothing_half_is_seen_whatever_step_fails(share: PosixShare, clock: Clock, source: Path) -> None:
    """Every interrupted prefix of a publication, as an error and as a crash; then another node completes it."""
    steps = 0
    call = share.call

    def failing_at(step: int, error: Exception):  # type: ignore[no-untyped-def]
        count = 0

        def wrapped(what, function, deadline=None):  # type: ignore[no-untyped-def]
            nonlocal count, steps
            count += 1
            steps = max(steps, count)
            if count == step or (count > step and isinstance(error, Interrupted)):
                raise error
            return call(what, function, deadline)

        return wrapped

    share.call = failing_at(10**9, Interrupted())  # type: ignore[method-assign]
    store(share, clock).publish(CHAIN, source)
    total = steps
    assert total > 20
    for error in (ShareFull("full"), Interrupted()):
        for step in range(1, total + 1):
            share.call = call  # type: ignore[method-assign]
            share.remove_tree(f"{layout.LAYERS}/{layout.name_of(CHAIN)}")
            share.call = failing_at(step, error)  # type: ignore[method-assign]
            with suppress(PodferryError, Interrupted):
                store(share, clock, f"n{step}").publish(CHAIN, source)
            share.call = call  # type: ignore[method-assign]
            other = store(share, clock, "other")
            found = other.find(CHAIN)
            if found is not None:
                other.check(found)
            other.check(other.publish(CHAIN, source))


def test_a_read_only_node_finds_and_changes_nothing(where: Path, share: PosixShare, clock: Clock, source: Path) -> None:
    if ROOT:
        store(share, clock).publish(CHAIN, source)
    before = contents(where)
    reader = store(open_share(where, read_only=True), clock, "reader", read_only=True)
    assert (reader.find(CHAIN) is not None) == ROOT
    assert reader.find(OTHER) is None
    assert contents(where) == before


# -- leases, references, collection ------------------------------------------------------------------------------------


def test_a_lease_whose_owner_is_silent_expires_by_the_watchers_clock(share: PosixShare, clock: Clock) -> None:
    name = layout.name_of(CHAIN)
    first, second = Leases(share, clock, "a", 30.0), Leases(share, clock, "b", 30.0)
    held = first.take(name)
    assert isinstance(held, Lease)
    assert second.take(name) == Taken("a")
    clock.now += 29
    assert first.renew(held)
    clock.now += 29
    assert second.take(name) == Taken("a")
    clock.now += 29
    assert second.take(name) == Taken("a")
    clock.now += 2
    heir = second.take(name)
    assert isinstance(heir, Lease)
    assert not first.renew(held)
    first.release(held)
    assert isinstance(first.take(name), Taken)
    second.release(heir)
    assert share.names(layout.LEASES) == []
    assert isinstance(first.take(name), Lease)


def test_a_torn_lease_expires(share: PosixShare, clock: Clock) -> None:
    name = layout.name_of(CHAIN)
    share.create(f"{layout.LEASES}/{name}.1", b'{"node": "a"')
    leases = Leases(share, clock, "b", 30.0)
    assert isinstance(leases.take(name), Taken)
    clock.now += 31
    assert isinstance(leases.take(name), Lease)


def test_a_reference_that_was_written_by_a_lost_call_hides_none(share: PosixShare, clock: Clock) -> None:
    """A heartbeat that its node gave up lands after a newer one: the references of both count."""
    one = References(share, clock, "a", "0")
    one.heartbeat()
    old = share.read(one.path)
    path = one.path
    replace = share.replace

    def lost(*_: object) -> None:
        raise ShareUnavailable("lost")

    share.replace = lost  # type: ignore[method-assign]
    with pytest.raises(ShareUnavailable):
        one.heartbeat()
    share.replace = replace  # type: ignore[method-assign]
    one.add(CHAIN)
    share.replace(path, old)
    assert all_nodes(share)["a.0"].layers == {CHAIN}
    one.heartbeat()
    assert len(share.names(layout.NODES)) == 1


def test_two_nodes_of_one_name_keep_each_others_layers(share: PosixShare, clock: Clock) -> None:
    References(share, clock, "a", "1").add(CHAIN)
    References(share, clock, "a", "2").add(OTHER)
    assert {key: set(record.layers) for key, record in all_nodes(share).items()} == {"a.1": {CHAIN}, "a.2": {OTHER}}
    assert forget(share, "a") == 2


@needs_root
def test_a_layer_goes_after_its_grace_and_never_in_use(share: PosixShare, clock: Clock, source: Path) -> None:
    one = store(share, clock)
    one.publish(CHAIN, source)
    one.publish(OTHER, source)
    collector = Collector(share, clock, grace=DAY, settle=150.0)

    def passes(seconds: float, step: float = 600.0) -> None:
        for _ in range(int(seconds / step)):
            clock.now += step
            collector.collect()

    passes(3 * DAY, DAY / 4)  # the node is away and says nothing for days
    assert len(share.names(layout.LAYERS)) == 2
    one.references.drop(CHAIN)
    one.references.heartbeat()
    passes(DAY - 1200)
    assert len(share.names(layout.LAYERS)) == 2
    (unused,) = [line for line in images_report(share).layers if not line.users]
    assert (unused.chain, unused.unused_since is not None) == (CHAIN, True)
    passes(3600)
    assert share.names(layout.LAYERS) == [layout.name_of(OTHER)]
    for folder in (layout.TRASH, layout.DOOMED, layout.UNUSED):
        assert share.names(folder) == []


@needs_root
def test_a_condemned_layer_comes_back_for_who_wants_it(share: PosixShare, clock: Clock, source: Path) -> None:
    store(share, clock).publish(CHAIN, source)
    forget(share, "a")
    collector = Collector(share, clock, grace=0.0, settle=150.0)
    collector.collect()
    assert share.names(layout.LAYERS) == []
    assert len(share.names(layout.TRASH)) == 1
    assert isinstance(store(share, clock, "b").find(CHAIN), Layer)
    clock.now += 1000
    collector.collect()
    collector.collect()
    assert share.names(layout.LAYERS) == [layout.name_of(CHAIN)]


@needs_root
def test_references_that_cannot_be_read_stop_the_collector(share: PosixShare, clock: Clock, source: Path) -> None:
    store(share, clock).publish(CHAIN, source)
    forget(share, "a")
    share.create(f"{layout.NODES}/torn.0.x-0.json", b'{"node"')
    with pytest.raises(ShareRefused, match="torn"):
        Collector(share, clock, grace=0.0, settle=0.0).collect()
    assert share.names(layout.LAYERS) == [layout.name_of(CHAIN)]


# -- the report --------------------------------------------------------------------------------------------------------


@needs_root
def test_the_report_tells_who_uses_what(where: Path, share: PosixShare, clock: Clock, source: Path) -> None:
    store(share, clock).publish(CHAIN, source)
    store(share, clock, "b").find(CHAIN)
    report = images_report(where)
    (line,) = report.layers
    assert (line.chain, line.form, line.users, line.published_by) == (CHAIN, "dir", ["a", "b"], "a")
    assert report.state == "ok"
    assert report.bytes == line.bytes > 0
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["chain"] == CHAIN


def test_a_share_that_does_not_answer_is_reported_as_such(
    where: Path, share: PosixShare, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr("podferry.snapshotter.opening._identify", lambda root: gate.wait())
    report = images_report(where, deadline=0.05)
    assert "no answer" in report.state
    assert report.layers == []
    gate.set()


def test_a_payload_is_checked_before_its_layer_counts(share: PosixShare, clock: Clock, source: Path) -> None:
    """A copy that the share garbles is never published."""

    class Garbling:
        name = FormName.DIR

        def write(self, source: Path, into: str) -> Payload:
            share.create(f"{into}/x", b"garbled")
            return Payload("0", 1, 1)

        def check(self, at: str, record: LayerRecord) -> None:
            raise LayerDamaged("garbled")

        def glance(self, at: str, record: LayerRecord) -> None: ...

    one = store(share, clock)
    one.forms = {FormName.DIR: Garbling()}
    with pytest.raises(LayerDamaged):
        one.publish(CHAIN, source)
    assert share.names(layout.LAYERS) == share.names(layout.STAGING) == []


def test_every_entry_of_a_tree_is_walked_once_parents_first(source: Path) -> None:
    paths = [found.path for found in walk(source)]
    assert paths == [".", "absolute", "etc", "upwards", "etc/name"] or sorted(paths) == sorted(
        [".", "absolute", "etc", "etc/name", "upwards"]
    )
    assert paths.index("etc") < paths.index("etc/name")
