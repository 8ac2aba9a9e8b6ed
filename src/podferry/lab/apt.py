"""Packages installed into a root by this machine's apt: it orders them as their dependencies ask, and dpkg runs in the root.

debootstrap, which makes the root, knows no such order: it unpacks everything and configures again and again until nothing
fails any more, and there are packages for which that time never comes. apt runs outside: names, proxies, certificates and
passwords for the mirror are this machine's.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from podferry.errors import EVIDENCE_LINES, CommandFailed, PodferryError, UsageError
from podferry.lab.downloads import FREE_DISK, FULL, for_debian, remedy
from podferry.lab.progress import Progress
from podferry.lab.state import locked
from podferry.lab.streamed import ALONE, streamed
from podferry.node.process import Completed, ending, run

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
"""What debootstrap and apt check Debian's signatures with; `debian.bootstrap` sees to it that it is there."""

_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9-]+)?(=[A-Za-z0-9.+:~-]+)?")
_MISSING = re.compile(
    r"^E: (?:Unable to locate package (\S+)|Package '([^']+)' has no installation candidate"
    r"|Version '[^']*' for '([^']+)' was not found)",
    re.MULTILINE,
)
_BROKEN = re.compile(r"^dpkg: error processing (?:package|archive) (\S+)", re.MULTILINE)
_ACQUIRE = re.compile(r'^Acquire::(?:https?|Retries|ForceIPv[46]|Check-Valid-Until)\b.*"[^"]+";$', re.MULTILINE)
_INVOKE = "#!/bin/sh\n# Nothing is started while packages are installed.\nexit 101\n"
_SCRIPT = """
root=$1 debs=$2; shift 2
mkdir -p "$root/var/cache/apt/archives" "$root/var/lib/apt/lists/partial" "$debs/partial"
mount --bind "$debs" "$root/var/cache/apt/archives"
mount -t proc proc "$root/proc"
apt-get -q update
apt-get -q -y full-upgrade
apt-get -q -y install -- "$@"
"""


def check_names(packages: Sequence[str]) -> None:
    """Raises `UsageError` for what cannot be a package's name; apt takes some of that for options and patterns."""
    if wrong := [one for one in packages if not _NAME.fullmatch(one)]:
        raise UsageError(
            f"{wrong[0][:80]!r} cannot be a package's name", remedy="use Debian's names, such as python3-numpy"
        )


def install(packages: Sequence[str], root: Path, debs: Path, *, suite: str, mirror: str, progress: Progress) -> None:
    """Install packages of Debian's `suite` in a root that debootstrap made, without those that are only recommended.

    What the root has already is brought up to date. `debs` keeps what was downloaded. Raises `UsageError` for a package that
    does not exist, and `CommandFailed`.
    """
    check_names(packages)
    policy = root / "usr/sbin/policy-rc.d"
    source = f"deb {mirror} {suite} main\n"
    with tempfile.TemporaryDirectory(dir=root.parent) as place, locked(debs.with_suffix(".lock")):
        sources, settings = Path(place, "sources.list"), Path(place, "apt.conf")
        sources.write_text(source.replace("deb ", f"deb [signed-by={KEYRING}] ", 1))
        settings.write_text(_settings(root, sources))
        environment = {**for_debian(mirror), "APT_CONFIG": str(settings), "DEBIAN_FRONTEND": "noninteractive"}
        policy.write_text(_INVOKE)
        policy.chmod(0o755)
        try:
            done = streamed([*ALONE, "sh", "-ec", _SCRIPT, "sh", root, debs, *packages], environment, Steps(progress))
        finally:
            policy.unlink()
    if done.returncode:
        raise failure(done, suite)
    (root / "etc/apt/sources.list").write_text(source)


class Steps:
    """What apt and dpkg print, as steps: how many packages of how many."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._packages = self._fetched = self._done = 0

    def __call__(self, line: str) -> None:
        """Take one line that they printed."""
        if counts := re.match(r"(\d+) upgraded, (\d+) newly installed", line):
            self._packages, self._fetched, self._done = int(counts[1]) + int(counts[2]), 0, 0
        elif not self._packages:
            return
        elif line.startswith("Get:"):
            self._fetched += 1
            self._progress(f"[2/3] downloading packages · {self._fetched} of {self._packages}")
        elif line.startswith(("Unpacking ", "Setting up ")):  # each package is both once
            self._done += 1
            share = min(100, 100 * self._done // (2 * self._packages))
            self._progress(f"[3/3] installing {self._packages} packages · {share} %")


def failure(done: Completed, suite: str) -> PodferryError:
    """Why apt ended badly, from what it printed: a package that is not there, one that fails itself, the network, the disk."""
    said = done.stdout
    if missing := sorted({name for names in _MISSING.findall(said) for name in names if name}):
        return UsageError(
            f"Debian {suite} has no package {', '.join(missing)}",
            remedy="packages.debian.org tells the names of all, `apt-cache search WORD` those of this machine's release",
        )
    if broken := list(dict.fromkeys(_BROKEN.findall(said))):
        before = said[: _BROKEN.search(said).start()].splitlines()  # type: ignore[union-attr]
        return CommandFailed(
            f"packages could not be installed: {', '.join(broken)}",
            why="a script of the first one failed; these are its last words",
            remedy=FREE_DISK if FULL.search(said) else "leave the package out, or add what its script misses",
            evidence=before[-EVIDENCE_LINES:],
            argv=done.argv,
            returncode=done.returncode,
        )
    errors = [line for line in said.splitlines() if line.startswith(("E: ", "W: "))]
    return CommandFailed(
        "apt could not install the packages",
        why=errors[-1].removeprefix("E: ") if errors else ending(done.returncode),
        remedy=remedy("\n".join(errors)),
        evidence=said.splitlines()[-EVIDENCE_LINES:],
        argv=done.argv,
        returncode=done.returncode,
    )


def _settings(root: Path, sources: Path) -> str:
    """apt's configuration for a root. Of this machine's only how it downloads: its hooks are not the root's."""
    architecture = run(["dpkg", "--print-architecture"]).stdout.strip()
    own = {
        "Dir::Etc::Main": "/dev/null",
        "Dir::Etc::Parts": "/dev/null",
        "Dir::Etc::Preferences": "/dev/null",
        "Dir::Etc::PreferencesParts": "/dev/null",
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": root / "var/lib/apt",
        "Dir::State::status": root / "var/lib/dpkg/status",
        "Dir::Cache": root / "var/cache/apt",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Dir::Log": root / "var/log/apt",
        "DPkg::Chroot-Directory": root,
        "DPkg::Options::": "--force-unsafe-io",
        "DPkg::Use-Pty": "false",
        "APT::Architecture": architecture,
        "APT::Architectures::": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "APT::Update::Error-Mode": "any",  # else a mirror that does not answer is only a warning, and packages "missing"
        "Acquire::Languages": "none",
    }
    machine = _ACQUIRE.findall(run(["apt-config", "dump", "Acquire"], check=False).stdout)
    return "\n".join([*machine, *(f'{name} "{value}";' for name, value in own.items())]) + "\n"
