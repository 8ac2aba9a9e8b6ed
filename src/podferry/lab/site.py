"""The Python packages that nodes need, installed from the project's locks for the nodes' own Python."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import podferry
from podferry.errors import UsageError
from podferry.lab.build_cache import cached
from podferry.lab.downloads import downloads
from podferry.lab.progress import Progress
from podferry.lab.root_images import python_of
from podferry.lab.state import CACHE
from podferry.node.process import CLEAN_ENVIRONMENT, run

PACKAGE = Path(podferry.__file__).parent
CHECKOUT = PACKAGE.parents[1]
DEVELOPMENT = ["pytest", "hypothesis"]
"""What tests need that run inside a node."""


def site(root: Path, progress: Progress, *, wheels: str = "") -> Path:
    """The directory with podferry's own dependencies, for the nodes' python3 of the image `root`; where that is not of this
    machine's processor, `wheels` is what uv calls its platform (`aarch64-unknown-linux-gnu`)."""
    lock = _lock("requirements.lock")
    options = ["--require-hashes", "--requirements", str(lock)]
    return _install("site", root, lock, options, wheels, progress)


def development(root: Path, progress: Progress, *, wheels: str = "") -> Path:
    """The directory with `DEVELOPMENT` and what these need, see `site`."""
    lock = _lock("requirements-dev.lock")
    return _install("dev", root, lock, ["--constraints", str(lock), *DEVELOPMENT], wheels, progress)


def _install(kind: str, root: Path, lock: Path, options: list[str], wheels: str, progress: Progress) -> Path:
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    python = python_of(root)
    recipe = {"lock": digest, "python": python, "options": [one for one in options if one != str(lock)]}

    def build(into: Path) -> None:
        progress(f"installing Python packages from {lock.name}")
        target = ["--target", str(into), "--python-version", python, "--only-binary", ":all:"]
        target += ["--python-platform", wheels] if wheels else []
        argv = [_uv(progress), "pip", "install", "--quiet", "--no-config", *target, *options]
        run(argv, env=downloads(), remedy="is the package index reachable?")
        if not wheels:
            _compile(root, into, f"/opt/podferry/{kind}")

    release = root.name.partition("-")[0].removeprefix("node")  # empty, or a dot and its name
    return cached(f"{kind}{release}", recipe, build)


def _compile(root: Path, packages: Path, seen_as: str) -> None:
    """Compile with the nodes' own interpreter: to the nodes the directory is read-only."""
    script = 'mount --bind "$1" "$2/mnt"; exec chroot "$2" python3 -m compileall -q -s /mnt -p "$3" /mnt'
    run(["unshare", "--mount", "sh", "-ec", script, "sh", packages, root, seen_as], check=False)


def _lock(name: str) -> Path:
    """A lock file: in a checkout at its top, in an installed package beside the modules."""
    for path in (CHECKOUT / name, PACKAGE / name):
        if path.is_file():
            return path
    raise UsageError(f"{name} is missing", why=f"it is neither in {CHECKOUT} nor in {PACKAGE}")


def _uv(progress: Progress) -> str:
    """uv: beside our Python, on the PATH, of the checkout, or installed into the cache."""
    ours = CACHE / "uv" / "bin" / "uv"
    for path in (Path(sys.executable).with_name("uv"), CHECKOUT / ".cache" / "uv" / "bin" / "uv", ours):
        if path.is_file():
            return str(path)
    if found := shutil.which("uv") or shutil.which("uv", path=CLEAN_ENVIRONMENT["PATH"]):
        return found
    progress("installing uv")
    run([sys.executable, "-m", "venv", ours.parents[1]], remedy="install uv, or python3-venv")
    pinned = ["--require-hashes", "--only-binary", ":all:", "--requirement", str(_lock("requirements-uv.lock"))]
    run([ours.with_name("pip"), "install", "--quiet", *pinned], env=downloads())
    return str(ours)
