"""Images that are built for a lab: what they are called, what goes into which layer, and when they are built again."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from podferry.errors import Failed, UsageError
from podferry.lab import builder, machine_config, oci, registry
from podferry.lab.builder import Recipe, build
from podferry.lab.debian import essential_files
from podferry.lab.progress import quiet

pytestmark = pytest.mark.unit
STATUS = """\
Package: base-files
Essential: yes
Architecture: amd64

Package: libc6
Priority: required
Architecture: amd64
Multi-Arch: same

Package: python3
Priority: optional
Architecture: amd64
"""


def debian(root: Path) -> None:
    """A little of what debootstrap leaves."""
    info = root / "var/lib/dpkg/info"
    info.mkdir(parents=True)
    (root / "var/lib/dpkg/status").write_text(STATUS)
    for name, paths in {
        "base-files.list": "/.\n/etc\n/etc/debian_version\n",
        "libc6:amd64.list": "/.\n/usr\n/usr/lib\n/usr/lib/libc.so.6\n",
        "python3.list": "/.\n/usr\n/usr/bin\n/usr/bin/python3\n",
    }.items():
        (info / name).write_text(paths)
    for path in ("etc/debian_version", "etc/passwd", "usr/lib/libc.so.6", "usr/bin/python3"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
        os.utime(root / path, (1e9, 1e9))  # dpkg keeps the packages' times


@pytest.fixture
def bootstrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The packages of every root that was made, without making one."""
    made: list[list[str]] = []

    def bootstrap(packages: list[str], into: Path, debs: Path, progress: Callable[[str], None]) -> None:
        made.append(packages)
        debian(into)
        if "broken" in packages:
            raise Failed("no such package")

    monkeypatch.setattr(builder, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(builder, "bootstrap", bootstrap)
    monkeypatch.setattr(builder, "architecture", lambda: "amd64")
    return made


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("numpy", "podferry.local/numpy:latest"),
        ("team/numpy:1.2-x", "podferry.local/team/numpy:1.2-x"),
        ("podferry.local/numpy", "podferry.local/numpy:latest"),
    ],
)
def test_a_name_becomes_a_reference(name: str, reference: str) -> None:
    assert registry.reference_of(name) == reference


@pytest.mark.parametrize("name", ["", "Numpy", "../x", "a//b", "a:", "a b", "a@sha256:0", "-a", "a:x y", "a\n"])
def test_names_that_no_registry_takes(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be an image's name"):
        registry.reference_of(name)


@pytest.mark.parametrize(
    ("reference", "path"),
    [
        ("podferry.local/job:1", "job:1"),
        ("registry.example:5000/team/tool:1", "team/tool:1"),
        ("localhost/x", "x"),
        ("team/tool", "team/tool"),
        ("tool:1", "tool:1"),
    ],
)
def test_the_registry_stands_in_for_every_other(reference: str, path: str) -> None:
    assert registry.path_of(reference) == path


def test_the_storage_nodes_certificate_is_for_the_name_of_the_registry() -> None:
    files = machine_config.for_machine("default", "node-a", {"storage": "10.0.0.2", "node-a": "10.0.0.11"})
    assert "10.0.0.2 podferry.local\n" in files["hosts"]
    assert "https://podferry.local" in files["registry-hosts.toml"]


def test_essential_packages_files_are_those_of_every_debian(tmp_path: Path) -> None:
    debian(tmp_path)
    assert essential_files(tmp_path) == {".", "etc", "etc/debian_version", "usr", "usr/lib", "usr/lib/libc.so.6"}


def names(archive: Path, number: int) -> list[str]:
    """The files in one of an archive's layers."""
    with tarfile.open(archive) as tar:
        layer = layers(archive)[number]
        with tarfile.open(fileobj=tar.extractfile(f"blobs/sha256/{layer}")) as tree:
            return [member.name for member in tree if member.isfile()]


def layers(archive: Path) -> list[str]:
    with tarfile.open(archive) as tar:

        def read(name: str) -> dict[str, list[dict[str, str]]]:
            file = tar.extractfile(name)
            assert file is not None
            found: dict[str, list[dict[str, str]]] = json.load(file)
            return found

        manifest = read("blobs/" + read("index.json")["manifests"][0]["digest"].replace(":", "/"))
    return [one["digest"].removeprefix("sha256:") for one in manifest["layers"]]


def test_images_have_debians_essentials_in_common(bootstrapped: list[list[str]]) -> None:
    one, other = (
        build(Recipe(registry.reference_of(name), [package]), quiet) for name, package in (("a", "x"), ("b", "y"))
    )
    assert layers(one)[0] == layers(other)[0]
    assert names(one, 0) == ["etc/debian_version", "usr/lib/libc.so.6"]
    assert {"etc/passwd", "usr/bin/python3"} <= set(names(one, 1))
    assert not set(names(one, 0)) & set(names(one, 1))
    assert not list(builder.IMAGES.glob("*.root"))


def test_an_image_is_built_again_only_after_another_recipe(bootstrapped: list[list[str]]) -> None:
    reference = registry.reference_of("a")
    first = build(Recipe(reference, ["x"]), quiet)
    assert build(Recipe(reference, ["x"]), quiet) == first
    assert len(bootstrapped) == 1
    assert build(Recipe(reference, ["x"], env={"A": "b"}), quiet) == first
    assert len(bootstrapped) == 2
    assert builder.built() == {reference: first}
    assert builder.find(reference) == first


def test_a_build_that_fails_leaves_the_image_of_before(bootstrapped: list[list[str]]) -> None:
    reference = registry.reference_of("a")
    path = build(Recipe(reference, ["x"]), quiet)
    before = path.read_bytes()
    with pytest.raises(Failed):
        build(Recipe(reference, ["broken"]), quiet)
    assert path.read_bytes() == before
    assert sorted(one.suffix for one in builder.IMAGES.iterdir()) == [".json", ".tar"]
    assert builder.built() == {reference: path}


def test_what_was_not_built_says_how(bootstrapped: list[list[str]]) -> None:
    with pytest.raises(UsageError) as missing:
        builder.find(registry.reference_of("numpy"))
    assert missing.value.remedy.startswith("podferry lab image build numpy --packages ")


def test_an_archive_must_name_its_image(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    archive = tmp_path / "a.tar"
    oci.write_archive(root, archive, reference="a.example/b:1", architecture="amd64", command=[], env=[])
    assert registry.reference_in(archive) == "a.example/b:1"
    archive.write_bytes(b"no archive")
    with pytest.raises(UsageError, match="not an OCI archive"):
        registry.reference_in(archive)
