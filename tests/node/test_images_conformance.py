"""What containerd expects of a snapshotter, over the socket, with real mounts.

The behaviour is that of containerd's own suite (`core/snapshots/testsuite`). Every test runs with layers on the node's
disk, and with every layer published to a share and mounted from there: a local file system and a network's, both forms.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from images_rig import GC, LOCAL, NETWORK, Rig, picture, refused, scratch

from podferry.protos import snapshots_pb2 as pb
from podferry.snapshotter.layout import FormName

pytestmark = pytest.mark.node


WHERE = {
    "disk": (LOCAL, FormName.EROFS),
    "local-dir": (LOCAL, FormName.DIR),
    "local-erofs": (LOCAL, FormName.EROFS),
    "glusterfs-dir": (NETWORK, FormName.DIR),
    "glusterfs-erofs": (NETWORK, FormName.EROFS),
}


@pytest.fixture(params=WHERE)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    place, form = WHERE[request.param]
    with scratch(LOCAL) as home, scratch(place) as share:
        rig = Rig(home, share, form=form, share_all=request.param != "disk")
        yield rig
        rig.close()


@pytest.fixture(autouse=True)
def mask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


Change = Callable[[Path], None]


def build(rig: Rig, *changes: Change) -> str:
    """Commit one layer a change, checking at each that the new layer begins as the old ended; the top's name."""
    parent = ""
    before: dict[str, tuple[object, ...]] | None = None
    for number, change in enumerate(changes):
        with rig.mounted(rig.prepare(f"a{number}", parent)) as at:
            if before is not None:
                assert picture(at) == before
            change(at)
            before = picture(at)
        rig.commit(f"c{number}", f"a{number}")
        parent = f"c{number}"
    with rig.mounted(rig.view("look", parent)) as at:
        assert picture(at) == before
    rig.remove("look")
    return parent


# -- names, kinds, parents ---------------------------------------------------------------------------------------------


def test_a_layer_is_prepared_committed_built_upon_viewed_and_removed(rig: Rig) -> None:
    def first(at: Path) -> None:
        (at / "foo").write_text("foo\n")
        (at / "a/b/c").mkdir(parents=True)

    def second(at: Path) -> None:
        (at / "bar").write_text("bar\n")
        (at / "foo").write_text("bar\n")
        (at / "a/b/c").rmdir()
        (at / "a/b").rmdir()

    top = build(rig, first, second)
    assert (rig.stat("c0").kind, rig.stat("c0").parent) == (pb.COMMITTED, "")
    assert (rig.stat("c1").kind, rig.stat("c1").parent) == (pb.COMMITTED, "c0")
    with refused("NOT_FOUND"):
        rig.stat("a0")
    assert {info.name: info for info in rig.walk()} == {"c0": rig.stat("c0"), "c1": rig.stat("c1")}
    with refused("FAILED_PRECONDITION") as said:
        rig.remove("c0")
    assert "remove" in said[0]
    rig.remove(top)
    rig.remove("c0")
    assert rig.walk() == []


def test_an_active_snapshot_says_what_it_is(rig: Rig) -> None:
    rig.prepare("active")
    assert (rig.stat("active").kind, rig.stat("active").parent, rig.stat("active").name) == (pb.ACTIVE, "", "active")


def test_a_name_is_taken_once_whatever_its_kind(rig: Rig) -> None:
    rig.prepare("x")
    rig.commit("c", "x")
    rig.prepare("a", "c")
    rig.view("v", "c")
    for again in (rig.prepare, rig.view):
        for name in ("a", "v", "c"):
            with refused("ALREADY_EXISTS"):
                again(name, "c")


def test_a_parent_must_be_there_and_committed(rig: Rig) -> None:
    rig.prepare("a")
    rig.view("v")
    with refused("NOT_FOUND"):
        rig.prepare("b", "missing")
    for parent in ("a", "v"):
        with refused("INVALID_ARGUMENT"):
            rig.prepare("b", parent)
    assert rig.names() == ["a", "v"]


def test_only_what_is_active_is_committed_and_only_under_a_free_name(rig: Rig) -> None:
    rig.prepare("a")
    rig.view("v")
    rig.commit("c", "a")
    rig.prepare("b")
    with refused("NOT_FOUND"):
        rig.commit("d", "a")
    with refused("FAILED_PRECONDITION"):
        rig.commit("d", "v")
    with refused("FAILED_PRECONDITION"):
        rig.commit("d", "c")
    with refused("ALREADY_EXISTS"):
        rig.commit("c", "b")
    assert rig.names() == ["b", "c", "v"]


