"""Images in a lab: pushed to a real registry, pulled by real containerds, shared through the network file system."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from moving import A, B, Cluster, until

from podferry.cli.images import show
from podferry.errors import UsageError
from podferry.lab import Lab, containers, oci, registry, root_images
from podferry.lab.builder import Recipe, build
from podferry.lab.debian import architecture
from podferry.lab.machine_config import METRICS_PORT, REGISTRY, SNAPSHOTTER
from podferry.lab.progress import quiet
from podferry.node.process import run
from podferry.snapshotter import open_share

pytestmark = pytest.mark.lab
TINY = f"{REGISTRY}/tiny:1"
CTR = ["ctr", "-n", containers.NAMESPACE]


def archive(into: Path, text: str, reference: str = TINY) -> Path:
    """An image of two layers: a static shell below, and a file that says `text`."""
    root = into / f"root-{text}"
    (root / "bin").mkdir(parents=True)
    shell = root_images.node_root(quiet) / "usr/bin/busybox"
    (root / "bin/busybox").write_bytes(shell.read_bytes())
    (root / "bin/busybox").chmod(0o755)
    (root / "bin/sh").symlink_to("busybox")
    (root / "says").write_text(f"{text}\n")
    path = into / f"{text}.tar"
    options = {"reference": reference, "architecture": architecture(), "command": ["/bin/sh"], "env": []}
    oci.write_archive(root, path, **options, lower={"bin", "bin/busybox", "bin/sh"})  # type: ignore[arg-type]
    return path


def layers_of(path: Path) -> list[str]:
    """The digests of an archive's layers."""
    with tarfile.open(path) as tar:

        def member(name: str) -> dict[str, list[dict[str, str]]]:
            file = tar.extractfile(name)
            assert file is not None
            found: dict[str, list[dict[str, str]]] = json.load(file)
            return found

        manifest = member(f"blobs/{member('index.json')['manifests'][0]['digest'].replace(':', '/')}")
    return [one["digest"] for one in manifest["layers"]]


def layer_bytes(lab: Lab, node: str, layers: list[str]) -> int:
    """How much of these layers the registry has sent to a node."""
    return sum(one.bytes for one in registry.downloads(lab) if one.machine == node and one.digest in layers)


def says(lab: Lab, node: str) -> str:
    """What a container of the image on a node reads."""
    argv = ["run", "--rm", "--snapshotter", SNAPSHOTTER, TINY, "reader", "/bin/sh", "-c", "read x < /says; echo $x"]
    return lab.exec(node, [*CTR, *argv]).stdout.strip()


@pytest.fixture
def pushed(lab: Lab, tmp_path: Path) -> Iterator[list[str]]:
    """The tiny image in the registry, and on no node; its layers."""
    path = archive(tmp_path, "first")
    assert containers.push(lab, path, compress=False) == TINY
    yield layers_of(path)
    for node in (A, B):
        lab.exec(node, [*CTR, "images", "remove", "--sync", TINY], check=False)


def chains_of(layers: list[str]) -> set[str]:
    """The names of uncompressed layers on the share: each is that of the layer below and its own, hashed (image-spec)."""
    chains = layers[:1]
    for layer in layers[1:]:
        chains.append("sha256:" + hashlib.sha256(f"{chains[-1]} {layer}".encode()).hexdigest())
    return {chain.replace(":", "-") for chain in chains}


def published(lab: Lab) -> set[str]:
    return set(open_share(lab.root(A) / "share/images", create=False, read_only=True).names("layers"))


def test_the_second_node_downloads_no_layer(lab: Lab, pushed: list[str]) -> None:
    containers.pull(lab, A, TINY)
    assert layer_bytes(lab, A, pushed) > 1 << 20
    until(lambda: chains_of(pushed) <= published(lab), "both layers are on the share")
    containers.pull(lab, B, TINY)
    assert [says(lab, node) for node in (A, B)] == ["first", "first"]
    assert layer_bytes(lab, B, pushed) == 0
    assert not set(pushed) & set(lab.exec(B, [*CTR, "content", "list", "-q"]).stdout.split())


def test_what_is_pushed_again_is_pulled_again(lab: Lab, pushed: list[str], tmp_path: Path) -> None:
    containers.pull(lab, A, TINY)
    assert says(lab, A) == "first"
    containers.push(lab, archive(tmp_path, "second"))  # compressed, for a change
    containers.pull(lab, A, TINY)
    assert says(lab, A) == "second"


