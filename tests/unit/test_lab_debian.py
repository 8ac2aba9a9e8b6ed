"""The Debian mirror comes from apt's own sources, in whatever form they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from podferry.errors import CommandFailed, Refused
from podferry.lab import debian, root_images
from podferry.lab.apt import KEYRING
from podferry.lab.debian import mirror
from podferry.node.process import Completed

pytestmark = pytest.mark.unit

DEB822 = """\
# The comment of an installer
Types: deb
URIs: http://security.example/debian-security
Suites: bookworm-security
Components: main

Types: deb deb-src
# a comment between
URIs: {uri}
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""


STATUS = """\
Package: container-tools
Version: 9.0-1

Package: containerd
Architecture: amd64
Version: {containerd}
Depends: runc

Package: python3
Version: 3.14.4-1
"""


@pytest.mark.parametrize(("version", "major"), [("1.7.24~ds1-6", 1), ("2.1.9~ds1-2+b1", 2)])
def test_a_root_tells_its_programs_versions(tmp_path: Path, version: str, major: int) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/python3").symlink_to("python3.14")
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(STATUS.format(containerd=version))
    assert root_images.containerd_of(tmp_path) == major
    assert root_images.python_of(tmp_path) == "3.14"


@pytest.fixture(autouse=True)
def without_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PODFERRY_DEBIAN_MIRROR", raising=False)


@pytest.fixture
def apt(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_deb822(apt: Path) -> None:
    (apt / "sources.list.d" / "debian.sources").write_text(DEB822.format(uri="http://mirror.example/debian/"))
    assert mirror(apt) == "http://mirror.example/debian"


@pytest.mark.parametrize(
    "line",
    [
        "deb http://mirror.example/debian bookworm main",
        "deb [signed-by=/a/b.gpg arch=amd64] http://mirror.example/debian trixie main contrib",
    ],
)
def test_one_line(apt: Path, line: str) -> None:
    text = f"# deb http://wrong.example/debian trixie main\ndeb http://other.example/repo nodistro main\n{line}\n"
    (apt / "sources.list").write_text(text)
    assert mirror(apt) == "http://mirror.example/debian"


def test_mirror_file(apt: Path) -> None:
    mirrors = apt / "mirrors.list"
    mirrors.write_text("http://mirror.example/debian\n")
    (apt / "sources.list.d" / "debian.sources").write_text(DEB822.format(uri=f"mirror+file:{mirrors}"))
    assert mirror(apt) == "http://mirror.example/debian"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("debian.sources.disabled", DEB822.format(uri="http://mirror.example/debian")),
        ("debian.sources", "Enabled: no\nTypes: deb\nURIs: http://mirror.example/debian\nSuites: trixie\n"),
        ("debian.sources", "Types: deb-src\nURIs: http://mirror.example/debian\nSuites: trixie\n"),
        ("ubuntu.list", "deb http://mirror.example/ubuntu noble main\n"),
        ("cd.list", "deb cdrom:[Debian 13]/ trixie main\n"),
    ],
)
def test_what_is_disabled_or_not_debian_does_not_count(apt: Path, name: str, text: str) -> None:
    (apt / "sources.list.d" / name).write_text(text)
    with pytest.raises(Refused, match="no Debian mirror") as refused:
        mirror(apt)
    assert "PODFERRY_DEBIAN_MIRROR" in refused.value.remedy


def test_the_environment_goes_first(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PODFERRY_DEBIAN_MIRROR", "http://chosen.example/debian")
    assert mirror(apt) == "http://chosen.example/debian"


def test_what_a_bare_debian_lacks_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ip").touch(mode=0o755)
    monkeypatch.setitem(debian.CLEAN_ENVIRONMENT, "PATH", str(tmp_path))
    called: list[list[str]] = []
    monkeypatch.setattr(debian, "run", lambda argv, **options: called.append(argv))
    said: list[str] = []
    debian.require({"ip": "iproute2"}, said.append)
    assert (called, said) == ([], [])
    debian.require({"ip": "iproute2", "tc": "iproute2", "debootstrap": "debootstrap"}, said.append)
    assert said == ["installing debootstrap, iproute2 with apt-get"]
    assert called[-1][-2:] == ["debootstrap", "iproute2"]


def test_nothing_is_taken_from_an_archive_that_debian_has_not_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """debootstrap goes on without a check where it finds no gpgv, or no keyring of its own choice."""
    needed: dict[str, str] = {}
    called: list[list[str]] = []

    def streamed(argv: list[str], *_: object) -> Completed:
        called.append(argv)
        return Completed(argv, 0, "", "")

    monkeypatch.setattr(debian, "streamed", streamed)
    monkeypatch.setattr(debian, "require", lambda programs, progress: needed.update(programs))
    monkeypatch.setattr(debian, "cached", lambda name, recipe, make: make(tmp_path / "base"))
    monkeypatch.setattr(debian, "mirror", lambda: "http://mirror.example/debian")
    with pytest.raises(CommandFailed):
        debian.bootstrap(["python3"], tmp_path / "into", tmp_path / "debs", lambda step: None)
    assert "--force-check-gpg" in called[0]
    assert f"--keyring={KEYRING}" in called[0]
    assert {"gpgv", str(KEYRING)} <= set(needed)
