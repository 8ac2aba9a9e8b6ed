"""OCI image archives (image-spec 1.1, image layout in a tar), made without a daemon; their layers are uncompressed.

An uncompressed layer costs disk and saves the time that every node would spend on unpacking it.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MEDIA = "application/vnd.oci.image"
_NOT_IN_LAYERS = ("dev", "proc", "sys", "run", "tmp")


@dataclass(frozen=True)
class Blob:
    """A blob's digest (hexadecimal sha256) and size in bytes."""

    digest: str
    size: int

    def descriptor(self, kind: str, **more: object) -> dict[str, Any]:
        """The blob as manifests and indexes name it."""
        return {"mediaType": f"{MEDIA}.{kind}", "digest": f"sha256:{self.digest}", "size": self.size, **more}


def write_archive(
    root: Path,
    into: Path,
    *,
    reference: str,
    architecture: str,
    command: Sequence[str],
    env: Sequence[str],
    lower: Collection[str] = (),
) -> None:
    """Pack the tree `root` as image `reference` into the archive `into`.

    The paths in `lower` (relative to `root`), if there are any, become a layer of their own below the rest. It depends on
    nothing but these files, so that images that have them in common have a layer in common.
    """
    with ExitStack() as stack, tarfile.open(into, "w") as archive:
        layers = [stack.enter_context(tempfile.TemporaryFile(dir=into.parent)) for _ in range(2 if lower else 1)]
        if lower:
            _pack(root, layers[0], lambda member: _without_times(member) if member.name in lower else None)
        _pack(root, layers[-1], lambda member: member if member.isdir() or member.name not in lower else None)
        packed = [_measure(layer) for layer in layers]
        config = _json(
            {
                "architecture": architecture,
                "os": "linux",
                "config": {"Cmd": list(command), "Env": list(env), "WorkingDir": "/"},
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{one.digest}" for one in packed]},
                "history": [{"created_by": "podferry lab"}] * len(packed),
            }
        )
        manifest = _json(
            {
                "schemaVersion": 2,
                "mediaType": f"{MEDIA}.manifest.v1+json",
                "config": _blob(config).descriptor("config.v1+json"),
                "layers": [one.descriptor("layer.v1.tar") for one in packed],
            }
        )
        named = _blob(manifest).descriptor(
            "manifest.v1+json",
            platform={"architecture": architecture, "os": "linux"},
            annotations={
                "io.containerd.image.name": reference,
                "org.opencontainers.image.ref.name": reference.rpartition(":")[2],
            },
        )
        index = {"schemaVersion": 2, "mediaType": f"{MEDIA}.index.v1+json", "manifests": [named]}
        _add(archive, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _add(archive, "index.json", _json(index))
        for data in (config, manifest):
            _add(archive, f"blobs/sha256/{_blob(data).digest}", data)
        for layer, blob in zip(layers, packed, strict=True):
            _add_file(archive, f"blobs/sha256/{blob.digest}", layer, blob.size)


def _pack(root: Path, layer: IO[bytes], chosen: Callable[[tarfile.TarInfo], tarfile.TarInfo | None]) -> None:
    """The tree as a layer, in a fixed order; times stay, since Python checks its compiled files against them."""

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        top, _, below = member.name.partition("/")
        return None if below and top in _NOT_IN_LAYERS else chosen(member)

    with tarfile.open(fileobj=layer, mode="w") as tar:
        for path in sorted(root.iterdir()):
            tar.add(path, arcname=path.name, filter=kept)


def _without_times(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """A directory changes when others put files into it."""
    if member.isdir():
        member.mtime = 0
    return member


def _measure(file: IO[bytes]) -> Blob:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    return Blob(digest, size)


def _blob(data: bytes) -> Blob:
    return Blob(hashlib.sha256(data).hexdigest(), len(data))


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    _add_file(archive, name, io.BytesIO(data), len(data))


def _add_file(archive: tarfile.TarFile, name: str, file: IO[bytes], size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    archive.addfile(member, file)


def extend(
    base: Path, into: Path, trees: Sequence[Path], *, reference: str, command: Sequence[str], env: Sequence[str]
) -> None:
    """Write the image `reference` into the archive `into`: that of the archive `base`, and a layer more for each of `trees`.

    Files in them belong to root and have no times, so that equal trees are equal layers.
    """
    with ExitStack() as stack:
        below = stack.enter_context(tarfile.open(base))
        archive = stack.enter_context(tarfile.open(into, "w"))
        named = _member(below, "index.json")["manifests"][0]
        manifest = _member(below, _path(named))
        config = _member(below, _path(manifest["config"]))
        added = []
        for tree in trees:
            layer = stack.enter_context(tempfile.TemporaryFile(dir=into.parent))
            with tarfile.open(fileobj=layer, mode="w") as tar:
                for path in sorted(tree.iterdir()):
                    tar.add(path, arcname=path.name, filter=_plain)
            added.append((layer, _measure(layer)))
        config["config"] |= {"Cmd": list(command), "Env": list(env)}
        config["rootfs"]["diff_ids"] += [f"sha256:{blob.digest}" for _, blob in added]
        config["history"] += [{"created_by": "podferry"}] * len(added)
        kept = manifest["layers"]
        manifest["layers"] = kept + [blob.descriptor("layer.v1.tar") for _, blob in added]
        manifest["config"] = _blob(_json(config)).descriptor("config.v1+json")
        named |= _blob(_json(manifest)).descriptor("manifest.v1+json")
        named["annotations"] = {
            "io.containerd.image.name": reference,
            "org.opencontainers.image.ref.name": reference.rpartition(":")[2],
        }
        _add(archive, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _add(archive, "index.json", _json({**_member(below, "index.json"), "manifests": [named]}))
        for data in (_json(config), _json(manifest)):
            _add(archive, f"blobs/sha256/{_blob(data).digest}", data)
        for one in kept:
            file = below.extractfile(_path(one))
            assert file is not None
            _add_file(archive, _path(one), file, one["size"])
        for layer, blob in added:
            _add_file(archive, f"blobs/sha256/{blob.digest}", layer, blob.size)


def digest(archive: Path) -> str:
    """By which digest a registry and a cluster name the image of an archive."""
    with tarfile.open(archive) as tar:
        return str(_member(tar, "index.json")["manifests"][0]["digest"])


def read(archive: Path, path: str) -> bytes:
    """A file of the image in an archive, as its topmost layer that has one says. Raises `FileNotFoundError`."""
    with tarfile.open(archive) as tar:
        manifest = _member(tar, _path(_member(tar, "index.json")["manifests"][0]))
        for one in reversed(manifest["layers"]):
            with tarfile.open(fileobj=tar.extractfile(_path(one))) as layer, suppress(KeyError):
                file = layer.extractfile(path)
                assert file is not None
                return file.read()
    raise FileNotFoundError(path)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def _member(archive: tarfile.TarFile, name: str) -> Any:
    file = archive.extractfile(name)
    assert file is not None
    return json.load(file)


def _path(descriptor: dict[str, Any]) -> str:
    return "blobs/" + str(descriptor["digest"]).replace(":", "/")
