"""Two nodes with a containerd each over one share: what the kubelet's pull brings, and what it need not bring."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import images_gate
import pytest
from images_containerd import NAMESPACE, ContainerdNode, Image, Registry, file, make_image, program
from images_rig import LOCAL, NETWORK, picture, scratch

from podferry.errors import CommandFailed
from podferry.fs.mounts import unmount
from podferry.node.containerd import Containerd
from podferry.node.process import run
from podferry.snapshotter import images_report, layout

pytestmark = pytest.mark.node


def base(tar: tarfile.TarFile) -> None:
    program(tar, "/bin/sh", "/bin/cat", "/bin/ls")
    for name in ("proc", "sys", "dev", "etc", "gone", "opaque", "run", "tmp"):
        file(tar, name, type=tarfile.DIRTYPE, mode=0o755)
    file(tar, "gone/file", b"lower")
    file(tar, "opaque/old", b"lower")
    file(tar, "etc/changed", b"lower")
    file(tar, "blob", os.urandom(3_000_000))


def above(tar: tarfile.TarFile) -> None:
    file(tar, ".wh.gone")
    file(tar, "opaque", type=tarfile.DIRTYPE, mode=0o750)
    file(tar, "opaque/.wh..wh..opq")
    file(tar, "opaque/new", b"upper")
    file(tar, "etc/changed", b"upper", mode=0o600, uid=7, gid=8)
    file(tar, "absolute", type=tarfile.SYMTYPE, linkname="/etc/changed")
    file(tar, "hard", type=tarfile.LNKTYPE, linkname="etc/changed")
    file(tar, "setuid", b"#!/bin/sh\n", mode=0o4755)
    file(tar, "unique", os.urandom(16))


def top(tar: tarfile.TarFile) -> None:
    file(tar, "answer", b"42\n")
    file(tar, "unique", os.urandom(16))


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    registry = Registry()
    yield registry
    registry.shutdown()


@pytest.fixture(params=["erofs", "dir"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def nodes(form: str) -> Iterator[list[ContainerdNode]]:
    with scratch(LOCAL) as home, scratch(NETWORK) as share:
        (share / "layers-of-the-test").mkdir()
        options = ["--form", form, "--lease", "5", "--deadline", "10", "--wait", "20"]
        made = [
            ContainerdNode(home / name, share / "layers-of-the-test", name, options=options) for name in ("n1", "n2")
        ]
        for one in made:
            one.start()
        yield made
        for one in made:
            print(one.log())
            one.stop()


@pytest.fixture
def image(registry: Registry) -> Image:
    image = make_image(f"image-{os.urandom(3).hex()}", base, above, top)
    registry.add(image)
    return image


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def published(node: ContainerdNode, image: Image) -> None:
    """Wait until every layer of an image is on the share."""
    for _ in range(600):
        there = names(node.share / layout.LAYERS)
        if there >= {layout.name_of(chain) for chain in image.chains}:
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"not published:\n{node.log()}")


def test_a_second_node_downloads_no_layer_and_runs_it(
    nodes: list[ContainerdNode], registry: Registry, image: Image, form: str
) -> None:
    first, second = nodes
    reference = registry.add(image)
    first.pull(reference)
    once = registry.layer_bytes(image)
    assert once >= sum(len(image.blobs[layer]) for layer in image.layers)
    assert first.run(reference, "/bin/cat", "/answer", "/etc/changed") == "42\nupper"
    published(first, image)
    second.pull(reference)
    assert registry.layer_bytes(image) == once
    script = "cat /answer /opaque/*; ls / /opaque; echo written > /etc/changed; cat /hard /etc/changed"
    said = second.run(reference, "/bin/sh", "-c", script)
    assert said.startswith("42\nupper")
    assert "gone" not in said.split()
    assert "old" not in said.split()
    assert said.endswith("upperwritten\n") or said.endswith("written\nwritten\n")
    report = images_report(first.share)
    assert sorted(line.chain for line in report.layers) == sorted(image.chains)
    assert all(line.users == ["n1", "n2"] and line.form == form for line in report.layers)
    assert sum(one.stat().st_blocks for one in (second.home / "root/snapshots").rglob("*")) * 512 < 100_000


def test_both_nodes_see_the_same_files_as_overlayfs(
    nodes: list[ContainerdNode], registry: Registry, image: Image
) -> None:
    first, second = nodes
    reference = registry.add(image)
    for node in nodes:
        node.pull(reference)
        published(first, image)
    second.ctr("images", "pull", "--snapshotter", "overlayfs", "--plain-http", reference)
    with first.mounted(reference) as one, second.mounted(reference) as two:
        shared, other = picture(one), picture(two)
    second.snapshotter = "overlayfs"
    with second.mounted(reference) as plain:
        wanted = picture(plain)
    assert shared == other == wanted
    assert stat.S_IMODE(wanted["setuid"][0]) == 0o4755  # type: ignore[arg-type]
    assert "gone" not in wanted


def test_two_nodes_at_once_download_each_layer_once(
    nodes: list[ContainerdNode], registry: Registry, image: Image
) -> None:
    reference = registry.add(image)
    threads = [threading.Thread(target=node.pull, args=(reference,)) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.layer_bytes(image) == sum(len(image.blobs[layer]) for layer in image.layers)
    for node in nodes:
        assert node.run(reference, "/bin/cat", "/answer") == "42\n"


def test_an_image_is_removed_and_pulled_again(nodes: list[ContainerdNode], registry: Registry, image: Image) -> None:
    first, _ = nodes
    reference = registry.add(image)
    first.pull(reference)
    published(first, image)
    once = registry.layer_bytes(image)
    first.remove_image(reference)
    assert first.ctr("snapshots", "--snapshotter", "podferry", "ls").stdout.count("sha256") == 0
    assert not names(first.home / "root/images")
    first.pull(reference)
    assert registry.layer_bytes(image) == once
    assert first.run(reference, "/bin/cat", "/answer") == "42\n"


def test_a_layer_with_a_wrong_digest_never_reaches_the_share(
    nodes: list[ContainerdNode], registry: Registry, image: Image
) -> None:
    bad = Image(image.name, dict(image.blobs), image.manifest, image.layers, image.chains)
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        file(tar, "evil", b"x")
    bad.blobs[image.layers[1]] = raw.getvalue()
    reference = registry.add(bad)
    with pytest.raises(grpc.RpcError):
        nodes[0].pull(reference)
    there = names(nodes[0].share / layout.LAYERS)
    assert layout.name_of(image.chains[1]) not in there
    reference = registry.add(image)
    nodes[1].pull(reference)  # containerd itself does not get over the wrong half in its content store
    assert nodes[1].run(reference, "/bin/cat", "/answer") == "42\n"


@pytest.mark.parametrize("name", ["../../escape", "/absolute-escape", "link/escape"])
def test_a_layer_that_reaches_outside_stays_inside(nodes: list[ContainerdNode], registry: Registry, name: str) -> None:
    def evil(tar: tarfile.TarFile) -> None:
        file(tar, "link", type=tarfile.SYMTYPE, linkname="/tmp")
        file(tar, name, b"evil")

    image = make_image(f"evil-{os.urandom(3).hex()}", base, evil)
    before = names(Path("/")) | names(Path("/tmp")) | names(nodes[0].share)
    with suppress(grpc.RpcError):
        nodes[0].pull(registry.add(image))
        published(nodes[0], image)
    assert names(Path("/")) | names(Path("/tmp")) | names(nodes[0].share) <= before
    root = nodes[0].home / "root"
    assert not list(root.glob("*escape*")) + list((root / "snapshots").glob("*escape*"))


def staying_on(node: ContainerdNode, image: Image) -> dict[str, str]:
    """The layers that are not shared, as the node's agent asks for them through containerd, and why."""
    with Containerd(node.socket, NAMESPACE) as client:
        return client.staying(node.snapshotter, image.chains)


