"""What a lab is brought up with, and what follows from it for each of its machines."""

from __future__ import annotations

from dataclasses import dataclass, field

from podferry.lab import (
    root_images,
)
from podferry.lab.debian import OF_NODES
from podferry.lab.state import CONTAINERD, CONTROL, CRIO, STORAGE, runtime_of

DEFAULT_NODES = 2
DEFAULT_LINK = "1gbit"


@dataclass(frozen=True)
class LabSettings:
    """What a lab was last brought up with; kept on its disk for `start_node`, never needed by `down`.

    `runtime` is what makes the nodes' containers (`state.runtime_of`); `binds` maps paths inside the nodes to directories shown
    there read-only.
    """

    nodes: int = DEFAULT_NODES
    link: str = DEFAULT_LINK
    cgroups: str = "auto"
    agent: bool = True
    kubernetes: bool = False
    debian: str = OF_NODES
    runtime: str = CONTAINERD
    binds: dict[str, str] = field(default_factory=dict)


def services_of(machine: str, settings: LabSettings) -> list[str]:
    """What runs on a machine. Kubernetes brings the agents itself."""
    if machine == STORAGE:
        return ["brick", "registry"]
    if machine == CONTROL:
        return ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"]
    if runtime_on(machine, settings) == CRIO:
        return ["share", "crio", "kubelet"]
    own = ["kubelet"] if settings.kubernetes else ["agent"] if settings.agent else []
    return ["share", "snapshotter", "containerd", *own]


def runtime_on(machine: str, settings: LabSettings) -> str:
    return runtime_of(machine, settings.runtime) if machine not in (STORAGE, CONTROL) else ""


def archives_of(settings: LabSettings) -> dict[str, str]:
    """The images that the registry has from the start, and the archives that they come from."""
    pause = {root_images.PAUSE_IMAGE: "pause"} if settings.kubernetes else {}
    return {**pause, root_images.JOB_IMAGE: "job"}
