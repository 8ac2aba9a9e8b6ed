"""Debian: the mirror this machine uses, and root file systems made from it by debootstrap."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from podferry.errors import Refused
from podferry.lab import apt
from podferry.lab.build_cache import cached
from podferry.lab.downloads import downloads, for_debian, remedy
from podferry.lab.progress import Progress
from podferry.lab.state import locked
from podferry.lab.streamed import ALONE, streamed
from podferry.node.process import CLEAN_ENVIRONMENT, raise_for, run

SUITE, NEXT_SUITE = SUITES = ("trixie", "forky")
"""What roots are made of: Debian 13, and where that is asked for the release after it, with newer containerd, runc and CRIU."""

CRIU = {SUITE: (4, 1), NEXT_SUITE: (4, 2)}
"""The CRIU that each has."""

OF_NODES = os.environ.get("PODFERRY_DEBIAN", SUITE)
"""What nodes are made of where nothing is said."""

APT = Path("/etc/apt")
_SUITES = re.compile(r"(bookworm|trixie|forky|sid|stable|testing|unstable)")
_SCRIPT = "/usr/share/debootstrap/scripts/sid"  # every later release's; an older debootstrap does not know their names
BASE_EDITION = 1
"""Raised by hand when the base is made differently."""
_UNUSED = ("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/lintian")


def mirror(apt: Path = APT) -> str:
    """The address of the Debian archive that this machine's apt uses; $PODFERRY_DEBIAN_MIRROR goes first.

    Raises `Refused` where apt has none.
    """
    if chosen := os.environ.get("PODFERRY_DEBIAN_MIRROR"):
        return chosen
    for uri, suite in _sources(apt):
        if _SUITES.fullmatch(suite) and (address := _resolve(uri)):
            return address.rstrip("/")
    raise Refused(
        "no Debian mirror is known",
        why=f"none of apt's sources in {apt} is a Debian archive",
        remedy="set PODFERRY_DEBIAN_MIRROR to the address of one",
    )


def architecture() -> str:
    """Debian's name of this machine's architecture, which for amd64 and arm64 is also OCI's."""
    return run(["dpkg", "--print-architecture"]).stdout.strip()


