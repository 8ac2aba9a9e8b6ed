"""OCI image archives (image-spec 1.1, image layout in a tar), made without a daemon: one layer, uncompressed.

An uncompressed layer costs disk and saves the time that every node would spend on unpacking it.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Sequence
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
    root: Path, into: Path, *, reference: str, architecture: str, command: Sequence[str], env: Sequence[str]
) -> None:
    """Pack the tree `root` as image `reference` into the archive `into`."""
    with tempfile.TemporaryFile(dir=into.parent) as layer, tarfile.open(into, "w") as archive:
        _pack(root, layer)
        packed = _measure(layer)
        config = _json(
            {
                "architecture": architecture,
                "os": "linux",
                "config": {"Cmd": list(command), "Env": list(env), "WorkingDir": "/"},
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{packed.digest}"]},
                "history": [{"created_by": "podferry lab"}],
            }
        )
        manifest = _json(
            {
                "schemaVersion": 2,
                "mediaType": f"{MEDIA}.manifest.v1+json",
                "config": _blob(config).descriptor("config.v1+json"),
                "layers": [packed.descriptor("layer.v1.tar")],
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
        _add_file(archive, f"blobs/sha256/{packed.digest}", layer, packed.size)


def _pack(root: Path, layer: IO[bytes]) -> None:
    """The tree as a layer, in a fixed order; times stay, since Python checks its compiled files against them."""

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        top, _, below = member.name.partition("/")
        return None if below and top in _NOT_IN_LAYERS else member

    with tarfile.open(fileobj=layer, mode="w") as tar:
        for path in sorted(root.iterdir()):
            tar.add(path, arcname=path.name, filter=kept)


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
