"""podferry's container image: the job image's Debian, the locked packages, podferry itself, and the CRIU for nodes."""

from __future__ import annotations

import hashlib
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from podferry import __version__
from podferry.install.criu_bundle import DIRECTORY
from podferry.lab import oci, root_images, site, spdx
from podferry.lab.build_cache import cached, remove
from podferry.lab.debian import SUITE
from podferry.lab.kubernetes import portable_criu
from podferry.lab.progress import Progress
from podferry.node.process import run

NAME = "podferry.local/podferry"
"""What `deploy/` calls the image; kustomize puts a registry's name in its place."""
PROGRAMS = {
    "podferry": "podferry.cli",
    "podferry-agent": "podferry.agent.program",
    "podferry-controller": "podferry.controller.program",
    "podferry-snapshotter": "podferry.snapshotter",
}
COMMAND = ["podferry-agent"]
ENV = [
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONPATH=/opt/podferry/src:/opt/podferry/site",
    "PYTHONUNBUFFERED=1",
]
_COMPILE = (
    'mount --bind "$1" "$2/mnt"; '
    'exec chroot "$2" python3 -m compileall -q -s /mnt -p "$3" --invalidation-mode unchecked-hash /mnt'
)


def tag() -> str:
    """A tag for the image of the modules as they are now, which may be others under the same version tomorrow."""
    return f"{__version__}-{_digest(site.PACKAGE)[:12]}"


def archive(progress: Progress, tag: str = __version__) -> Path:
    """The image's OCI archive, called `NAME`:`tag`. Only what changed since the last time is made anew."""
    root, base = root_images.node_root(progress, SUITE), root_images.job_archive(progress)
    packages, own_criu = site.site(root, progress), portable_criu.bundle(progress)
    recipe = {
        "base": base.name,
        "site": packages.name,
        "criu": own_criu.name,
        "package": _digest(site.PACKAGE),
        "tag": tag,
        "programs": PROGRAMS,
        "env": ENV,
    }

    def build(into: Path) -> None:
        progress("podferry image: packing")
        trees = into.with_name("podferry.trees")
        remove(trees)  # of a build that was killed
        try:
            below, above = trees / "packages", trees / "podferry"
            shutil.copytree(packages, below / "opt/podferry/site", symlinks=True)
            shutil.copytree(own_criu, above / DIRECTORY[1:])
            spdx.write(above, _contents(base, packages, own_criu, tag))
            source = above / "opt/podferry/src"
            shutil.copytree(site.PACKAGE, source / "podferry", ignore=shutil.ignore_patterns("__pycache__"))
            run(["unshare", "--mount", "sh", "-ec", _COMPILE, "sh", source, root, "/opt/podferry/src"])
            for name, module in PROGRAMS.items():
                program = above / "usr/local/bin" / name
                program.parent.mkdir(parents=True, exist_ok=True)
                program.write_text(f"#!/usr/bin/python3\nfrom {module} import main\n\nmain()\n")
                program.chmod(0o755)
            oci.extend(base, into, [below, above], reference=f"{NAME}:{tag}", command=COMMAND, env=ENV)
        finally:
            remove(trees)

    return cached("podferry", recipe, build, suffix=".tar")


def _contents(base: Path, packages: Path, own_criu: Path, tag: str) -> dict[str, Any]:
    """What the image is made of. Its time is that of the base, so that what is made again is the same."""
    made_of = [
        *spdx.of_debian(oci.read(base, "var/lib/dpkg/status").decode()),
        *spdx.of_debian((own_criu / portable_criu.PACKAGE_LIST).read_text()),
        *spdx.of_python(packages),
        spdx.Package("generic", "podferry", __version__),
    ]
    return spdx.document(NAME, tag, made_of, created=datetime.fromtimestamp(base.stat().st_mtime, UTC))


def _digest(package: Path) -> str:
    """What podferry's modules are, whenever and wherever they were checked out."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(
                f"{path.relative_to(package)}\0{path.stat().st_mode & 0o111}\0{path.stat().st_size}\0".encode()
            )
            digest.update(path.read_bytes())
    return digest.hexdigest()


def main(into: str = "") -> None:
    """Make the image, and say by which digest a cluster can hold to exactly this one."""
    made = archive(lambda step: print(step, file=sys.stderr))
    digest = oci.digest(made)
    if into:
        Path(into).with_suffix(".digest").write_text(f"{digest}\n")
    print(shutil.copy(made, into) if into else made)
    print(f"deploy it by its digest: kustomize edit set image {NAME}=REGISTRY/podferry@{digest}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
