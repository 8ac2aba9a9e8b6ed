"""A CRIU that runs on any node: with its libraries and its loader, taken out of Debian's packages.

Agents bring that of Debian testing to the nodes of a cluster. Linux 7.1 and later need CRIU 4.3, which no release of Debian has.
It fails to restore a memfd with both a shared and a private mapping (4.3-1~exp2), so a lab's nodes have it, from experimental,
only where they cannot work without.
"""

from __future__ import annotations

import platform
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from podferry.core.host import needs_later_criu
from podferry.errors import Failed
from podferry.install.criu_bundle import DIRECTORY
from podferry.lab import apt
from podferry.lab.build_cache import cached
from podferry.lab.debian import CRIU, NEXT_SUITE, SUITE, architecture, mirror, require
from podferry.lab.downloads import for_debian, remedy
from podferry.lab.progress import Progress
from podferry.lab.root_images import node_root
from podferry.node.process import raise_for, run

OF_CRIU = ["criu", "libcompel1"]
PACKAGES = [*OF_CRIU, "libnet9", "libnl-3-200"]
"""CRIU, and the libraries that the lab's own Debian has only in older versions."""
PACKAGE_LIST = "packages"
"""The file in the bundle that tells, as a database of dpkg's does, which packages it was taken from."""
LATE_SUITES = (NEXT_SUITE, "experimental")
"""Where a late CRIU is taken from: the newest of these. Its libraries are of the first."""
LATE = (4, 3)
"""The least that these have."""
EDITION = 2

# The loader is called criu, since a process is known by the name of the file that was executed.
_START = f"""\
#!/bin/sh
exec {DIRECTORY}/loader/criu --library-path {DIRECTORY}/lib {DIRECTORY}/criu "$@"
"""
_STANZA = "Package: ${Package}\\nStatus: install ok installed\\nArchitecture: ${Architecture}\\nVersion: ${Version}\\n"
_LDD = 'mount --bind "$1" "$2/mnt"; exec chroot "$2" env LD_LIBRARY_PATH="/mnt$3" ldd /mnt/usr/sbin/criu'


def late_wanted(suite: str) -> bool:
    """Whether nodes made of a release of Debian need a late CRIU, since with theirs nothing could be moved on this kernel."""
    return needs_later_criu(platform.release(), CRIU[suite])


def of_nodes(suite: str, *, kubernetes: bool) -> tuple[int, int]:
    """The CRIU that nodes made of a release of Debian have on this kernel; with `kubernetes`, the agents' where that is later."""
    if not late_wanted(suite):
        return CRIU[suite]
    return max(CRIU[suite], CRIU[NEXT_SUITE]) if kubernetes else LATE


def bundle(progress: Progress) -> Path:
    """The directory that becomes `criu_bundle.DIRECTORY` on a node. The first time takes some seconds."""
    root = node_root(progress, SUITE)
    recipe = {"suite": NEXT_SUITE, "packages": PACKAGES, "root": root.name, "start": _START, "edition": EDITION}
    return cached("criu", recipe, lambda into: _build((NEXT_SUITE,), root, into, progress))


def late_bundle(progress: Progress) -> Path:
    """The same with a late CRIU."""
    root = node_root(progress, SUITE)
    recipe = {"suites": LATE_SUITES, "packages": PACKAGES, "root": root.name, "start": _START, "edition": EDITION}
    return cached("criu.late", recipe, lambda into: _build(LATE_SUITES, root, into, progress))


def _build(suites: Sequence[str], root: Path, into: Path, progress: Progress) -> None:
    progress(f"CRIU: from Debian {suites[-1]}")
    # Not in /tmp: programs are run from it to see which libraries they need, and /tmp may be mounted noexec.
    with tempfile.TemporaryDirectory(dir=into.parent) as work:
        _assemble(_unpack(Path(work), suites, progress), root, into)


def _unpack(work: Path, suites: Sequence[str], progress: Progress) -> Path:
    """The packages' files, without installing them. apt checks their signatures with Debian's keys."""
    (work / "lists" / "partial").mkdir(parents=True)
    (work / "archives" / "partial").mkdir(parents=True)
    (work / "status").touch()
    require({str(apt.KEYRING): "debian-archive-keyring"}, progress)
    address = mirror()
    (work / "sources.list").write_text(
        "".join(f"deb [signed-by={apt.KEYRING}] {address} {suite} main\n" for suite in suites)
    )
    (work / "preferences").write_text(f"Package: {' '.join(OF_CRIU)}\nPin: release o=Debian\nPin-Priority: 500\n")
    options = {
        "Dir::State::Lists": work / "lists",
        "Dir::State::status": work / "status",
        "Dir::Cache::Archives": work / "archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Dir::Etc::SourceList": work / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::Etc::Preferences": work / "preferences",
        "Dir::Etc::PreferencesParts": "/dev/null",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    get = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    environment = for_debian(address)
    for words in (["update"], ["download", *PACKAGES]):
        done = run([*get, *words], env=environment, check=False, cwd=work)
        raise_for(done, remedy=remedy(done.stderr))
    tree = work / "tree"
    listed = []
    for deb in sorted(work.glob("*.deb")):
        run(["dpkg-deb", "--extract", deb, tree])
        listed.append(run(["dpkg-deb", "--show", "--showformat", _STANZA, deb]).stdout)
    (tree / PACKAGE_LIST).write_text("\n".join(listed))
    return tree


def _assemble(tree: Path, root: Path, into: Path) -> None:
    multiarch = next(tree.glob("usr/lib/*-linux-gnu*"))
    script: list[str | Path] = ["unshare", "--mount", "sh", "-ec", _LDD, "sh", tree, root, f"/usr/lib/{multiarch.name}"]
    said = run(script).stdout
    if missing := re.findall(r"(\S+) => not found", said):
        raise Failed(f"Debian's CRIU needs libraries that are not installed: {', '.join(missing)}")
    for name in ("bin", "lib", "loader"):
        (into / name).mkdir(parents=True)
    for name, path in re.findall(r"(\S+) => (/\S+)", said):
        inside = tree / path.removeprefix("/mnt/") if path.startswith("/mnt/") else root / path.lstrip("/")
        shutil.copy(inside, into / "lib" / name)
    loader = re.search(r"^\s*(/\S+/ld-\S+) \(", said, re.MULTILINE)
    if loader is None:
        raise Failed(f"cannot tell the loader of CRIU on {architecture()}", evidence=said.splitlines())
    shutil.copy(root / loader[1].lstrip("/"), into / "loader" / "criu")
    shutil.copy(tree / "usr/sbin/criu", into / "criu")
    shutil.copy(tree / PACKAGE_LIST, into / PACKAGE_LIST)
    (into / "bin" / "criu").write_text(_START)
    for program in ("bin/criu", "criu", "loader/criu"):
        (into / program).chmod(0o755)
