"""A share that hangs, vanishes, fills up or turns read-only under a working node, and what works meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from images_containerd import ContainerdNode, Image, Registry, file, make_image, program
from images_rig import LOCAL, Rig, refused, scratch, some_chain

from podferry.fs.mounts import unmount
from podferry.node.process import run, spawn
from podferry.protos import snapshots_pb2 as pb
from podferry.snapshotter import check_layers, images_report, layout
from podferry.snapshotter.layer_mounts import mount_points
from podferry.snapshotter.layout import FormName
from podferry.snapshotter.snapshot_row import Home
from podferry.snapshotter.snapshotter import REF

pytestmark = pytest.mark.node

DEADLINE = 2.0  # seconds
PATIENCE = 60.0  # seconds after which something that should happen by itself counts as never


class OwnShare:
    """A GlusterFS client of the test's own, which it may stop and kill."""

    def __init__(self, at: Path) -> None:
        self.at = at
        self.start()

    def start(self) -> None:
        self.at.mkdir(exist_ok=True)
        argv = ["glusterfs", "--no-daemon", "--volfile=/etc/podferry/share.vol", f"--log-file={self.at}.log", self.at]
        self.process = spawn(argv)
        eventually(lambda: self.at in mount_points(self.at), "the share is mounted")
        eventually((self.at / ".").exists, "the share answers")

    def hang(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.wake()
        self.kill()
        unmount(self.at)


def eventually(check: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + PATIENCE
    while not check():
        assert time.monotonic() < until, f"never: {what}"
        threading.Event().wait(0.1)


@pytest.fixture
def share(request: pytest.FixtureRequest) -> Iterator[OwnShare]:
    with scratch(LOCAL) as home:
        share = OwnShare(home / "share")
        yield share
        share.close()


@pytest.fixture
def place(share: OwnShare) -> Iterator[Path]:
    with scratch(share.at) as place:
        yield place
        share.wake()


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    registry = Registry()
    yield registry
    registry.shutdown()


def small_image() -> Image:
    return make_image(
        f"image-{os.urandom(3).hex()}",
        lambda tar: (program(tar, "/bin/sh", "/bin/cat"), file(tar, "unique", os.urandom(16)))[0],
        lambda tar: file(tar, "answer", b"42\n"),
    )


@pytest.fixture(params=["erofs", "dir"])
def node(request: pytest.FixtureRequest, place: Path, share: OwnShare) -> Iterator[ContainerdNode]:
    with scratch(LOCAL) as home:
        options = ["--form", request.param, "--deadline", str(DEADLINE), "--wait", "5"]
        node = ContainerdNode(home / "n", place / "images", "n", options=options)
        node.start()
        yield node
        share.wake()
        print(node.log())
        node.stop()


def published(node: ContainerdNode, image: Image) -> bool:
    names = {entry.name for entry in (node.share / layout.LAYERS).iterdir()}
    return names >= {layout.name_of(chain) for chain in image.chains}


def test_a_hung_share_delays_nothing_that_does_not_need_it(
    node: ContainerdNode, share: OwnShare, registry: Registry
) -> None:
    before, during = small_image(), small_image()
    known, new = registry.add(before), registry.add(during)
    node.pull(known)
    eventually(lambda: published(node, before), "the image is published")
    flags = ["--snapshotter", "podferry", "--detach"]
    node.ctr("run", *flags, known, "stays", "/bin/sh", "-c", "while :; do read x < /answer; done")
    node.run(known, "/bin/cat", "/answer")
    share.hang()
    try:
        begun = time.monotonic()
        node.pull(new)
        assert node.run(new, "/bin/cat", "/answer") == "42\n"
        assert "PF251" in node.log()
        if "erofs" in node.options:  # what is mounted is used from the page cache
            assert node.run(known, "/bin/cat", "/answer") == "42\n"
            assert node.ctr("tasks", "exec", "--exec-id", "e", "stays", "/bin/cat", "/answer").stdout == "42\n"
        else:
            failed = node.ctr(
                "run", "--rm", "--snapshotter", "podferry", known, "fails", "/bin/cat", "/answer", check=False
            )
            assert failed.returncode != 0
            assert "PF251" in failed.stderr
        assert time.monotonic() - begun < PATIENCE
        report = images_report(node.share, deadline=0.5)
        assert "no answer" in report.state
    finally:
        share.wake()
    eventually(lambda: published(node, during), "what was pulled meanwhile is published")
    eventually(lambda: node.ctr("tasks", "kill", "--signal", "KILL", "stays", check=False).returncode != 0, "it ends")
    node.ctr("tasks", "delete", "--force", "stays", check=False)
    node.ctr("containers", "delete", "stays")
    assert node.run(known, "/bin/cat", "/answer") == "42\n"


def test_a_vanished_share_is_named_and_used_again_when_it_is_back(
    node: ContainerdNode, share: OwnShare, registry: Registry
) -> None:
    before, during = small_image(), small_image()
    known, new = registry.add(before), registry.add(during)
    node.pull(known)
    eventually(lambda: published(node, before), "the image is published")
    share.kill()
    node.pull(new)
    assert node.run(new, "/bin/cat", "/answer") == "42\n"
    assert "PF250" in node.log()
    unmount(share.at)
    other = small_image()
    node.pull(registry.add(other))
    assert list(share.at.iterdir()) == []
    share.start()
    eventually(lambda: published(node, during) and published(node, other), "what was pulled meanwhile is published")
    for reference in (known, new):
        eventually(lambda reference=reference: runs(node, reference), "an image is used again")  # type: ignore[misc]


def runs(node: ContainerdNode, reference: str) -> bool:
    flags = ["--rm", "--snapshotter", "podferry"]
    name = f"c-{os.urandom(4).hex()}"
    done = node.ctr("run", *flags, reference, name, "/bin/cat", "/answer", check=False)
    if done.returncode:
        node.ctr("containers", "rm", name, check=False)
        node.ctr("snapshots", "--snapshotter", "podferry", "rm", name, check=False)
    return done.stdout == "42\n"


def test_a_node_starts_without_the_share_it_knows(node: ContainerdNode, share: OwnShare, registry: Registry) -> None:
    before, during = small_image(), small_image()
    node.pull(registry.add(before))
    eventually(lambda: published(node, before), "the image is published")
    share.hang()
    try:
        node.kill("snapshotter")
        node.start_snapshotter()
        assert "starting without the share" in node.log()
        reference = registry.add(during)
        node.pull(reference)
        assert runs(node, reference)
    finally:
        share.wake()
    eventually(lambda: published(node, during), "what was pulled meanwhile is published")
    assert runs(node, registry.add(before))


@contextmanager
def small(size: str) -> Iterator[Path]:
    with scratch(LOCAL) as at:
        run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at])
        yield at


