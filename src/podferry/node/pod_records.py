"""Pods as containerd's CRI plugin keeps them, in its namespace `k8s.io`: which containers are a pod's, where their output goes.

Read from containerd's own records: labels (containerd's internal/cri/constants and the kubelet's kuberuntime/labels.go), and the
plugin's metadata, which is JSON in an extension of the record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from podferry.errors import Failed, UsageError
from podferry.node.records import Container, PodContainer

UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")
_METADATA = "io.cri-containerd.container.metadata"


def demand_uid(uid: str) -> str:
    """`uid`, if it can be a pod's. Raises `UsageError`: it becomes part of paths and filters."""
    if not UID.fullmatch(uid):
        raise UsageError(f"not a pod's uid: {uid[:80]!r}")
    return uid


def filter_of(uid: str) -> str:
    """containerd's filter for all that it has of a pod, the sandbox included."""
    return f'labels."io.kubernetes.pod.uid"=="{demand_uid(uid)}"'


def filter_of_containers(uid: str) -> str:
    """The same without the sandbox."""
    return f'{filter_of(uid)},labels."io.cri-containerd.kind"==container'


def latest(found: Iterable[tuple[int, PodContainer]]) -> Mapping[str, PodContainer]:
    """Of each container the latest attempt, by name."""
    chosen: dict[str, tuple[int, PodContainer]] = {}
    for attempt, one in found:
        if one.name not in chosen or chosen[one.name][0] < attempt:
            chosen[one.name] = attempt, one
    return {name: one for name, (_, one) in chosen.items()}


def of_containerd(record: Container) -> tuple[int, PodContainer]:
    """A pod's container, and which attempt it is."""
    metadata = _metadata(record)
    config = metadata.get("Config", {}).get("metadata", {})
    return int(config.get("attempt", 0)), PodContainer(str(config.get("name", "")), record, log_of(record))


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
