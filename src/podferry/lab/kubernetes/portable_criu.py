"""A CRIU that runs on any node: Debian's newest, with its libraries and its loader, taken out of the packages."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from podferry.errors import Failed
from podferry.install.criu_bundle import DIRECTORY
from podferry.lab import apt
from podferry.lab.build_cache import cached
from podferry.lab.debian import NEXT_SUITE, SUITE, architecture, mirror, require
from podferry.lab.downloads import for_debian, remedy
from podferry.lab.progress import Progress
from podferry.lab.root_images import node_root
from podferry.node.process import raise_for, run

PACKAGES = ["criu", "libcompel1", "libnet9", "libnl-3-200"]
"""CRIU, and the libraries that the lab's own Debian has only in older versions."""
PACKAGE_LIST = "packages"
"""The file in the bundle that tells, as a database of dpkg's does, which packages it was taken from."""
EDITION = 2

# The loader is called criu, since a process is known by the name of the file that was executed.
_START = f"""\
#!/bin/sh
exec {DIRECTORY}/loader/criu --library-path {DIRECTORY}/lib {DIRECTORY}/criu "$@"
"""
_STANZA = "Package: ${Package}\\nStatus: install ok installed\\nArchitecture: ${Architecture}\\nVersion: ${Version}\\n"
_LDD = 'mount --bind "$1" "$2/mnt"; exec chroot "$2" env LD_LIBRARY_PATH="/mnt$3" ldd /mnt/usr/sbin/criu'


def bundle(progress: Progress) -> Path:
    """The directory that becomes `install.criu.DIRECTORY` on a node. The first time takes some seconds."""
    root = node_root(progress, SUITE)
    recipe = {"suite": NEXT_SUITE, "packages": PACKAGES, "root": root.name, "start": _START, "edition": EDITION}

    def build(into: Path) -> None:
        progress(f"CRIU: from Debian {NEXT_SUITE}")
        # Not in /tmp: programs are run from it to see which libraries they need, and /tmp may be mounted noexec.
        with tempfile.TemporaryDirectory(dir=into.parent) as work:
            tree = _unpack(Path(work), progress)
            _assemble(tree, root, into)

    return cached("criu", recipe, build)


def _unpack(work: Path, progress: Progress) -> Path:
    """The packages' files, without installing them. apt checks their signatures with Debian's keys."""
    (work / "lists" / "partial").mkdir(parents=True)
    (work / "archives" / "partial").mkdir(parents=True)
    (work / "status").touch()
    require({str(apt.KEYRING): "debian-archive-keyring"}, progress)
    (work / "sources.list").write_text(f"deb [signed-by={apt.KEYRING}] {mirror()} {NEXT_SUITE} main\n")
    options = {
        "Dir::State::Lists": work / "lists",
        "Dir::State::status": work / "status",
        "Dir::Cache::Archives": work / "archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Dir::Etc::SourceList": work / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    get = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    environment = for_debian(mirror())
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
        raise Failed(f"CRIU of Debian {NEXT_SUITE} needs libraries that are not installed: {', '.join(missing)}")
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