def layer(rig: Rig, chain: str, size: int) -> None:
    with rig.mounted(rig.prepare(f"k-{chain}", labels={REF: chain})) as at:
        (at / "file").write_bytes(os.urandom(size))
    rig.commit(chain, f"k-{chain}", {REF: chain})


@pytest.mark.parametrize("form", list(FormName))
def test_a_full_share_keeps_layers_here_until_there_is_room(form: FormName) -> None:
    with small("1M") as share, scratch(LOCAL) as home:
        rig = Rig(home, share, form=form)
        chain = some_chain()
        layer(rig, chain, 3_000_000)
        assert not rig.publisher.publish_all()
        (waiting,) = rig.metadata.layers(Home.DISK)
        assert "No space left" in waiting.note
        assert rig.share.names(layout.LAYERS) == rig.share.names(layout.STAGING) == []
        with rig.mounted(rig.view("v", chain)) as at:
            assert (at / "file").stat().st_size == 3_000_000
        rig.remove("v")
        run(["mount", "-o", "remount,size=20M", share])
        assert rig.publisher.publish_all()
        assert not rig.metadata.layers(Home.DISK)
        with rig.mounted(rig.view("v", chain)) as at:
            assert (at / "file").stat().st_size == 3_000_000
        assert not (rig.root / "snapshots" / str(waiting.id)).exists()
        rig.close()


def test_a_share_that_turns_read_only_serves_what_it_has() -> None:
    with small("20M") as share, scratch(LOCAL) as home:
        rig = Rig(home, share, form=FormName.DIR)
        old, new = some_chain(), some_chain()
        layer(rig, old, 1000)
        assert rig.publisher.publish_all()
        run(["mount", "-o", "remount,ro", share])
        layer(rig, new, 1000)
        assert not rig.publisher.publish_all()
        (waiting,) = rig.metadata.layers(Home.DISK)
        assert "Read-only" in waiting.note
        for number, chain in enumerate((old, new)):
            with rig.mounted(rig.prepare(f"c{number}", chain)) as at:
                assert (at / "file").stat().st_size == 1000
        run(["mount", "-o", "remount,rw", share])
        assert rig.publisher.publish_all()
        rig.close()