def bootstrap(packages: list[str], into: Path, debs: Path, progress: Progress, suite: str = SUITE) -> None:
    """Make a root of `suite` with `packages` in the new directory `into`, without manuals and locales.

    The base that all roots of a suite have in common is made once, by debootstrap; the rest is apt's. `debs` keeps downloaded
    packages for the next time. Raises `UsageError` for a package that does not exist, `Refused` and `CommandFailed`.
    """
    apt.check_names(packages)
    require(
        {"debootstrap": "debootstrap", "gpgv": "gpgv", str(apt.KEYRING): "debian-archive-keyring"},
        progress,
    )
    debs.mkdir(parents=True, exist_ok=True)
    address = mirror()
    recipe = {"suite": suite, "arch": architecture(), "edition": BASE_EDITION}
    progress("[1/3] base system")
    base = cached(f"base.{suite}", recipe, lambda root: _debootstrap(root, debs, progress, suite, address))
    run(["cp", "--archive", "--reflink=auto", base, into])
    apt.install(packages, into, debs, suite=suite, mirror=address, progress=progress)
    for unused in (*_UNUSED, "var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(into / unused, ignore_errors=True)
    for name in ("etc/machine-id", "etc/resolv.conf", "etc/hostname"):
        (into / name).unlink(missing_ok=True)


def _debootstrap(into: Path, debs: Path, progress: Progress, suite: str, address: str) -> None:
    """The packages that every Debian has, and apt."""
    retrieved = 0

    def report(line: str) -> None:
        nonlocal retrieved
        phase = line.removeprefix("I: ").partition(" ")[0]
        if line.startswith("I: Retrieving ") and not line.startswith("I: Retrieving InRelease"):
            retrieved += 1
            progress(f"[1/3] base system · {retrieved} packages retrieved")
        elif phase in ("Extracting", "Unpacking", "Configuring"):
            progress(f"[1/3] base system · {phase.lower()}")

    # Without --force-check-gpg debootstrap takes unsigned archives where it finds no gpgv or no keyring.
    signed = ["--force-check-gpg", f"--keyring={apt.KEYRING}"]
    argv = [
        *ALONE,
        "debootstrap",
        "--variant=minbase",
        *signed,
        f"--cache-dir={debs}",
        suite,
        str(into),
        address,
        _SCRIPT,
    ]
    with locked(debs.with_suffix(".lock")):
        done = streamed(argv, for_debian(address), report)
    raise_for(done, log=into / "debootstrap" / "debootstrap.log", remedy=remedy(done.stdout))


def essential_files(root: Path) -> frozenset[str]:
    """The paths (without the leading /) that the packages own which every Debian has: the same in all roots of a suite."""
    stanzas = (root / "var/lib/dpkg/status").read_text().split("\n\n")
    fields = [dict(re.findall(r"^([\w-]+): (.*)$", stanza, re.MULTILINE)) for stanza in stanzas]
    needed = [one for one in fields if one.get("Essential") == "yes" or one.get("Priority") == "required"]
    found: set[str] = set()
    for one in needed:
        names = (one["Package"], f"{one['Package']}:{one['Architecture']}")
        for path in (root / "var/lib/dpkg/info" / f"{name}.list" for name in names):
            if path.exists():
                found.update(line.lstrip("/") for line in path.read_text().splitlines())
    return frozenset(found)


def require(programs: Mapping[str, str], progress: Progress) -> None:
    """Have this machine's apt install the packages of those programs (or files) that are missing. Raises `CommandFailed`."""
    path = CLEAN_ENVIRONMENT["PATH"]
    missing = sorted(
        {
            package
            for program, package in programs.items()
            if not (Path(program).exists() if program.startswith("/") else shutil.which(program, path=path))
        }
    )
    if not missing:
        return
    progress(f"installing {', '.join(missing)} with apt-get")
    environment = {**downloads(), "DEBIAN_FRONTEND": "noninteractive"}
    remedy = f"install {', '.join(missing)} and run it again"
    run(["apt-get", "update", "-qq"], env=environment, remedy=remedy)
    run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], env=environment, remedy=remedy)


def _sources(apt: Path) -> Iterator[tuple[str, str]]:
    """(address, suite) of every enabled source for binary packages, deb822 and one-line."""
    parts = sorted((apt / "sources.list.d").glob("*")) if (apt / "sources.list.d").is_dir() else []
    for path in (apt / "sources.list", *parts):
        if path.suffix == ".sources":
            yield from _deb822(path.read_text())
        elif path.suffix == ".list" and path.exists():
            yield from _one_line(path.read_text())


def _one_line(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        if match := re.match(r"\s*deb\s+(?:\[[^]]*\]\s*)?(\S+)\s+(\S+)", line):
            yield match[1], match[2]


def _deb822(text: str) -> Iterator[tuple[str, str]]:
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", kept):
        fields = {
            key.lower(): value.split()
            for key, value in re.findall(r"^([\w-]+):((?:.*)(?:\n[ \t]+.*)*)", stanza, re.MULTILINE)
        }
        if "deb" not in fields.get("types", []) or fields.get("enabled", ["yes"])[0].lower() in ("no", "false", "0"):
            continue
        for uri in fields.get("uris", []):
            for suite in fields.get("suites", []):
                yield uri, suite


def _resolve(uri: str) -> str | None:
    """An address that debootstrap takes: `mirror+file:` is looked up, what is not http(s) or a path is left out."""
    if uri.startswith("mirror+file:"):
        try:
            lines = Path(uri.removeprefix("mirror+file:")).read_text().split()
        except OSError:
            return None
        return next((line for line in lines if line.startswith("http")), None)
    return uri if uri.startswith(("http://", "https://", "file:/")) else None
