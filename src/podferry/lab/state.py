"""Where labs keep what they have on disk, what they may be called, and the locks that keep two commands apart.

Everything lies under one directory: `cache/` is shared by all labs, `labs/NAME/` is one lab's and goes with it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from podferry.core.labhost import NOT_BELOW_OVERLAYS
from podferry.errors import Refused, UsageError
from podferry.node.host import mount_of

STATE = Path(os.environ.get("PODFERRY_STATE", "/var/lib/podferry"))
CACHE = STATE / "cache"
LABS = STATE / "labs"

INSIDE = "PODFERRY_IN_NODE"
"""Set in the environment of tests that run inside a node."""

STORAGE = "storage"
CONTROL = "control"
"""Kubernetes' control plane, in labs that have one."""
SWITCH = "switch"
CONTAINERD, CRIO = RUNTIMES = ("containerd", "crio")
"""What makes the containers of a node."""
MOST_NODES = len(string.ascii_lowercase)

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


def check_name(name: str) -> str:
    """`name` itself if a lab may be called so; else `UsageError`."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} cannot be a lab's name",
            remedy="use at most 32 lower-case letters, digits and dashes",
        )
    return name


def runtime_of(node: str, runtimes: str) -> str:
    """A node's container runtime: `runtimes` names those of node-a, node-b and so on, the last one that of all others.

    Raises `UsageError` for a name that is none.
    """
    named = runtimes.split(",")
    if wrong := sorted(set(named) - {CONTAINERD, CRIO}):
        raise UsageError(f"{wrong[0][:80]!r} is no container runtime", remedy=f"use {' or '.join(RUNTIMES)}")
    number = string.ascii_lowercase.find(node.removeprefix("node-"))
    return named[min(number, len(named) - 1)]


def node_names(count: int) -> list[str]:
    """node-a, node-b, ... Raises `UsageError` for fewer than 1 or more than 26."""
    if not 1 <= count <= MOST_NODES:
        raise UsageError(f"a lab cannot have {count} nodes", remedy=f"use 1 to {MOST_NODES}")
    return [f"node-{letter}" for letter in string.ascii_lowercase[:count]]


def subnet(lab: str) -> str:
    """The first three numbers of the lab's addresses, its own by its name.

    Nothing routes out of a lab, so even two labs that share them would not meet.
    """
    digest = hashlib.sha256(lab.encode()).digest()
    return f"10.{64 + digest[0] % 128}.{digest[1]}"


def addresses(lab: str, nodes: list[str], *, control: bool = False) -> dict[str, str]:
    """The address of every machine of a lab, the storage node's among them, and the control plane's if there is one."""
    net = subnet(lab)
    own = {STORAGE: f"{net}.2", **({CONTROL: f"{net}.3"} if control else {})}
    return {**own, **{node: f"{net}.{11 + number}" for number, node in enumerate(nodes)}}


def inside() -> bool:
    """Whether this process runs inside a lab's node."""
    return bool(os.environ.get(INSIDE))


def require_root() -> None:
    """Raises `UsageError` for anyone but root."""
    if os.geteuid() != 0:
        raise UsageError(
            "the lab needs root",
            why="it makes namespaces, mounts and cgroups",
            remedy="run it again with sudo",
        )


def require_plain_disk() -> None:
    """Raises `Refused` where the state lies on an overlay: containerd's and the nodes' overlays cannot lie on one."""
    STATE.mkdir(parents=True, exist_ok=True)
    kind = mount_of(STATE).kind
    if kind in NOT_BELOW_OVERLAYS:
        raise Refused(
            f"the lab cannot keep its state in {STATE}",
            why=f"it is on {kind}, and the nodes' overlays need a plain disk file system below them",
            remedy="mount a volume there, or point PODFERRY_STATE to a directory on ext4, xfs or btrfs",
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock at `path`; waits for whoever has it. The file goes with the last holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is(descriptor, path):
            break
        os.close(descriptor)  # its holder removed it while we waited
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
