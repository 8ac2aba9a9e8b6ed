"""What shared images are worth: a node pulls, a second one starts, ten ask at once; beside containerd's own overlayfs."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol, runtime_checkable

from podferry.bench.moves import SOURCE, TARGET
from podferry.errors import TimedOut
from podferry.lab import Lab, builder, containers, registry
from podferry.lab.machine_config import REGISTRY, SNAPSHOTTER
from podferry.lab.progress import Progress
from podferry.lab.state import STORAGE
from podferry.node.process import run
from podferry.snapshotter import layout
from podferry.snapshotter.layout import FormName

IMAGE = builder.Recipe(
    f"{REGISTRY}/bench:1",
    ("python3-numpy", "python3-scipy", "python3-pandas", "python3-sklearn", "python3-sympy", "python3-networkx"),
    ("python3",),
)
"""About 500 MB of files, of which the job imports numpy and scipy."""

OVERLAYFS = "overlayfs"
BRICK = "srv/brick/images/layers"
PUBLISHED_SECONDS = 300.0
WARM = 3
"""How often the job imports what it has just imported."""

# Modules that programs use: scipy itself imports hardly anything.
IMPORTING = """
import time
begun = time.perf_counter()
import numpy, scipy, scipy.linalg, scipy.optimize, scipy.sparse, scipy.stats
print(time.perf_counter() - begun)
"""
_CTR = ["ctr", "-n", containers.NAMESPACE]

Record = dict[str, Any]


@runtime_checkable
class Measurement(Protocol):
    """Something that is measured in a lab without a job that moves."""

    def measure(self, lab: Lab, progress: Progress) -> Record:
        """Measure once; what was found."""
        ...


@dataclass(frozen=True)
class Pulls:
    """One node pulls an image that nobody has, then another one starts containers of it.

    `form` is how podferry's snapshotter publishes layers; empty for containerd's own overlayfs. Each measurement follows the same
    pulls, which are not measured: a disk's file system may be slower for minutes after many files were deleted, and each method
    would pay for the one before it. (ext4 without a journal makes no new file of what was deleted within the last minute, or the
    last six, and passes over all of it for each: `recently_deleted` in Linux's fs/ext4/ialloc.c.)
    """

    form: str = ""

    def measure(self, lab: Lab, progress: Progress) -> Record:
        """Times in ms; `second_link_bytes` is all that the second node received until its container had ended."""
        before = _Image(lab, "")
        before.make_ready(progress)
        for node in (SOURCE, TARGET):
            before.pull(node)
        image = _Image(lab, self.form)
        image.make_ready(progress)
        first = _timed(lambda: image.pull(SOURCE))
        published = _timed(image.wait_published) if self.form else 0.0
        received, downloaded = _received(lab, TARGET), len(registry.downloads(lab))
        second = _timed(lambda: image.run(TARGET, ["true"]))
        received = _received(lab, TARGET) - received
        layers = image.layers_among(registry.downloads(lab)[downloaded:])
        _drop_caches()
        needed = -_received(lab, TARGET)
        first_cold = image.importing(TARGET)
        needed += _received(lab, TARGET)
        read_by = time.time()
        warm = [image.importing(TARGET) for _ in range(WARM)]
        if self.form == FormName.EROFS:
            image.wait_noted(read_by)
        _drop_caches()
        cold = image.importing(TARGET)
        return {
            "outcome": "completed",
            "first_pull_ms": first,
            "published_ms": published,
            "second_start_ms": second,
            "second_layer_bytes": sum(one.bytes for one in layers),
            "second_link_bytes": received,
            "import_first_ms": first_cold,
            "import_first_link_bytes": needed,
            "import_cold_ms": cold,
            "import_warm_ms": median(warm),
            "share_bytes": image.share_bytes() if self.form else None,
            "facts": image.facts,
        }


@dataclass(frozen=True)
class Crowd:
    """All nodes of the lab pull an image that nobody has at the same moment."""

    form: str

    def measure(self, lab: Lab, progress: Progress) -> Record:
        """`unpacked` is how often the layer was downloaded that was downloaded most; bytes on the share are those when
        every node has run a container of the image."""
        image = _Image(lab, self.form)
        image.make_ready(progress)
        names = [node.name for node in lab.status().nodes]
        downloaded = len(registry.downloads(lab))
        with ThreadPoolExecutor(len(names)) as pool:
            together = _timed(lambda: list(pool.map(image.pull, names)))
        image.wait_published()
        for name in names:
            image.run(name, ["true"])
        layers = image.layers_among(registry.downloads(lab)[downloaded:])
        return {
            "outcome": "completed",
            "all_have_it_ms": together,
            "unpacked": max(Counter(one.digest for one in layers).values()),
            "share_bytes": image.share_bytes(),
            "facts": image.facts | {"nodes": len(names)},
        }


class _Image:
    """The benchmark's image in a lab, as its nodes have it through one snapshotter."""

    def __init__(self, lab: Lab, form: str) -> None:
        self._lab, self._form = lab, form
        self._snapshotter = SNAPSHOTTER if form else OVERLAYFS
        self._layers: set[str] = set()
        self._chains: list[str] = []
        self.facts: dict[str, int] = {}

    def make_ready(self, progress: Progress) -> None:
        """Have the image in the registry and nowhere else, and have the snapshotters publish in the right form."""
        lab = self._lab
        archive = builder.build(IMAGE, progress)
        if not registry.has(lab, IMAGE.reference):
            progress("pushing the image")
            containers.push(lab, archive)
        manifest, config = (registry.inspect(lab, IMAGE.reference, *words) for words in ([], ["--config"]))
        self._layers = {one["digest"] for one in manifest["layers"]}
        self._chains = _chains(config["rootfs"]["diff_ids"])
        packed = sum(one["size"] for one in manifest["layers"])
        self.facts = {"image_bytes": archive.stat().st_size, "packed_bytes": packed, "layers": len(self._layers)}
        nodes = [node.name for node in lab.status().nodes]
        with ThreadPoolExecutor(len(nodes)) as pool:
            restarted = list(pool.map(self._forget, nodes))
        if any(restarted):
            lab.up(progress=progress)  # waits for them
        kinds = (layout.LAYERS, layout.READ)
        doomed = " ".join(f"/share/images/{kind}/{layout.name_of(chain)}" for chain in self._chains for kind in kinds)
        lab.exec(SOURCE, ["sh", "-ec", f"rm -rf {doomed}; sync"])

    def _forget(self, node: str) -> bool:
        """Take the image from a node; true if its snapshotter had to begin anew for another form."""
        lab = self._lab
        lab.exec(node, [*_CTR, "images", "remove", "--sync", IMAGE.reference], check=False)
        options = lab.root(node) / "etc/podferry/snapshotter.options"
        wanted = f"--form {self._form}\n"
        if not self._form or (options.exists() and options.read_text() == wanted):
            return False
        options.write_text(wanted)
        for service in ("snapshotter", "containerd"):
            lab.exec(node, ["sv", "restart", f"/run/service/{service}"])
        return True

    def pull(self, node: str) -> None:
        """Have a node's containerd pull the image, where it has it not."""
        containers.pull(self._lab, node, IMAGE.reference, snapshotter=self._snapshotter)

    def run(self, node: str, argv: Sequence[str]) -> str:
        """The same, and run a container of it to its end; its output."""
        self.pull(node)
        words = ["run", "--rm", "--cpu-shares=0", "--snapshotter", self._snapshotter, IMAGE.reference]
        return self._lab.exec(node, [*_CTR, *words, f"bench-{time.monotonic_ns()}", *argv]).stdout

    def importing(self, node: str) -> float:
        """How long the job in a new container needs to import numpy and scipy, in ms."""
        return float(self.run(node, ["python3", "-c", IMPORTING])) * 1e3

    def wait_published(self) -> None:
        """Wait until every layer is on the share. Raises `TimedOut`."""
        wanted = set(map(layout.name_of, self._chains))
        deadline = time.monotonic() + PUBLISHED_SECONDS
        while wanted - {one.name for one in (self._lab.root(STORAGE) / BRICK).iterdir()}:
            if time.monotonic() > deadline:
                raise TimedOut("the image's layers were not published", remedy="see snapshotter.log on the nodes")
            time.sleep(0.05)  # on the storage node it is no event

    def wait_noted(self, since: float) -> None:
        """Wait until it stands on the share what a job has read of a layer that ended at `since`. Raises `TimedOut`."""
        noted = self._lab.root(STORAGE) / BRICK.replace(layout.LAYERS, layout.READ)
        deadline = time.monotonic() + PUBLISHED_SECONDS
        lists = [noted / layout.name_of(chain) for chain in self._chains]
        while not any(one.exists() and one.stat().st_mtime > since for one in lists):
            if time.monotonic() > deadline:
                raise TimedOut(
                    "no snapshotter recorded which layers the job read", remedy="see snapshotter.log on the nodes"
                )
            time.sleep(0.05)

    def share_bytes(self) -> int:
        """Bytes that the image's layers take on the storage node's disk."""
        layers = [f"/{BRICK}/{layout.name_of(chain)}" for chain in self._chains]
        usage = self._lab.exec(STORAGE, ["du", "--summarize", "--total", "--block-size=1", *layers]).stdout
        return int(usage.splitlines()[-1].split()[0])

    def layers_among(self, downloads: Sequence[registry.Download]) -> list[registry.Download]:
        """Those downloads that are of the image's layers."""
        return [one for one in downloads if one.digest in self._layers]


def _chains(diffs: Sequence[str]) -> list[str]:
    """The chain ids of an image's layers (image-spec, config.md, "Layer ChainID")."""
    chains = list(diffs[:1])
    for diff in diffs[1:]:
        chains.append("sha256:" + hashlib.sha256(f"{chains[-1]} {diff}".encode()).hexdigest())
    return chains


def _timed(act: Callable[[], object]) -> float:
    begun = time.monotonic()
    act()
    return (time.monotonic() - begun) * 1e3


def _received(lab: Lab, node: str) -> int:
    """Bytes that have come to a node over its link."""
    shown = json.loads(lab.exec(node, ["ip", "-json", "-statistics", "link", "show", "eth0"]).stdout)
    return int(shown[0]["stats64"]["rx"]["bytes"])


def _drop_caches() -> None:
    """Empty the page cache of the whole machine: the nodes' and the storage node's alike."""
    run(["sync"])
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