def test_a_parent_may_be_given_at_commit_to_a_snapshot_without_one(rig: Rig) -> None:
    rig.prepare("x")
    rig.commit("base", "x")
    rig.prepare("free")
    rig.prepare("bound", "base")
    rig.stub.Commit(pb.CommitSnapshotRequest(name="on-base", key="free", parent="base", labels=GC))
    assert rig.stat("on-base").parent == "base"
    with refused("INVALID_ARGUMENT"):
        rig.stub.Commit(pb.CommitSnapshotRequest(name="n", key="bound", parent="on-base", labels=GC))
    rig.stub.Commit(pb.CommitSnapshotRequest(name="same", key="bound", parent="base", labels=GC))


def test_mounts_are_for_what_can_be_mounted(rig: Rig) -> None:
    first = rig.prepare("a")
    assert list(rig.stub.Mounts(pb.MountsRequest(key="a")).mounts) == first
    rig.commit("c", "a")
    with refused("FAILED_PRECONDITION"):
        rig.stub.Mounts(pb.MountsRequest(key="c"))
    with refused("NOT_FOUND"):
        rig.stub.Mounts(pb.MountsRequest(key="a"))


def test_nothing_is_removed_under_its_children(rig: Rig) -> None:
    rig.prepare("base")
    rig.commit("c-base", "base")
    rig.prepare("middle", "c-base")
    rig.commit("c-middle", "middle")
    rig.prepare("top", "c-middle")
    with refused("FAILED_PRECONDITION"):
        rig.remove("c-middle")
    for name in ("top", "c-middle", "c-base"):
        rig.remove(name)
    with refused("NOT_FOUND"):
        rig.remove("top")


def test_a_removed_name_is_free_again(rig: Rig) -> None:
    rig.prepare("x")
    rig.commit("c", "x")
    rig.prepare("again", "c")
    rig.remove("again")
    rig.view("again", "c")
    rig.remove("again")
    rig.prepare("again")
    rig.remove("c")
    rig.commit("c", "again")
    assert rig.stat("c").parent == ""


# -- labels, times, lists ----------------------------------------------------------------------------------------------


def base(rig: Rig) -> None:
    rig.prepare("c1-a")
    rig.commit("c1", "c1-a")
    rig.prepare("c2-a", "c1")
    rig.commit("c2", "c2-a")
    rig.prepare("a1", "c2")
    rig.prepare("a2")
    rig.view("v1", "c2")
    rig.view("v2")


@pytest.mark.parametrize(
    ("name", "kind", "parent"),
    [
        ("c1", "COMMITTED", ""),
        ("c2", "COMMITTED", "c1"),
        ("a1", "ACTIVE", "c2"),
        ("a2", "ACTIVE", ""),
        ("v1", "VIEW", "c2"),
        ("v2", "VIEW", ""),
    ],
)
def test_labels_change_and_nothing_else(rig: Rig, name: str, kind: str, parent: str) -> None:
    start = time.time_ns()
    base(rig)
    info = rig.stat(name)
    assert start <= info.created_at.ToNanoseconds() <= time.time_ns()
    assert info.created_at == info.updated_at
    assert (info.kind, info.parent, info.name) == (pb.Kind.Value(kind), parent, name)

    def labelled(**labels: str) -> pb.Info:
        return pb.Info(name=name, parent="doesnotexist", labels={**GC, **labels})

    before = time.time_ns()
    changed = rig.update(labelled(l1="v1", l2="v2", l3="v3"))
    assert changed.created_at == info.created_at
    assert before <= changed.updated_at.ToNanoseconds() <= time.time_ns()
    assert (changed.kind, changed.parent, changed.name) == (info.kind, parent, name)
    assert dict(changed.labels) == {**GC, "l1": "v1", "l2": "v2", "l3": "v3"}
    changed = rig.update(pb.Info(name=name, labels={"l1": "updated", "l4": "v4"}), "labels.l1", "labels.l2")
    assert dict(changed.labels) == {**GC, "l1": "updated", "l3": "v3"}
    changed = rig.update(labelled(l4="v4"), "labels")
    assert dict(changed.labels) == {**GC, "l4": "v4"}
    with refused("INVALID_ARGUMENT"):
        rig.update(labelled(), "parent")
    assert rig.stat(name) == changed


def test_a_commit_brings_its_own_labels(rig: Rig) -> None:
    rig.prepare("a", labels={**GC, "from": "prepare"})
    rig.commit("c", "a", labels={**GC, "to": "commit"})
    labels = dict(rig.stat("c").labels)
    assert "from" not in labels
    assert labels["to"] == "commit"


def test_a_label_has_a_limit(rig: Rig) -> None:
    with refused("INVALID_ARGUMENT"):
        rig.prepare("a", labels={"k": "v" * 4096})
    assert rig.names() == []


