"""Pods as containerd's CRI plugin keeps them: which containers are a pod's, where their output goes, what is mounted into them.

Read from containerd's own records, in its namespace `k8s.io`: labels (containerd's internal/cri/constants and the kubelet's
kuberuntime/labels.go), and the plugin's metadata, which is JSON in an extension of the record. Nothing here asks the kubelet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from podferry.core.facts import Bind
from podferry.core.strict import AllowedRange
from podferry.errors import Failed, UsageError
from podferry.node.containerd import Containerd
from podferry.node.jobfacts import binds
from podferry.node.records import Container

NAMESPACE = "k8s.io"
KUBELET = Path("/var/lib/kubelet")
LOG_ROOT = Path("/var/log/pods")
UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")
CONTAINER_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
SHM = "/dev/shm"

_METADATA = "io.cri-containerd.container.metadata"
_EMPTY_DIR = "kubernetes.io~empty-dir"


@dataclass(frozen=True)
class PodContainer:
    """A container of a pod. `log` is the file that containerd writes its output to, in the kubelet's format; None for none."""

    name: str
    record: Container
    log: Path | None


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


def demand_uid(uid: str) -> str:
    """`uid`, if it can be a pod's. Raises `UsageError`: it becomes part of paths and filters."""
    if not UID.fullmatch(uid):
        raise UsageError(f"not a pod's uid: {uid[:80]!r}")
    return uid


def containers(containerd: Containerd, uid: str) -> dict[str, PodContainer]:
    """The containers of a pod by name, of each the latest attempt; its sandbox is not among them."""
    found: dict[str, tuple[int, PodContainer]] = {}
    records = containerd.containers(
        f'labels."io.kubernetes.pod.uid"=="{demand_uid(uid)}",labels."io.cri-containerd.kind"==container'
    )
    for record in records:
        metadata = _metadata(record)
        config = metadata.get("Config", {}).get("metadata", {})
        name, attempt = str(config.get("name", "")), int(config.get("attempt", 0))
        log = Path(metadata["LogPath"]) if metadata.get("LogPath") else None
        if name not in found or found[name][0] < attempt:
            found[name] = attempt, PodContainer(name, record, log)
    return {name: container for name, (_, container) in found.items()}


def log_of(record: Container) -> Path | None:
    """Where containerd writes a container's output."""
    path = _metadata(record).get("LogPath")
    return Path(path) if path else None


def _metadata(record: Container) -> dict[str, Any]:
    try:
        metadata = json.loads(record.extensions[_METADATA].value)["Metadata"]
    except (KeyError, ValueError, TypeError) as error:
        raise Failed.because(f"containerd's CRI plugin has no metadata of container {record.id}", error) from error
    if not isinstance(metadata, dict):
        raise Failed(f"the metadata of container {record.id} is not an object")
    return metadata


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
        sandboxed = "io.containerd.grpc.v1.cri" in source.parts and "sandboxes" in source.parts
        if not source.is_relative_to(pod) and not sandboxed:
            yield bind


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
    """Namespaces that a container joins although podferry needs it to have its own: pid (shareProcessNamespace), user."""
    listed = (spec.get("linux") or {}).get("namespaces") or []
    return tuple(sorted(one["type"] for one in listed if one.get("path") and one.get("type") in ("pid", "user")))