def test_the_registry_stands_in_for_every_other_one(lab: Lab, tmp_path: Path) -> None:
    containers.push(lab, archive(tmp_path, "elsewhere", "registry.example/team/tiny:3"), compress=False)
    pull = ["images", "pull", "--local", "--hosts-dir", "/etc/containerd/certs.d", "registry.example/team/tiny:3"]
    lab.exec(B, [*CTR, *pull])
    assert "registry.example/team/tiny:3" in lab.exec(B, [*CTR, "images", "list", "-q"]).stdout
    lab.exec(B, [*CTR, "images", "remove", "registry.example/team/tiny:3"])


def test_an_image_that_the_registry_does_not_have(lab: Lab) -> None:
    with pytest.raises(UsageError, match=r"no image podferry\.local/no-such-image:latest"):
        containers.start(lab, A, "nothing", ["true"], image="no-such-image")
    with pytest.raises(UsageError, match="not an OCI archive"):
        containers.start(lab, A, "nothing", ["true"], image=__file__)


def test_a_target_that_never_saw_the_image(lab: Lab) -> None:
    """It needs neither registry nor manifest; the layers come from the share."""
    cluster = Cluster(lab)
    for node in (A, B):
        lab.exec(node, [*CTR, "images", "remove", "--sync", root_images.JOB_IMAGE], check=False)
    asked = [one for one in registry.downloads(lab) if one.machine == B]
    content = lab.exec(B, [*CTR, "content", "list", "-q"]).stdout
    cluster.start("newcomer", "simple", "16")
    try:
        moved = cluster.migrate("newcomer", source=A)
        assert moved["outcome"] == "completed", moved["error"]
        cluster.goes_on(B, "newcomer")
        assert [one for one in registry.downloads(lab) if one.machine == B] == asked
        assert set(lab.exec(B, [*CTR, "content", "list", "-q"]).stdout.split()) <= set(content.split())
        assert root_images.JOB_IMAGE not in lab.exec(B, [*CTR, "images", "list", "-q"]).stdout.split()
    finally:
        cluster.stop("newcomer")
        containers.pull(lab, A, root_images.JOB_IMAGE)


def test_podferry_images_shows_the_labs_share(lab: Lab, pushed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    containers.pull(lab, A, TINY)

    def users() -> dict[str, list[str]]:
        capsys.readouterr()
        show(lab=lab.name, json=True)
        report = json.loads(capsys.readouterr().out)
        assert report["state"] == "ok"
        return {layer["chain"].replace(":", "-"): layer["users"] for layer in report["layers"]}

    until(lambda: all(A in users().get(one, []) for one in chains_of(pushed)), "node-a uses the image's layers")


def metrics(lab: Lab, node: str) -> dict[str, float]:
    """What a node's snapshotter tells Prometheus, by name and labels."""
    script = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{METRICS_PORT}/metrics').read().decode())"
    text = lab.exec(node, ["python3", "-c", script]).stdout
    lines = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_metrics_count_what_happens(lab: Lab, pushed: list[str]) -> None:
    before = metrics(lab, A)
    containers.pull(lab, A, TINY)
    name = 'podferry_snapshotter_calls_total{call="Prepare",code="%s"}'
    seen = ("podferry_layers_published_total", name % "OK", name % "ALREADY_EXISTS")

    def more() -> list[float]:
        now = metrics(lab, A)
        return [now.get(one, 0.0) - before.get(one, 0.0) for one in seen]

    # Published before by another test, the layers are found; else they are made here.
    until(lambda: more()[0] >= 2 or more()[2] >= 2, "the layers are counted")
    now = metrics(lab, A)
    assert now["podferry_share_up"] == 1
    assert now["podferry_share_free_bytes"] > 1 << 20
    assert now["podferry_share_calls_stuck"] == 0


@pytest.mark.slow
def test_an_image_from_debian_packages(own_lab: Lab) -> None:
    recipe = Recipe(f"{REGISTRY}/test-numpy:1", ["python3-numpy"], ["python3"], {"GREETING": "hello"})
    path = build(recipe, print)
    assert build(recipe, print) == path
    own_lab.up(2, agent=False, progress=print)
    containers.push(own_lab, path)
    script = "import numpy, os; print(os.environ['GREETING'], numpy.arange(5).sum(), flush=True)"
    for node in (A, B):
        containers.start(own_lab, node, f"sum-{node}", ["python3", "-c", script], image="test-numpy:1")
        said = b"".join(containers.output(own_lab, f"sum-{node}", follow=True))
        assert said == b"hello 10\n"
    run(["rm", "-f", path, path.with_suffix(".json")])