FILTERS: list[tuple[list[str], list[str]]] = [
    ([], ["a", "a-np", "a-np-wl", "a-wl", "p", "p-wl", "v", "v-wl"]),
    (['labels."containerd.io/gc.root"==walk'], ["a", "a-np", "a-np-wl", "a-wl", "p", "p-wl", "v", "v-wl"]),
    (['kind==active,labels."containerd.io/gc.root"==walk'], ["a", "a-np", "a-np-wl", "a-wl"]),
    (["kind==view"], ["v", "v-wl"]),
    (["kind==committed"], ["p", "p-wl"]),
    (["name==p", "name==a-np-wl"], ["a-np-wl", "p"]),
    (["name==a-wl,labels.l"], ["a-wl"]),
    (["parent==p"], ["a", "v"]),
    (['parent!=""'], ["a", "a-wl", "v", "v-wl"]),
    (["labels.l"], ["a-np-wl", "a-wl", "p-wl", "v-wl"]),
    (["labels.l==2"], ["a-np-wl", "a-wl"]),
    (["name~=/^a-.*wl$/"], ["a-np-wl", "a-wl"]),
    (['name~="^v"'], ["v", "v-wl"]),
]


def test_a_walk_gives_what_the_filters_ask_for(rig: Rig) -> None:
    gc = {"containerd.io/gc.root": "walk"}
    rig.prepare("a-np", labels=gc)
    rig.prepare("x", labels=gc)
    rig.commit("p", "x", gc)
    rig.prepare("a", "p", gc)
    rig.view("v", "p", gc)
    rig.prepare("y", labels=gc)
    rig.commit("p-wl", "y", {**gc, "l": "1"})
    rig.prepare("a-wl", "p-wl", {**gc, "l": "2"})
    rig.view("v-wl", "p-wl", {**gc, "l": "3"})
    rig.prepare("a-np-wl", labels={**gc, "l": "2"})
    for filters, wanted in FILTERS:
        assert rig.names(*filters) == wanted, filters
    with refused("INVALID_ARGUMENT"):
        rig.names("kind=active")


def test_a_snapshot_can_be_looked_at_while_others_are_listed(rig: Rig) -> None:
    base(rig)
    for page in rig.stub.List(pb.ListSnapshotsRequest()):
        for info in page.info:
            assert rig.stat(info.name) == info


def test_a_long_list_comes_whole(rig: Rig) -> None:
    for number in range(250):
        rig.view(f"v{number}")
    assert len(rig.walk()) == 250


def test_a_restart_changes_nothing(rig: Rig) -> None:
    def write(at: Path) -> None:
        (at / "file").write_text("kept")

    build(rig, write, lambda at: (at / "other").mkdir())
    rig.prepare("running", "c1")
    before = rig.walk()
    rig.stop()
    again = Rig(rig.home, rig.share.root, share_all=rig.share_all)
    again.snapshotter.cleanup()
    assert again.walk() == before
    with again.mounted(list(again.stub.Mounts(pb.MountsRequest(key="running")).mounts)) as at:
        assert (at / "file").read_text() == "kept"
    again.stop()


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_view_is_read_only(rig: Rig) -> None:
    rig.prepare("a")
    rig.commit("c", "a")
    rig.prepare("b", "c")
    rig.commit("d", "b")
    for name in ("c", "d"):
        with rig.mounted(rig.view(f"view-{name}", name)) as at, pytest.raises(OSError, match="Read-only"):
            (at / "file").write_text("no")


def test_the_root_is_open_to_all(rig: Rig) -> None:
    with rig.mounted(rig.prepare("a")) as at:
        assert stat.S_IMODE(at.stat().st_mode) == 0o755


def test_a_file_is_replaced_by_a_later_layer(rig: Rig) -> None:
    def first(at: Path) -> None:
        (at / "etc").mkdir(0o700)
        (at / "etc/hosts").write_text("10.0.0.1")
        (at / "etc/profile").write_text("PATH=/usr/bin")

    def second(at: Path) -> None:
        (at / "etc/hosts").write_text("10.0.0.2")
        (at / "etc/profile").chmod(0o666)
        (at / "root").mkdir(0o700)
        (at / "root/.bashrc").write_text("PATH=/usr/sbin")

    build(rig, first, second)


def test_a_directory_that_comes_back_does_not_bring_its_old_files(rig: Rig) -> None:
    def first(at: Path) -> None:
        (at / "lib").mkdir()
        (at / "lib/hidden").touch()

    def second(at: Path) -> None:
        (at / "lib/hidden").unlink()
        (at / "lib").rmdir()
        (at / "lib").mkdir()
        (at / "lib/not-hidden").touch()

    build(rig, first, second, lambda at: (at / "lib/newfile").touch())


