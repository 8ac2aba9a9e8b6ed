"""An agent in a pod: what must run outside its container, and how.

The DaemonSet gives the agent's container the node's processes, network and devices, but a file system and cgroups of its own.
The node's programs (runc, CRIU) need the node's file system. And what is to outlive the agent needs another cgroup, since the
end of a container is the end of everything in its cgroups. On a host without Kubernetes the agent is outside already.

A program of the node may need one of ours, and a Python for it, which is in the container: the way there is `/proc/PID/root`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from podferry.fs.libc import checked, libc
from podferry.node.process import Arg

IN_POD = "PODFERRY_IN_POD"
"""Set in the environment of an agent that runs in a pod, and of its helpers."""

CGROUPS = Path("/sys/fs/cgroup")
CGROUP = "podferry"
"""The node's cgroup for what outlives an agent. The agent's own limit of memory is not theirs (`podferry.agent.memory`)."""

CLONE_FS, CLONE_NEWNS = 0x200, 0x20000  # linux/sched.h

FIRST = 1
"""The pid of a process that has the node's own mounts."""

Result = TypeVar("Result")


_ENTER = (
    'ulimit -S -d unlimited || :; while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs"; shift; done; shift; exec "$@"'
)


def in_pod() -> bool:
    """Whether this process belongs to an agent that runs in a pod."""
    return os.environ.get(IN_POD) == "1"


def root() -> Path:
    """The node's root directory, as this process reaches it."""
    return Path("/proc/1/root") if in_pod() else Path("/")


def surviving(argv: Sequence[Arg]) -> list[Arg]:
    """The command that runs one of our own helpers so that it outlives the agent. Its pid is that of the command."""
    if not in_pod():
        return list(argv)
    return ["sh", "-ec", _ENTER, "sh", *make_cgroups(), "--", *argv]


def on_node(argv: Sequence[Arg]) -> list[Arg]:
    """The command that runs a program of the node among the node's files, so that it outlives the agent."""
    if not in_pod():
        return list(argv)
    return surviving(["nsenter", "--target=1", "--mount", "--", *argv])


def from_node(argv: Sequence[Arg]) -> list[Arg]:
    """The command by which a program of the node, among the node's files, runs one of ours. That is then among the files of the
    agent's container, though not in its mount namespace, and finds the node's at `root()`. Once this agent has ended it fails.
    """
    return ["chroot", f"/proc/{os.getpid()}/root", *argv] if in_pod() else list(argv)


def among_node_mounts(function: Callable[[], Result]) -> Result:
    """Call `function` where the node's own mounts are.

    In a pod every directory of the node is a mount of its own: nothing can be renamed from one to another, and a mount that is
    made is seen by nobody on the node.
    """
    if not in_pod():
        return function()
    results: list[Result] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            _enter_mounts_of(FIRST)
            results.append(function())
        except BaseException as error:  # noqa: BLE001  it is raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(
        target=body, name="node-mounts"
    )  # which ends there: no other code ever runs among these mounts
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _enter_mounts_of(pid: int) -> None:
    """For this thread alone."""
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        checked(libc.unshare(CLONE_FS), f"/proc/{pid}/ns/mnt")
        checked(libc.setns(namespace, CLONE_NEWNS), f"/proc/{pid}/ns/mnt")
    finally:
        os.close(namespace)


def make_cgroups(top: Path = CGROUPS, name: str = CGROUP) -> list[Path]:
    """Make the cgroup `name` in every hierarchy below `top`, v1 or v2, where it is missing; returns the directories."""
    if (top / "cgroup.procs").exists():
        tops = [top]
    else:
        tops = sorted(path.parent for path in top.glob("*/cgroup.procs") if not path.parent.is_symlink())
    made = []
    for hierarchy in tops:
        directory = hierarchy / name
        directory.mkdir(exist_ok=True)
        for setting in ("cpuset.cpus", "cpuset.mems"):  # empty in a new v1 cgroup, and nothing may enter it then
            file = directory / setting
            if hierarchy != top and file.exists() and not file.read_text().strip():
                file.write_text((hierarchy / setting).read_text())
        made.append(directory)
    return made