def test_a_layer_with_a_device_node_works_here_and_is_not_shared(
    nodes: list[ContainerdNode], registry: Registry
) -> None:
    def device(tar: tarfile.TarFile) -> None:
        file(tar, "etc/disk", type=tarfile.BLKTYPE, devmajor=8, devminor=0)

    image = make_image(f"device-{os.urandom(3).hex()}", base, device)
    reference = registry.add(image)
    for node in nodes:
        node.pull(reference)
        assert node.run(reference, "/bin/cat", "/etc/changed") == "lower"
    there = names(nodes[0].share / layout.LAYERS)
    assert layout.name_of(image.chains[1]) not in there
    assert "etc/disk" in nodes[0].log()
    staying = staying_on(nodes[0], image)
    assert list(staying) == [image.chains[1]]
    assert "it holds a device node: 'etc/disk' (8:0)" in staying[image.chains[1]]


def test_a_layer_with_the_console_that_many_images_have_is_shared(
    nodes: list[ContainerdNode], registry: Registry
) -> None:
    def console(tar: tarfile.TarFile) -> None:
        file(tar, "dev/console", type=tarfile.CHRTYPE, devmajor=5, devminor=1)

    image = make_image(f"console-{os.urandom(3).hex()}", base, console)
    reference = registry.add(image)
    nodes[0].pull(reference)
    published(nodes[0], image)
    nodes[1].pull(reference)
    for node in nodes:
        assert node.run(reference, "/bin/cat", "/etc/changed") == "lower"
        assert staying_on(node, image) == {}
    assert layout.name_of(image.chains[1]) in names(nodes[0].share / layout.LAYERS)


