"""The facts by which `podferry doctor --node` judges, gathered on the node or in its agent's pod."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from podferry.core.facts import RuntimeKind
from podferry.core.host import Kernel
from podferry.core.nodehost import NodeHost, Place
from podferry.memory.tracking import tracker
from podferry.node import host, kubelet, outside
from podferry.node.cgroup import trees
from podferry.workload.config import Config
from podferry.workload.nodefacts import has_lazy_pages, node_facts, version

CRIO_SOCKET = Path("/run/crio/crio.sock")
OTHER_RUNTIMES = (
    ("Docker", Path("/run/docker.sock")),
    ("k3s' containerd", Path("/run/k3s/containerd/containerd.sock")),
    ("CRI-O", CRIO_SOCKET),
    ("Podman", Path("/run/podman/podman.sock")),
)


def kernel() -> Kernel:
    """Probe the features of this machine's kernel in this process."""
    root, system = os.geteuid() == 0, os.uname()
    chosen = tracker.choose(tracker.probe()) if root else None
    return Kernel(
        release=system.release,
        machine=system.machine,
        checkpoint=Path("/proc/sys/kernel/ns_last_pid").exists(),  # only with CONFIG_CHECKPOINT_RESTORE
        lazy_pages=has_lazy_pages() if root else None,
        tracker=chosen.kind.value if chosen else None,
        tracker_reason=chosen.reason if chosen else "",
        userns_restricted=host.setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1",
        selinux=host.selinux_enforces(outside.root()),
    )


def node_host(config: Config) -> NodeHost:
    """The facts of an agent's node; `config` has the paths and sockets to look at."""
    found = kubelet.find()
    crio = found.has_crio if found is not None and found.endpoint else not host.listens(_on_node(config.containerd))
    crio = crio and host.listens(_on_node(CRIO_SOCKET))
    runtime, program = (RuntimeKind.CRIO, "crio") if crio else (RuntimeKind.CONTAINERD, "containerd")
    socket = CRIO_SOCKET if crio else config.containerd
    facts = node_facts(host.existing(config.state), host.existing(config.run), runtime, version(program))
    pods = config.kubelet if found is None else found.root
    return NodeHost(
        privileges=host.privileges(),
        kernel=kernel(),
        facts=facts,
        memory_total=_memory_total(),
        run=_place(config.run),
        state=_place(config.state),
        socket=str(socket) if host.listens(_on_node(socket)) else "",
        others=host.answering((name, _on_node(path)) for name, path in OTHER_RUNTIMES if path != socket),
        kubelet=str(pods) if _on_node(pods).is_dir() else "",
        wrapper=os.access(_on_node(config.wrapper), os.X_OK),
        cpu_controller=_has_cpu_controller(),
        python=sys.version_info[:2],
    )


def _on_node(path: Path) -> Path:
    return outside.root() / str(path).lstrip("/")


def _place(path: Path) -> Place:
    free, size = host.room(path)
    return Place(str(path), host.mount_of(path).kind, free, size)


def _has_cpu_controller() -> bool:
    """Whether containers can have the cpu controller: v1's, or v2's among those that the top has."""
    return any("cpu" in (tree.controllers or _controllers(tree.mountpoint)) for tree in trees())


def _controllers(v2: Path) -> frozenset[str]:
    return frozenset(host.setting(str(v2 / "cgroup.controllers")).split())


def _memory_total() -> int:
    found = re.search(r"^MemTotal: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0