@pytest.mark.parametrize("form", list(FormName))
def test_a_layer_damaged_in_use_is_an_error_that_says_what_to_do(form: FormName) -> None:
    with scratch(LOCAL) as share, scratch(LOCAL) as home:
        rig = Rig(home, share, form=form)
        chain = some_chain()
        layer(rig, chain, 1000)
        assert rig.publisher.publish_all()
        at = share / layout.LAYERS / layout.name_of(chain)
        if form is FormName.EROFS:
            os.truncate(at / "layer.erofs", 2048)
        else:
            (at / "fs").rename(at / "elsewhere")
        with refused("FAILED_PRECONDITION") as said:
            rig.view("v", chain)
        assert "pull it again" in said[0]
        assert "v" not in rig.names()
        assert len(rig.share.names(layout.DAMAGED)) == 1
        rig.remove(chain)
        layer(rig, chain, 2000)
        assert rig.publisher.publish_all()
        with rig.mounted(rig.view("v", chain)) as at:
            assert (at / "file").stat().st_size == 2000
        rig.close()


@pytest.mark.parametrize("form", list(FormName))
def test_a_damage_that_a_look_does_not_show_is_found_by_reading_all(form: FormName) -> None:
    """The layer's size and head are as published. Who runs from it runs on; the next pull makes it again."""
    with scratch(LOCAL) as share, scratch(LOCAL) as home:
        rig = Rig(home, share, form=form)
        hurt, whole = some_chain(), some_chain()
        for chain in (hurt, whole):
            layer(rig, chain, 100_000)
        assert rig.publisher.publish_all()
        at = share / layout.LAYERS / layout.name_of(hurt)
        victim = at / ("layer.erofs" if form is FormName.EROFS else "fs/file")
        about = victim.stat()
        with victim.open("r+b", buffering=0) as file:
            file.seek(about.st_size - 50_000)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        os.utime(victim, ns=(about.st_atime_ns, about.st_mtime_ns))
        with rig.mounted(rig.view("v", hurt)) as mounted:
            found = {one.chain: one for one in check_layers(rig.share)}
            assert bool(found[hurt].wrong) and not found[whole].wrong
            assert (mounted / "file").stat().st_size == 100_000
        for name in ("v", hurt):
            rig.remove(name)
        layer(rig, hurt, 2000)
        assert rig.publisher.publish_all()
        with rig.mounted(rig.view("v", hurt)) as mounted:
            assert (mounted / "file").stat().st_size == 2000
        assert not any(one.wrong for one in check_layers(rig.share))
        rig.close()


def test_ten_nodes_at_once_unpack_an_image_once() -> None:
    """Each node does what containerd's unpacker does; the layers are counted by who had to fill them."""
    chains = [some_chain() for _ in range(3)]
    filled: list[str] = []
    failed: list[BaseException] = []

    def pull(rig: Rig) -> None:
        parent = ""
        for chain in chains:
            key = f"extract {chain}"
            try:
                mounts = rig.prepare(key, parent, {REF: chain})
            except Exception:  # noqa: BLE001  already there, or the last check tells
                mounts = []
            if mounts:
                filled.append(chain)
                with rig.mounted(mounts) as at:
                    (at / chain[-8:]).write_bytes(os.urandom(200_000))
                rig.commit(chain, key, {REF: chain})
            (found,) = rig.walk(f'labels."{REF}"=={chain},parent=="{parent}"')
            parent = found.name

    def body(rig: Rig) -> None:
        try:
            pull(rig)
        except BaseException as error:  # noqa: BLE001  raised again below
            failed.append(error)

    with scratch(LOCAL) as share, scratch(LOCAL) as home:
        rigs = [Rig(home / f"n{number}", share, name=f"n{number}", wait=60.0) for number in range(10)]
        publishers = [threading.Thread(target=rig.publisher.run, daemon=True) for rig in rigs]
        threads = [threading.Thread(target=body, args=(rig,)) for rig in rigs]
        for thread in (*publishers, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        for rig in rigs:
            rig.publisher.stop()
        for thread in publishers:
            thread.join()
        assert not failed, failed
        assert sorted(filled) == sorted(chains)
        report = images_report(share)
        assert sorted(line.chain for line in report.layers) == sorted(chains)
        assert all(len(line.users) == 10 for line in report.layers)
        contents = set()
        for rig in rigs:
            with rig.mounted(rig.view("look", chains[-1])) as at:
                contents.add(tuple((one.name, one.read_bytes()) for one in sorted(at.iterdir())))
        assert len(contents) == 1
        for rig in rigs:
            rig.close()


def test_usage_after_a_kill_is_what_is_there() -> None:
    """Directories of snapshots that a crash left without a row, and rows whose directory a crash never made."""
    with scratch(LOCAL) as share, scratch(LOCAL) as home:
        rig = Rig(home, share)
        rig.prepare("a")
        orphan = rig.root / "snapshots" / "999"
        (orphan / "fs").mkdir(parents=True)
        (rig.root / "l" / "999").symlink_to("../snapshots/999/fs")
        rig.stub.Cleanup(pb.CleanupRequest())
        assert not orphan.exists()
        assert not (rig.root / "l" / "999").is_symlink()
        assert rig.names() == ["a"]
        rig.close()