def test_owners_and_modes_of_lower_files_change(rig: Rig) -> None:
    def first(at: Path) -> None:
        (at / "opt/a/b").mkdir(parents=True)
        (at / "opt/a/b/file").write_text("hello")
        for name in ("d1", "d2", "d3"):
            (at / name).mkdir(0o700)
        os.chown(at / "d2", 1, 1)

    def second(at: Path) -> None:
        for path in ("opt", "opt/a", "opt/a/b", "opt/a/b/file"):
            os.chown(at / path, 1, 1)
        os.chown(at / "d2", 0, 0)
        (at / "d3").rmdir()

    def third(at: Path) -> None:
        (at / "d3").mkdir(0o711)
        os.chown(at / "d3", 1, 1)
        (at / "opt/a/b/file").chmod(0o4755)

    build(rig, first, second, third)


def test_files_move_and_are_linked_across_layers(rig: Rig) -> None:
    def first(at: Path) -> None:
        (at / "dir1").mkdir(0o700)
        (at / "dir1/f1").write_text("Hello")
        (at / "dir2").mkdir(0o700)
        (at / "dir2/f2").write_text("...")

    def second(at: Path) -> None:
        (at / "dir3").mkdir(0o700)
        (at / "dir3/f1").write_text("Hello")
        (at / "dir1/f1").unlink()
        (at / "dir1").rmdir()
        (at / "dir3/f2").hardlink_to(at / "dir2/f2")
        (at / "dir2/f2").unlink()
        (at / "over").write_text("new")
        (at / "over").rename(at / "dir3/f1")

    build(rig, first, second)


def test_deleted_files_stay_deleted(rig: Rig) -> None:
    def first(at: Path) -> None:
        (at / "foo").write_text("foo")
        (at / "foobar").write_text("foobar")

    build(rig, first, lambda at: (at / "foobar").unlink(), lambda at: None)


def test_everything_a_file_system_can_hold_comes_through(rig: Rig) -> None:
    def first(at: Path) -> None:
        (at / "empty").touch()
        (at / "großer name ☃\n").write_text("odd")
        (at / "a").write_text("linked")
        (at / "b").hardlink_to(at / "a")
        (at / "absolute").symlink_to("/etc/passwd")
        (at / "upwards").symlink_to("../../../etc/passwd")
        (at / "dangling").symlink_to("nowhere")
        (at / "setuid").write_bytes(b"x" * 10_000)
        (at / "setuid").chmod(0o6755)
        (at / "sticky").mkdir()
        (at / "sticky").chmod(0o1777)
        os.mkfifo(at / "fifo")
        os.chown(at / "dangling", 7, 8, follow_symlinks=False)
        os.setxattr(at / "a", "user.note", b"kept")
        os.setxattr(at / "setuid", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
        os.utime(at / "empty", (1_000_000_000, 1_000_000_000))
        with (at / "holes").open("wb") as file:
            file.truncate(1 << 20)

    top = build(rig, first, lambda at: None)
    with rig.mounted(rig.view("v", top)) as at:
        assert (at / "empty").stat().st_mtime == 1_000_000_000


def test_a_hundred_and_twenty_eight_layers_are_mounted(rig: Rig) -> None:
    flat = rig.home / "flat"
    flat.mkdir()

    def change(number: int, at: Path) -> None:
        (at / "overwriteme").write_text(f"{number} WAS HERE!")
        (at / "addhere").mkdir(exist_ok=True)
        (at / f"addhere/file-{number}").write_text("same")
        if number % 16 == 0 and (at / "onlyme").exists():
            for path in (at / "onlyme").iterdir():
                path.unlink()
            (at / "onlyme").rmdir()
        (at / "onlyme").mkdir(exist_ok=True)
        (at / f"onlyme/file-{number}").write_text("only me!")

    parent = ""
    for number in range(128):
        with rig.mounted(rig.prepare(f"a{number}", parent)) as at:
            change(number, at)
        change(number, flat)
        parent = f"c{number}"
        rig.commit(parent, f"a{number}")
    with rig.mounted(rig.view("v", parent)) as at:
        seen, wanted = picture(at), picture(flat)
        assert {name: one[:4] for name, one in seen.items() if name != "."} == {
            name: one[:4] for name, one in wanted.items() if name != "."
        }


def test_usage_counts_what_is_on_this_disk(rig: Rig) -> None:
    with rig.mounted(rig.prepare("a")) as at:
        (at / "file").write_bytes(os.urandom(100_000))
    used = rig.stub.Usage(pb.UsageRequest(key="a"))
    assert used.size >= 100_000
    assert used.inodes == 2
    rig.commit("c", "a")
    used = rig.stub.Usage(pb.UsageRequest(key="c"))
    assert used.size == 0 if rig.share_all else used.size >= 100_000
