"""What a job has open, or keeps in its message queues, that CRIU cannot save, beyond what the name of a descriptor tells."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from podferry.core.preflight import CONTROLLING, MESSAGE_QUEUE, PACKET_PIPE, SEMAPHORE, SHARED_LOCK, WATCHED
from podferry.fs.mountinfo import MountEntry, mounts
from podferry.node.watched import unfindable, watched

_CONTROLLING, _MASTER = (5, 0), (5, 2)
"""/dev/tty and /dev/ptmx."""
_LOCKED_BY_A_SERVER = frozenset(
    {"nfs", "nfs4", "ceph", "cifs", "smb3", "9p", "lustre", "gfs2", "ocfs2", "orangefs", "afs"}
)
"""File systems whose locks all nodes see, and this node's kernel tells of. What FUSE passes on to a daemon, no kernel tells."""


def unsaved_files(init: int, pids: Iterable[int]) -> Iterator[str]:
    """As `ContainerFacts.unsaved` names it. What ends meanwhile is left out. The container's first process is `init`."""
    pids = list(pids)
    queues, servers = _queues(init), _served(init)
    terminals: dict[tuple[int, int], set[int]] = {_MASTER: set(), _CONTROLLING: set()}
    for pid in pids:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    link = str(descriptor.readlink())
                    if link.startswith("pipe:[") and int(_told(pid, descriptor.name, "flags"), 8) & os.O_DIRECT:
                        yield PACKET_PIPE
                    if link == "anon_inode:[eventfd]" and _told(pid, descriptor.name, "eventfd-semaphore") == "1":
                        yield SEMAPHORE  # the kernel tells it since 6.6; CRIU up to 4.2 does not ask
                    found = descriptor.stat()
                    if found.st_dev in queues:
                        yield MESSAGE_QUEUE
                    if found.st_dev in servers and _told(pid, descriptor.name, "lock") != "0":
                        yield SHARED_LOCK  # CRIU would wait for it in the restore
                    if stat.S_ISCHR(found.st_mode):
                        terminals.get((os.major(found.st_rdev), os.minor(found.st_rdev)), set()).add(pid)
    if any(queues.values()):
        yield MESSAGE_QUEUE  # CRIU mounts the file system anew, without its queues and what is in them
    if any(terminals[_MASTER] - {one} for one in terminals[_CONTROLLING]):
        yield CONTROLLING  # CRIU's tty_verify_ctty takes the master for the terminal's other descriptor, and its owner is another
    with suppress(OSError):
        if unfindable(init, watched(pids)):
            yield WATCHED


def names_gone(pids: Iterable[int]) -> bool:
    """Whether a file is open or mapped whose name is gone and that has another: CRIU gives it one more, beside where it was."""
    return any(_is_link_without_name(link) for pid in pids for link in chain(_descriptors(pid), _mappings(pid)))


def _is_link_without_name(link: Path) -> bool:
    with suppress(OSError):
        return str(link.readlink()).endswith(" (deleted)") and link.stat().st_nlink > 0
    return False


def _descriptors(pid: int) -> Iterator[Path]:
    """One at a time: a process may have a million."""
    with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as listing:
        yield from (Path(one.path) for one in listing)


def _mappings(pid: int) -> Iterator[Path]:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_bytes().splitlines():
            if line.endswith(b" (deleted)"):
                yield Path(f"/proc/{pid}/map_files/{line.split(maxsplit=1)[0].decode()}")


def _queues(init: int) -> dict[int, bool]:
    """The container's file systems of POSIX message queues, and whether there is a queue in each."""
    found = {}
    for one in _mounted(init):
        if one.kind == "mqueue":
            with suppress(OSError):
                found[one.device] = any(Path(f"/proc/{init}/root{one.point}").iterdir())
    return found


def _served(init: int) -> frozenset[int]:
    """The container's file systems whose locks a server keeps."""
    return frozenset(
        one.device for one in _mounted(init) if one.kind in _LOCKED_BY_A_SERVER and "local_lock=all" not in one.settings
    )


def _mounted(init: int) -> list[MountEntry]:
    """What is mounted in the container; nothing where it has ended."""
    try:
        return mounts(init)
    except OSError:
        return []


def _told(pid: int, number: str, field: str) -> str:
    """What the kernel tells of a descriptor; "0" where it says nothing of that."""
    with Path(f"/proc/{pid}/fdinfo/{number}").open() as info:
        return next((line.partition(":")[2].strip() for line in info if line.startswith(f"{field}:")), "0")
