"""CRI-O for a lab's nodes. Debian has none, and podferry does not bring it along."""

from __future__ import annotations

import os
from pathlib import Path

from podferry.errors import Refused
from podferry.lab.kubernetes.component_config import CNI
from podferry.lab.root_images import PAUSE_IMAGE

DIRECTORY = Path(os.environ.get("PODFERRY_CRIO_BIN", "/opt/podferry/crio/bin"))
IN_NODES = "/opt/podferry/crio"
PROGRAMS = ("crio", "conmon", "pinns")
SOCKET = "run/crio/crio.sock"


def directory() -> Path:
    """Where the programs are. Raises `Refused` with what to put where, if any is missing."""
    absent = missing()
    if absent:
        raise Refused(
            "this machine has no CRI-O to run in the lab",
            why=f"{DIRECTORY} lacks {', '.join(absent)}",
            remedy=f"put {', '.join(PROGRAMS)} of CRI-O 1.34 or later there, or point PODFERRY_CRIO_BIN to where they are",
        )
    return DIRECTORY


def missing() -> list[str]:
    """The programs that are not there, or cannot be run."""
    return [name for name in PROGRAMS if not os.access(DIRECTORY / name, os.X_OK)]


def config() -> str:
    """CRI-O's configuration: what a cluster's own installer leaves. Nothing is said of podferry's runtime."""
    return f"""\
[crio]
root = "/var/lib/containers/storage"
runroot = "/run/containers/storage"
storage_driver = "overlay"
[crio.api]
listen = "/{SOCKET}"
stream_port = "0"
[crio.runtime]
default_runtime = "runc"
cgroup_manager = "cgroupfs"
pinns_path = "{IN_NODES}/pinns"
[crio.runtime.runtimes.runc]
runtime_path = "/usr/local/sbin/runc"
runtime_root = "/run/runc"
monitor_path = "{IN_NODES}/conmon"
monitor_cgroup = "pod"
[crio.image]
pause_image = "{PAUSE_IMAGE}"
signature_policy = "/etc/containers/policy.json"
[crio.network]
network_dir = "{CNI}"
plugin_dirs = ["/usr/lib/cni"]
"""
