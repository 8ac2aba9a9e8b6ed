"""A tmpfs of our own for memory on its way: filling it takes nothing from others that need /run, as containerd and the kubelet do.

/run is 10 to 20 % of memory on every distribution, and a job's whole memory passes through. Where the kernel has `noswap`
(Linux 6.4), none of it reaches a disk.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from podferry.errors import CommandFailed, TimedOut
from podferry.fs.private import private_directory
from podferry.node import outside
from podferry.node.process import run

RUN = "/run/podferry"
SOURCE = "podferry"
"""By which ours is known in the list of mounts."""
SIZE = "80%"
"""Of the node's memory. What may really come is decided by what is available (`podferry.workload.account`)."""
MOUNT_TIMEOUT = 20.0  # seconds
UNMOUNT = f'[ ! -S "$1/snapshotter.sock" ]; grep -q " $1 .* - tmpfs {SOURCE} " /proc/self/mountinfo; umount --lazy "$1"'
"""Not beneath podferry-snapshotter, which has its socket there, and whose containers and images stay."""
_SOCKETS = frozenset({"agent.sock"})


def ensure(directory: Path, size: str = SIZE) -> str:
    """Have `directory` be a tmpfs of its own; it is made. Returns why it is none, or nothing where it is.

    One that is a file system of its own already stays as it is, and so does one that holds anything of an earlier agent. The agent,
    the installer and podferry-snapshotter may all call this at the same time: one of them mounts it.
    """
    seen = outside.root() / str(directory).lstrip("/")
    private_directory(seen, below=seen)
    above = os.open(seen.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(above, fcntl.LOCK_EX)
        return _mount(directory, seen, size)
    finally:
        os.close(above)


def _mount(directory: Path, seen: Path, size: str) -> str:
    if _is_own(seen):
        return ""
    if left := sorted(one.name for one in seen.iterdir() if one.name not in _SOCKETS and _holds_anything(one)):
        return (
            f"{directory} holds {', '.join(left[:4])} of an earlier agent: it will be one after the node's next start"
        )
    why = ""
    for options in (f"mode=700,size={size},noswap", f"mode=700,size={size}"):
        try:
            done = run(
                outside.on_node(["mount", "-t", "tmpfs", "-o", options, SOURCE, directory]),
                check=False,
                timeout=MOUNT_TIMEOUT,
            )
        except (CommandFailed, TimedOut, OSError) as error:
            return f"{directory} cannot be mounted: {error}"
        if done.returncode == 0:
            return ""
        why = done.stderr.strip() or f"mount ended with {done.returncode}"
    return f"{directory} cannot be mounted: {why[-200:]}"


def _is_own(seen: Path) -> bool:
    return seen.stat().st_dev != seen.parent.stat().st_dev


def ensure_on_node(report: Callable[[str], None]) -> None:
    """What the installer does on each node of a cluster, before its agent starts."""
    if why := ensure(Path(RUN)):
        report(f"memory on its way shares /run with others: {why}")


def remove_from_node(report: Callable[[str], None]) -> None:
    """The way back, where what is mounted there is ours. Who still works there keeps it until its end."""
    try:
        done = run(outside.on_node(["sh", "-ec", UNMOUNT, "sh", RUN]), check=False, timeout=MOUNT_TIMEOUT)
    except (CommandFailed, TimedOut, OSError):
        return
    if done.returncode == 0:
        report(f"unmounted {RUN}")


def _holds_anything(path: Path) -> bool:
    return not path.is_dir() or any(path.iterdir())
