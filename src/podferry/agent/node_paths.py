"""Find the kubelet's root directory and the container runtime of the node that an agent of a cluster runs on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import structlog

from podferry.node import crio, host, kubelet, outside
from podferry.node.shown import show
from podferry.workload.config import Config


def of_this_node(config: Config) -> Config:
    """`config` with what is so on this node. In a pod, the node's directories that are needed are there afterwards.

    Raises `Refused` and `Failed`.
    """
    found = kubelet.find() or kubelet.Kubelet()
    # Where the kubelet does not say, containerd goes first.
    is_crio = found.has_crio if found.endpoint else not _listens(config.containerd) and _listens(crio.SOCKET)
    show(found.root)
    if not is_crio:
        return replace(config, kubelet=found.root)
    socket = outside.root() / (found.endpoint or str(crio.SOCKET)).lstrip("/")
    storage = crio.Crio(socket).storage
    show(storage, below=False)  # containers' roots are mounted there: they must not be kept by us
    show(crio.RUN)
    show(crio.RUNC_STATE, make=True)
    structlog.get_logger().info("pods are CRI-O's", socket=str(socket), storage=str(storage), kubelet=str(found.root))
    return replace(config, kubelet=found.root, crio=str(socket))


def _listens(path: Path) -> bool:
    return host.listens(outside.root() / str(path).lstrip("/"))
