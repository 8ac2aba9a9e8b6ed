"""The two roots that labs are made of: the nodes' and the jobs'. Both are Debian, built once and kept by recipe."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from podferry.lab import oci
from podferry.lab.build_cache import cached, place, remove
from podferry.lab.debian import OF_NODES, SUITE, architecture, bootstrap
from podferry.lab.progress import Progress
from podferry.lab.state import CACHE
from podferry.node.process import CLEAN_ENVIRONMENT

JOB_IMAGE = "podferry.local/job:1"
"""The image `podferry lab run` uses by default: Debian's python3 with its whole standard library."""

PAUSE_IMAGE = "podferry.local/pause:1"
"""What keeps a pod's namespaces in the lab's Kubernetes."""

NODE_PACKAGES = [
    "attr",
    "busybox-static",
    "ca-certificates",
    "containerd",
    "containernetworking-plugins",
    "criu",
    "docker-registry",
    "e2fsprogs",
    "erofs-utils",
    "etcd-client",
    "etcd-server",
    "fuse3",
    "glusterfs-client",
    "glusterfs-server",
    "iproute2",
    "iptables",
    "iputils-ping",
    "kmod",
    "procps",
    "python3",
    "runc",
    "runit",
    "skopeo",
    "tini",
]
JOB_PACKAGES = ["python3", "libpython3-stdlib"]
# Nobody installs packages in a job; without these every node unpacks the image in two thirds of the time.
JOB_UNUSED = [
    "usr/lib/*/gconv",
    "usr/lib/*/perl-base",
    "usr/lib/apt",
    "usr/share/bash-completion",
    "usr/share/debconf",
    "usr/share/perl5",
    "var/lib/apt",
    "var/lib/dpkg/*-old",
    "var/lib/dpkg/alternatives",
    "var/lib/dpkg/info",
    "var/lib/dpkg/lock*",
    "var/lib/dpkg/parts",
    "var/lib/dpkg/triggers",
    "var/lib/dpkg/updates",
]
"""The database of packages, `var/lib/dpkg/status`, stays: scanners read it."""
# Raised by hand when what is done to a root changes, but none of its packages.
EDITION = 1


def node_root(progress: Progress, suite: str = OF_NODES) -> Path:
    """The directory of the nodes' root. The first time takes a minute or two."""
    kind, recipe = _node_recipe(suite)
    return cached(kind, recipe, lambda into: _build("node image", NODE_PACKAGES, into, progress, suite))


def _node_recipe(suite: str) -> tuple[str, dict[str, object]]:
    recipe = {"suite": suite, "packages": NODE_PACKAGES, "arch": architecture(), "edition": EDITION}
    return "node" if suite == SUITE else f"node.{suite}", recipe


def python_of(root: Path) -> str:
    """The version of a root's python3, such as 3.13."""
    return (root / "usr/bin/python3").readlink().name.removeprefix("python")


def containerd_of(root: Path) -> int:
    """The major version of a root's containerd."""
    said = re.search(r"^Package: containerd\n(?:.+\n)*?Version: (\d+)\.", _dpkg_status(root), re.MULTILINE)
    assert said is not None, f"no containerd in {root}"
    return int(said[1])


def _dpkg_status(root: Path) -> str:
    return (root / "var/lib/dpkg/status").read_text()


def job_archive(progress: Progress) -> Path:
    """The OCI archive of `JOB_IMAGE`. The first time takes a minute."""

    def build(into: Path) -> None:
        root = into.with_name("job.root")
        remove(root)  # of a build that was killed
        try:
            _build("job image", JOB_PACKAGES, root, progress)
            for pattern in JOB_UNUSED:
                for path in root.glob(pattern):
                    remove(path)
            progress("job image: packing")
            oci.write_archive(
                root,
                into,
                reference=JOB_IMAGE,
                architecture=architecture(),
                command=["python3"],
                env=["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONUNBUFFERED=1"],
            )
        finally:
            remove(root)

    return cached("job", _job_recipe(), build, suffix=".tar")


def _job_recipe() -> dict[str, object]:
    return {
        "suite": SUITE,
        "packages": JOB_PACKAGES,
        "without": JOB_UNUSED,
        "arch": architecture(),
        "edition": EDITION,
        "name": JOB_IMAGE,
    }


@dataclass(frozen=True)
class Unbuilt:
    """An image that a lab needs and that is not built yet: what it costs in bytes of disk, the packages it is made from
    included, and in seconds on a machine of two processors with a quick mirror."""

    name: str
    size: int
    seconds: int


NODE, JOB = ALL = (Unbuilt("node image", 1200 << 20, 45), Unbuilt("job image", 400 << 20, 10))


def unbuilt(suite: str = OF_NODES) -> list[Unbuilt]:
    """What `Lab.up` will have to build first, with nodes made of `suite`."""
    if not shutil.which("dpkg", path=CLEAN_ENVIRONMENT["PATH"]):
        return [*ALL]  # it tells which images are this machine's
    places = {NODE: place(*_node_recipe(suite)), JOB: place("job", _job_recipe(), ".tar")}
    return [image for image, path in places.items() if not path.exists()]


def pause_archive(progress: Progress) -> Path:
    """The OCI archive of `PAUSE_IMAGE`: two static programs of the nodes' root."""
    root = node_root(progress, SUITE)
    programs = [root / "usr/bin/tini-static", root / "usr/bin/busybox"]
    recipe = {"root": root.name, "programs": [one.name for one in programs], "name": PAUSE_IMAGE, "edition": EDITION}

    def build(into: Path) -> None:
        with tempfile.TemporaryDirectory() as tree:
            for program in programs:
                shutil.copy(program, tree)
            oci.write_archive(
                Path(tree),
                into,
                reference=PAUSE_IMAGE,
                architecture=architecture(),
                command=["/tini-static", "--", "/busybox", "sleep", "inf"],
                env=["PATH=/"],
            )

    return cached("pause", recipe, build, suffix=".tar")


def _build(what: str, packages: list[str], into: Path, progress: Progress, suite: str = SUITE) -> None:
    usual = next(one.seconds for one in ALL if one.name == what)
    progress(f"{what}: built once, which usually takes {usual} s")
    bootstrap(packages, into, CACHE / "debs", lambda step: progress(f"{what}: {step}"), suite)
