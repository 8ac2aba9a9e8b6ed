"""The lab's registry, on the storage node: what images are called there, and how they get in.

It stands in for every registry: a node that asks for registry.example/team/tool:1 is given team/tool:1.
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from podferry.errors import UsageError
from podferry.lab.lab_status import LabStatus
from podferry.lab.machine_config import REGISTRY
from podferry.lab.state import STORAGE
from podferry.node.process import Completed

READY_SECONDS = 60.0
PUSH_SECONDS = 1800.0
ANSWERS = f"until bash -c ': < /dev/tcp/{REGISTRY}/443' 2> /dev/null; do sleep 0.05; done"
"""Shell: waits until the registry takes connections."""

LOG = "/var/log/podferry/registry.log"

_BLOB = re.compile(r'"http.request.uri":"[^"]*/blobs/(sha256:[0-9a-f]{64})"')
_NAME = re.compile(r"[a-z0-9]+([._/-][a-z0-9]+)*(:[\w][\w.-]{0,127})?")
_HOST = re.compile(r"[a-zA-Z0-9.-]+[.:][a-zA-Z0-9.:-]*|localhost")


class RegistryLab(Protocol):
    """What is asked of the lab whose registry it is: `podferry.lab.Lab`, which is made of modules like this one."""

    def root(self, node: str) -> Path:
        """See `Lab`."""
        ...

    def exec(self, node: str, argv: Sequence[str], *, check: bool = ..., timeout: float | None = ...) -> Completed:
        """See `Lab`."""
        ...

    def status(self) -> LabStatus:
        """See `Lab`."""
        ...


def reference_of(name: str) -> str:
    """The whole reference of an image of the lab's own: `numpy` is `podferry.local/numpy:latest`.

    Raises `UsageError` for what no registry would take.
    """
    if not _NAME.fullmatch(name.removeprefix(f"{REGISTRY}/")):
        raise UsageError(
            f"{name[:80]!r} cannot be an image's name",
            remedy="use lower-case letters, digits and dashes: numpy, tools:2",
        )
    path = name.removeprefix(f"{REGISTRY}/")
    return f"{REGISTRY}/{path}" + ("" if ":" in path else ":latest")


def path_of(reference: str) -> str:
    """What an image is called in the registry, whatever registry its reference names."""
    host, _, path = reference.partition("/")
    return path if path and _HOST.fullmatch(host) else reference


def ensure(archive: str, reference: str) -> list[str]:
    """The command that puts an archive of the storage node into the registry there, unless it has that image already."""
    there = f"skopeo inspect --raw {_url(reference)} > /dev/null 2>&1"
    copy = " ".join(_copy(archive, reference, compress=False))
    return ["sh", "-ec", f"{ANSWERS}; {there} || exec {copy}"]


def push(lab: RegistryLab, archive: Path, *, compress: bool = True) -> str:
    """Put an OCI archive of this machine into the lab's registry, over the distribution API; returns its reference.

    `compress` packs layers as `docker push` does. Raises `UsageError` for a file that is no archive of a named image.
    """
    reference = reference_in(archive)
    inside = f"/var/lib/podferry/{archive.name}"
    copy = lab.root(STORAGE) / inside.lstrip("/")
    try:
        shutil.copyfile(archive, copy)
        lab.exec(STORAGE, ["sh", "-ec", ANSWERS], timeout=READY_SECONDS)
        lab.exec(STORAGE, _copy(inside, reference, compress=compress), timeout=PUSH_SECONDS)
    finally:
        copy.unlink(missing_ok=True)
    return reference


@dataclass(frozen=True)
class Download:
    """A blob that was asked for: by which machine, its digest, and how many bytes of it were sent."""

    machine: str
    digest: str
    bytes: int


def downloads(lab: RegistryLab) -> list[Download]:
    """What was read from the registry since the lab came up, from its own log; manifests are left out."""
    status = lab.status()
    names = {one.address: one.name for one in (status.storage, *status.nodes)}
    found = []
    for line in (lab.root(STORAGE) / LOG.lstrip("/")).read_text().splitlines():
        if "response completed" not in line or not (match := _BLOB.search(line)):
            continue
        said = json.loads(line)
        if said["http.request.method"] == "GET":
            address = said["http.request.remoteaddr"].rpartition(":")[0]
            found.append(Download(names.get(address, address), match[1], int(said["http.response.written"])))
    return found


def has(lab: RegistryLab, reference: str) -> bool:
    """Whether the registry has an image."""
    return lab.exec(STORAGE, ["skopeo", "inspect", "--raw", _url(reference)], check=False).returncode == 0


def inspect(lab: RegistryLab, reference: str, *options: str) -> dict[str, Any]:
    """An image's manifest; with the option `--config` its configuration."""
    found: dict[str, Any] = json.loads(
        lab.exec(STORAGE, ["skopeo", "inspect", "--raw", *options, _url(reference)]).stdout
    )
    return found


def reference_in(archive: Path) -> str:
    """The name that an OCI archive gives its image. Raises `UsageError` where it has none."""
    try:
        with tarfile.open(archive) as tar:
            file = tar.extractfile("index.json")
            named = json.load(file)["manifests"][0]["annotations"] if file else {}
            return str(named["io.containerd.image.name"])
    except (OSError, KeyError, IndexError, ValueError, tarfile.TarError) as cause:
        raise UsageError.because(
            f"{archive} is not an OCI archive with a named image", cause, remedy="make one with `docker save` or skopeo"
        ) from cause


def _copy(archive: str, reference: str, *, compress: bool) -> Sequence[str]:
    kept = [] if compress else ["--preserve-digests"]
    # It gives the registry ten seconds for a handshake, which a busy machine may not have time for.
    options = ["--quiet", "--retry-times", "3", *kept]
    return ["skopeo", "--insecure-policy", "copy", *options, f"oci-archive:{archive}", _url(reference)]


def _url(reference: str) -> str:
    return f"docker://{REGISTRY}/{path_of(reference)}"