@pytest.mark.parametrize("victim", ["snapshotter", "containerd"])
def test_killed_programs_come_back_to_whole_images(
    nodes: list[ContainerdNode], registry: Registry, image: Image, victim: str
) -> None:
    """Killed while a layer is on its way; then pulls on both nodes read every file."""
    first, second = nodes
    reference = registry.add(image)
    reached, go = threading.Event(), threading.Event()

    def pause(blob: str) -> None:
        if blob == image.layers[1]:
            reached.set()
            go.wait(30)

    def pull() -> None:
        with suppress(grpc.RpcError):
            first.pull(reference)

    registry.before = pause
    thread = threading.Thread(target=pull)
    thread.start()
    assert reached.wait(30)
    first.kill(victim)
    registry.before = lambda blob: None
    go.set()
    thread.join()
    (first.start_snapshotter if victim == "snapshotter" else first.start_containerd)()
    for node in nodes:
        node.pull(reference)
    with first.mounted(reference) as one, second.mounted(reference) as two:
        assert picture(one) == picture(two)
        assert (two / "answer").read_bytes() == b"42\n"


class Gate:
    """The snapshotter's gate: it stands at a step until the gate is opened."""

    at = images_gate.GATE

    @property
    def reached(self) -> bool:
        return self.at.with_suffix(".reached").exists()

    def arm(self, step: int) -> None:
        """Stop at this step from now on; 0 only counts."""
        self.at.with_suffix(".reached").unlink(missing_ok=True)
        self.at.write_text(str(step))

    def open(self) -> None:
        self.at.unlink(missing_ok=True)

    def steps(self) -> int:
        return int(self.at.with_suffix(".steps").read_text())


def pull_and_remove(node: ContainerdNode, image: Image, reference: str, gate: Gate) -> None:
    """What is interrupted. Errors are allowed then."""
    with suppress(grpc.RpcError, CommandFailed):
        node.pull(reference)
        wanted = {layout.name_of(chain) for chain in image.chains}
        for _ in range(400):
            if gate.reached or names(node.share / layout.LAYERS) >= wanted:
                break
            threading.Event().wait(0.05)
        node.remove_image(reference)


