"""The two roots that labs are made of: the nodes' and the jobs'. Both are Debian, built once and kept by recipe."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from podferry.lab import oci
from podferry.lab.cache import cached, remove
from podferry.lab.debian import SUITE, architecture, bootstrap
from podferry.lab.progress import Progress
from podferry.lab.state import CACHE

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
    "var/lib/dpkg",
]
# Raised by hand when what is done to a root changes, but none of its packages.
EDITION = 1


def node_root(progress: Progress) -> Path:
    """The directory of the nodes' root. The first time takes a minute or two."""
    recipe = {"suite": SUITE, "packages": NODE_PACKAGES, "arch": architecture(), "edition": EDITION}
    return cached("node", recipe, lambda into: _build("node image", NODE_PACKAGES, into, progress))


def job_archive(progress: Progress) -> Path:
    """The OCI archive of `JOB_IMAGE`. The first time takes a minute."""
    arch = architecture()
    recipe = {
        "suite": SUITE,
        "packages": JOB_PACKAGES,
        "without": JOB_UNUSED,
        "arch": arch,
        "edition": EDITION,
        "name": JOB_IMAGE,
    }

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
                architecture=arch,
                command=["python3"],
                env=["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONUNBUFFERED=1"],
            )
        finally:
            remove(root)

    return cached("job", recipe, build, suffix=".tar")


def pause_archive(progress: Progress) -> Path:
    """The OCI archive of `PAUSE_IMAGE`: two static programs of the nodes' root."""
    root = node_root(progress)
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


def _build(what: str, packages: list[str], into: Path, progress: Progress) -> None:
    bootstrap(packages, into, CACHE / "debs", lambda step: progress(f"{what}: {step}"))
