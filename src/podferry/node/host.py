"""Privileges and resources of a machine, read outside any container; facts for `podferry doctor`."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from podferry.core.host import CAPABILITIES, Privileges
from podferry.fs.mountinfo import holding, mounts_in

_ALL_USERS = ["0", "0", "4294967295"]


@dataclass(frozen=True)
class HostMount:
    """A mount: where, of what kind, with the options of the mount and of its file system."""

    point: Path
    kind: str
    options: frozenset[str]


def privileges(proc: Path = Path("/proc")) -> Privileges:
    """What this process may do."""
    status = (proc / "self/status").read_text()
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    names = frozenset(name for number, name in enumerate(CAPABILITIES) if effective >> number & 1)
    own_namespace = (proc / "self/uid_map").read_text().split() != _ALL_USERS
    return Privileges(os.geteuid() == 0, own_namespace, names, _confinement(proc))


def _confinement(proc: Path) -> str:
    """The AppArmor profile that is enforced on us."""
    if not Path("/sys/module/apparmor").exists():
        return ""
    try:
        label = (proc / "self/attr/current").read_text().strip("\n\0 ")
    except OSError:
        return ""
    return "" if not label.endswith("(enforce)") else f"AppArmor profile {label}"


def selinux_enforces(root: Path = Path("/")) -> bool:
    """Whether SELinux enforces its policy on the node whose root directory is `root`."""
    return setting(str(root / "sys/fs/selinux/enforce")) == "1"


def mount_of(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> HostMount:
    """The mount that `path` is on, or would be on if it were there."""
    found = holding(str(existing(path)), mounts_in(mountinfo))
    if found is None:
        return HostMount(Path("/"), "unknown", frozenset())
    return HostMount(Path(found.point), found.kind.partition(".")[0], frozenset((*found.options, *found.settings)))


def existing(path: Path) -> Path:
    """`path` without links, or the nearest directory above it that is there."""
    path = Path(os.path.realpath(path))
    return next(one for one in (path, *path.parents) if one.exists())


def room(path: Path) -> tuple[int, int]:
    """Bytes that are free, and all bytes, on the file system that `path` is or would be on."""
    usage = shutil.disk_usage(existing(path))
    return usage.free, usage.total


def free_inodes(path: Path) -> int | None:
    """How many files can still be made where `path` is or would be; None where the file system has no fixed number."""
    found = os.statvfs(existing(path))
    return found.f_favail if found.f_files else None


def answering(sockets: Iterable[tuple[str, Path]]) -> tuple[str, ...]:
    """The names of those at whose unix socket somebody listens."""
    return tuple(name for name, path in sockets if listens(path))


def listens(path: Path) -> bool:
    """Whether somebody listens at a unix socket; one that we may not reach counts."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1.0)
        try:
            client.connect(str(path))
        except PermissionError:
            return True
        except OSError:
            return False
        return True


def setting(path: str) -> str:
    """What a file of the kernel's says, stripped; empty where there is none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