@pytest.mark.parametrize("every", [23, pytest.param(2, marks=pytest.mark.slow)])
def test_containerd_killed_at_steps_of_a_pull_and_a_removal(
    nodes: list[ContainerdNode], registry: Registry, every: int
) -> None:
    """The snapshotter stands still at a step while containerd dies; then pulls on both nodes read every file."""
    first, second = nodes
    gate = Gate()
    gate.at.parent.mkdir(exist_ok=True)
    first.kill("snapshotter")
    first.start_snapshotter(str(Path(images_gate.__file__)))
    counted = make_image(f"image-{os.urandom(3).hex()}", base, above)
    gate.arm(0)
    try:
        for _ in range(20):  # the pull fails until containerd comes back to its snapshotter
            pull_and_remove(first, counted, registry.add(counted), gate)
            if names(first.share / layout.LAYERS):
                break
        total = gate.steps()
        assert total > 20, "the steps are counted"
        tried, reached = range(1, total, every), 0
        for step in tried:
            image = make_image(f"image-{os.urandom(3).hex()}", base, above)
            reference = registry.add(image)
            gate.arm(step)
            work = threading.Thread(target=pull_and_remove, args=(first, image, reference, gate))
            work.start()
            while work.is_alive() and not gate.reached:
                work.join(0.02)
            reached += gate.reached
            first.kill("containerd")
            gate.open()
            work.join()
            first.start_containerd()
            for node in nodes:
                node.pull(reference)
            with first.mounted(reference) as one, second.mounted(reference) as two:
                assert picture(one) == picture(two), f"step {step} of {total}"
                assert (two / "etc/changed").read_bytes() == b"upper"
            for node in nodes:
                node.remove_image(reference)
        assert reached >= len(tried) * 0.7, f"{reached} of {len(tried)} steps were reached"
    finally:
        gate.open()


def test_containers_and_pulls_survive_a_killed_snapshotter(
    nodes: list[ContainerdNode], registry: Registry, image: Image
) -> None:
    first, _ = nodes
    reference = registry.add(image)
    first.pull(reference)
    published(first, image)
    flags = ["--snapshotter", "podferry", "--detach"]
    first.ctr("run", *flags, reference, "stays", "/bin/sh", "-c", "while :; do read x < /etc/changed; done")
    first.kill("snapshotter")
    first.start_snapshotter()
    said = first.ctr("tasks", "exec", "--exec-id", "e", "stays", "/bin/cat", "/answer").stdout
    assert said == "42\n"
    assert first.run(reference, "/bin/cat", "/answer") == "42\n"
    first.ctr("tasks", "kill", "--signal", "KILL", "stays")
    first.ctr("tasks", "delete", "--force", "stays", check=False)
    first.ctr("containers", "delete", "stays")


def test_a_node_on_a_read_only_mount_uses_what_is_there(
    nodes: list[ContainerdNode], registry: Registry, image: Image
) -> None:
    """An image that nobody has shared works there too, from the node's own disk."""
    first, _ = nodes
    alone = make_image(f"alone-{os.urandom(3).hex()}", base)
    reference = registry.add(image)
    first.pull(reference)
    published(first, image)
    for writer in nodes:  # they keep house on the share at any time
        writer.kill("snapshotter")
    before = sorted(str(one) for one in Path(first.share).rglob("*"))
    mount = first.home.parent / "read-only"
    mount.mkdir()
    run(["mount", "--bind", first.share, mount])
    run(["mount", "-o", "remount,bind,ro", mount])
    reader = ContainerdNode(first.home.parent / "n3", mount, "n3", options=["--read-only"])
    try:
        with pytest.raises(OSError, match="Read-only"):
            (mount / "anything").touch()
        reader.start()
        once = registry.layer_bytes(image)
        reader.pull(reference)
        assert registry.layer_bytes(image) == once
        assert reader.run(reference, "/bin/cat", "/answer") == "42\n"
        reader.pull(registry.add(alone))
        assert reader.run(registry.add(alone), "/bin/cat", "/etc/changed") == "lower"
        reader.kill("snapshotter")
        reader.start_snapshotter()
        assert runs_again(reader, reference) == "42\n"
        assert sorted(str(one) for one in Path(first.share).rglob("*")) == before
        assert "PF25" not in reader.log()
    finally:
        reader.stop()
        unmount(mount)


def runs_again(node: ContainerdNode, reference: str) -> str:
    """A container's output, once containerd has noticed that the snapshotter is back."""
    for _ in range(20):
        try:
            return node.run(reference, "/bin/cat", "/answer")
        except CommandFailed as error:
            if "dialing" not in error.report():
                raise
            threading.Event().wait(0.5)
    raise AssertionError("containerd never came back to the snapshotter")
