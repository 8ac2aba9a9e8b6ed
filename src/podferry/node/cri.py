"""Pods as a kubelet and its container runtime lay them out: where their volumes are, what is mounted into their containers.

Nothing here asks the kubelet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from podferry.core.facts import Bind
from podferry.core.strict import AllowedRange
from podferry.node.jobfacts import binds
from podferry.node.pod_records import demand_uid

NAMESPACE = "k8s.io"
KUBELET = Path("/var/lib/kubelet")
LOG_ROOT = Path("/var/log/pods")
CONTAINER_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
SHM = "/dev/shm"

_EMPTY_DIR = "kubernetes.io~empty-dir"


class SharedMountKind(StrEnum):
    """What kind of file system of the pod's own is shared by its containers."""

    DISK = "disk"
    MEMORY = "memory"
    SHM = "shm"
    """The memory behind /dev/shm, which the sandbox keeps."""


@dataclass(frozen=True)
class Volume:
    """A file system that belongs to the pod, and moves with it."""

    name: Annotated[str, AllowedRange(1, 253)]
    kind: SharedMountKind


def pod_directory(uid: str, kubelet: Path = KUBELET) -> Path:
    """Where the kubelet keeps what belongs to a pod."""
    return kubelet / "pods" / demand_uid(uid)


def volumes(specs: Sequence[dict[str, Any]], uid: str, kubelet: Path = KUBELET) -> tuple[tuple[Volume, Path], ...]:
    """The file systems of a pod that move with it, and where they are: its emptyDir volumes, and its shared memory."""
    found = []
    empty_dirs = pod_directory(uid, kubelet) / "volumes" / _EMPTY_DIR
    if empty_dirs.is_dir():
        for path in sorted(empty_dirs.iterdir()):
            found.append((Volume(path.name, SharedMountKind.MEMORY if path.is_mount() else SharedMountKind.DISK), path))
    if (shm := shared_memory(specs)) is not None:
        found.append((Volume("shm", SharedMountKind.SHM), shm))
    return tuple(found)


def shared_memory(specs: Sequence[dict[str, Any]]) -> Path | None:
    """Where the sandbox keeps /dev/shm, by what is mounted there; None where the pod has none of its own."""
    found = {bind.source for spec in specs for bind in binds(spec) if bind.destination == SHM}
    return Path(found.pop()) if len(found) == 1 else None


def mounted_at(spec: dict[str, Any], source: Path) -> Iterator[str]:
    """Where in a container a directory of the node is mounted."""
    return (bind.destination for bind in binds(spec) if Path(bind.source) == source)


def foreign_binds(spec: dict[str, Any], uid: str, kubelet: Path = KUBELET) -> Iterator[Bind]:
    """What is mounted into a container that is neither the kubelet's for this pod nor its sandbox's: hostPath, mostly."""
    pod = pod_directory(uid, kubelet)
    for bind in binds(spec):
        source = Path(bind.source)
        if not source.is_relative_to(pod) and not _is_sandboxes(source):
            yield bind


def _is_sandboxes(source: Path) -> bool:
    """Whether a runtime keeps it for a pod: containerd in .../io.containerd.grpc.v1.cri/sandboxes/ID, CRI-O in
    .../overlay-containers/ID/userdata."""
    of_crio = len(source.parts) > 3 and source.parts[-4] == "overlay-containers" and source.parts[-2] == "userdata"
    return of_crio or ("io.containerd.grpc.v1.cri" in source.parts and "sandboxes" in source.parts)


def sub_paths_of_empty_dirs(spec: dict[str, Any], uid: str, kubelet: Path = KUBELET) -> Iterator[str]:
    """The emptyDir volumes of which a container has only a part mounted (`subPath`)."""
    parts = pod_directory(uid, kubelet) / "volume-subpaths"
    for bind in binds(spec):
        if Path(bind.source).is_relative_to(parts):
            volume = Path(bind.source).relative_to(parts).parts[0]
            if (pod_directory(uid, kubelet) / "volumes" / _EMPTY_DIR / volume).exists():
                yield volume


def mounted_parts(spec: dict[str, Any], uid: str, kubelet: Path = KUBELET) -> tuple[str, ...]:
    """Where in a container a part of a volume is mounted (`subPath`)."""
    parts = pod_directory(uid, kubelet) / "volume-subpaths"
    return tuple(bind.destination for bind in binds(spec) if Path(bind.source).is_relative_to(parts))


def termination_message(spec: dict[str, Any], uid: str, name: str, kubelet: Path = KUBELET) -> Path | None:
    """The file from which the kubelet reads a container's last words."""
    there = pod_directory(uid, kubelet) / "containers" / name
    found = (Path(bind.source) for bind in binds(spec))
    return next((source for source in found if source.is_relative_to(there)), None)


def shared_namespaces(spec: dict[str, Any]) -> tuple[str, ...]:
    """Namespaces that podferry needs otherwise: a pid namespace that is joined (shareProcessNamespace), a user namespace at all
    (hostUsers: false), which one runtime has its containers join and another makes for each."""
    listed = (spec.get("linux") or {}).get("namespaces") or []
    kinds = ((one.get("type"), one.get("path")) for one in listed)
    return tuple(sorted(kind for kind, path in kinds if kind == "user" or (kind == "pid" and path)))
