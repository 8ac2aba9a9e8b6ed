"""What labs build once: whole or not at all; and the archive of an image that they build."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from podferry.lab import build_cache, oci

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build_cache, "CACHE", tmp_path)
    return tmp_path


def test_a_thing_is_built_once_for_each_recipe() -> None:
    built: list[str] = []

    def build(into: Path) -> None:
        built.append(into.name)
        into.mkdir()

    first = build_cache.cached("node", {"packages": ["a"]}, build)
    assert first.is_dir()
    assert build_cache.cached("node", {"packages": ["a"]}, build) == first
    assert build_cache.cached("node", {"packages": ["a", "b"]}, build) != first
    assert len(built) == 2


def test_a_build_that_fails_leaves_nothing_and_can_be_repeated(own_cache: Path) -> None:
    def fail(into: Path) -> None:
        into.mkdir()
        (into / "half").write_text("x")
        raise RuntimeError("the mirror is gone")

    with pytest.raises(RuntimeError):
        build_cache.cached("node", 1, fail)
    assert not list(own_cache.iterdir())
    assert build_cache.cached("node", 1, lambda into: into.mkdir()).is_dir()


@pytest.mark.parametrize("labs", [set[str](), {"default"}])
def test_older_recipes_go_unless_a_lab_may_stand_on_them(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, labs: set[str]
) -> None:
    monkeypatch.setattr(build_cache.cgroups, "labs", lambda: labs)

    def build(into: Path) -> None:
        into.write_text("x")

    older = build_cache.cached("job", 1, build, suffix=".tar")
    other = build_cache.cached("node", 2, build)
    (own_cache / "job.root").mkdir()
    newer = build_cache.cached("job", 3, build, suffix=".tar")
    assert older.exists() == bool(labs)
    assert all(path.exists() for path in (newer, other, own_cache / "job.root"))


def read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None
    return file.read()


def test_an_archive_is_an_oci_layout_whose_digests_hold(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for directory in ("bin", "dev", "proc"):
        (root / directory).mkdir(parents=True)
    (root / "bin" / "tool").write_text("#!/bin/sh\n")
    (root / "bin" / "tool").chmod(0o755)
    (root / "bin" / "alias").symlink_to("tool")
    (root / "dev" / "leftover").write_text("x")
    into = tmp_path / "image.tar"
    oci.write_archive(root, into, reference="a.example/b:1", architecture="amd64", command=["tool"], env=["A=b"])

    with tarfile.open(into) as archive:
        index = json.loads(read(archive, "index.json"))

        def blob(descriptor: dict[str, Any]) -> bytes:
            kind, digest = descriptor["digest"].split(":")
            data = read(archive, f"blobs/{kind}/{digest}")
            assert hashlib.sha256(data).hexdigest() == digest
            assert len(data) == descriptor["size"]
            return data

        assert index["manifests"][0]["annotations"]["io.containerd.image.name"] == "a.example/b:1"
        manifest = json.loads(blob(index["manifests"][0]))
        configuration = json.loads(blob(manifest["config"]))
        assert configuration["config"]["Cmd"] == ["tool"]
        assert configuration["rootfs"]["diff_ids"] == [manifest["layers"][0]["digest"]]
        layer = tmp_path / "layer.tar"
        layer.write_bytes(blob(manifest["layers"][0]))
    with tarfile.open(layer) as tree:
        assert tree.getnames() == ["bin", "bin/alias", "bin/tool", "dev", "proc"]
        assert tree.getmember("bin/tool").mode == 0o755
        assert tree.getmember("bin/alias").linkname == "tool"
