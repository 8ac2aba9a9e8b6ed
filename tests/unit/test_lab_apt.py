"""What apt and dpkg print, as steps and as reasons; how programs are told to reach the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from podferry.errors import CommandFailed, UsageError
from podferry.lab import apt, downloads
from podferry.lab.downloads import for_debian, remedy
from podferry.node.process import Completed

pytestmark = pytest.mark.unit

OUTPUT = """\
Get:1 http://mirror.example/debian trixie InRelease [140 kB]
Get:2 http://mirror.example/debian trixie/main amd64 Packages [9669 kB]
Reading package lists...
0 upgraded, 0 newly installed, 0 to remove and 0 not upgraded.
The following NEW packages will be installed:
  libz1 tool
1 upgraded, 1 newly installed, 0 to remove and 0 not upgraded.
Get:1 http://mirror.example/debian trixie/main amd64 libz1 amd64 1.0 [88 kB]
Get:2 http://mirror.example/debian trixie/main amd64 tool amd64 2.0 [12 kB]
Unpacking libz1:amd64 (1.0) ...
Setting up libz1:amd64 (1.0) ...
Unpacking tool (2.0) ...
Setting up tool (2.0) ...
"""


def test_steps_say_how_many_of_how_many() -> None:
    told: list[str] = []
    steps = apt.Steps(told.append)
    for line in OUTPUT.splitlines():
        steps(line)
    assert told == [
        "[2/3] downloading packages · 1 of 2",
        "[2/3] downloading packages · 2 of 2",
        *(f"[3/3] installing 2 packages · {share} %" for share in (25, 50, 75, 100)),
    ]


def failed(said: str) -> Completed:
    return Completed(["apt-get"], 100, said, "")


@pytest.mark.parametrize(
    "said",
    [
        "E: Unable to locate package toool",
        "Package toool is not available\nE: Package 'toool' has no installation candidate",
        "E: Version '9' for 'toool' was not found",
    ],
)
def test_a_package_that_does_not_exist_is_the_users_mistake(said: str) -> None:
    error = apt.failure(failed(said), "trixie")
    assert isinstance(error, UsageError)
    assert "Debian trixie has no package toool" in error.what
    assert "mirror" not in error.remedy


def test_a_package_whose_script_fails_shows_its_words_and_blames_no_mirror() -> None:
    said = (
        "Setting up tool (2.0) ...\nconnection refused\ncannot find my heart\ndpkg: error processing package tool (--configure):\n"
        " installed tool package post-installation script subprocess returned error exit status 1\n"
        "Errors were encountered while processing:\n tool\nE: Sub-process /usr/bin/dpkg returned an error code (1)\n"
    )
    error = apt.failure(failed(said), "trixie")
    assert isinstance(error, CommandFailed)
    assert error.what == "packages could not be installed: tool"
    assert error.evidence[-1] == "cannot find my heart"
    assert "mirror" not in error.remedy


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("E: Failed to fetch http://mirror.example/x  Could not connect to mirror.example:80", "mirror"),
        ("E: Failed to fetch https://x  Certificate verification failed: The certificate is NOT trusted.", "trust"),
        ("E: You don't have enough free space in /var/cache/apt/archives/.", "disk"),
        ("E: Write error - write (28: No space left on device)", "disk"),
    ],
)
def test_the_remedy_fits_the_reason(said: str, word: str) -> None:
    assert word in apt.failure(failed(said), "trixie").remedy
    assert "unmet" not in remedy("E: Unmet dependencies")
    assert remedy("E: Unmet dependencies") == ""


@pytest.mark.parametrize("name", ["-o", "--reinstall", "a", "lib.*", "A", "x y", "", "tool/../x", "tool\n", "tool;ls"])
def test_what_apt_would_take_for_something_else_is_no_name(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be a package's name"):
        apt.check_names(["python3", name])


def test_names_that_debian_has() -> None:
    apt.check_names(["g++", "libstdc++6", "python3.13", "0ad", "gcc:amd64", "tool=1:2.0~rc1-1+b2"])


def test_this_machines_apt_downloads_as_always_and_runs_no_hooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumped = (
        'Acquire::http::Proxy "http://proxy.example:3128";\nAcquire::https::CAInfo "/etc/company.pem";\n'
        'Acquire::Retries "3";\nAcquire::IndexTargets "";\nAcquire::http "";\nDPkg::Post-Invoke:: "rm -rf x";\n'
    )
    monkeypatch.setattr(
        apt, "run", lambda argv, **_: Completed(argv, 0, dumped if argv[0] == "apt-config" else "amd64\n", "")
    )
    written = apt._settings(tmp_path / "root", tmp_path / "sources.list")
    assert written.splitlines()[:3] == [
        'Acquire::http::Proxy "http://proxy.example:3128";',
        'Acquire::https::CAInfo "/etc/company.pem";',
        'Acquire::Retries "3";',
    ]
    assert "Invoke" not in written
    assert f'DPkg::Chroot-Directory "{tmp_path}/root";' in written
    assert 'Dir::Etc::Parts "/dev/null";' in written


# -- proxies and certificates -----------------------------------------------------------------------------------------


def test_both_spellings_of_a_proxy_reach_every_program() -> None:
    given = {"HTTPS_PROXY": "http://p:1", "http_proxy": "http://p:2", "NO_PROXY": "local", "EDITOR": "vi"}
    environment = downloads.downloads(given, bundles=())
    assert environment == {
        "HTTPS_PROXY": "http://p:1",
        "https_proxy": "http://p:1",
        "http_proxy": "http://p:2",
        "NO_PROXY": "local",
        "no_proxy": "local",
    }


def test_uv_and_pip_trust_what_the_system_trusts(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.crt"
    bundle.touch()
    own = ("/nowhere/x", str(bundle))
    assert downloads.downloads({}, own) == {
        "UV_NATIVE_TLS": "true",
        "UV_SYSTEM_CERTS": "true",
        "PIP_CERT": str(bundle),
    }
    told = {"UV_SYSTEM_CERTS": "false", "PIP_CERT": "/x", "SSL_CERT_FILE": "/y"}
    assert downloads.downloads(told, own) == told
    assert downloads.downloads({"SSL_CERT_FILE": "/y"}, own)["PIP_CERT"] == "/y"
    assert downloads.downloads({}, ("/nowhere/x",)) == {}, (
        "without a system's bundle, the one that uv brings is better than none"
    )


def test_the_proxy_that_apt_knows_is_debootstraps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"http": "http://apt:1", "https": "http://apt:2"}
    monkeypatch.setattr(downloads, "apt_proxy", lambda scheme: known[scheme])
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert for_debian("http://mirror.example/debian")["http_proxy"] == "http://apt:1"
    assert for_debian("https://mirror.example/debian")["https_proxy"] == "http://apt:2"
    monkeypatch.setenv("http_proxy", "http://mine:3")
    assert for_debian("http://mirror.example/debian")["http_proxy"] == "http://mine:3"
