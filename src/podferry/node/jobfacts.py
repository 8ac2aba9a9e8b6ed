"""The properties of a running container that a migration depends on, from its spec, /proc and its cgroup."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from podferry.core.facts import Bind, ContainerFacts
from podferry.core.preflight import (
    FIRST_THREAD,
    GHOST,
    GHOST_BYTES,
    INTERFACE,
    OTHER_ROOT,
    SECRET,
    STOPPED,
    TRACED,
    UNACCEPTED,
    UNSENT,
    USER_NAMESPACE,
)
from podferry.errors import Failed
from podferry.fs.mountinfo import mounts
from podferry.node import netns, network_namespace
from podferry.node.cgroup import Cgroup
from podferry.node.records import Container, Task
from podferry.node.sockets import to_others, unaccepted, unsaved_sockets, unsent, waits_for
from podferry.node.unsaved_files import unsaved_files

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts", "time")
# What CRIU 4 saves of files without a name (its files.c); everything else of that kind it refuses.
SAVED = frozenset({"eventfd", "eventpoll", "inotify", "fanotify", "signalfd", "timerfd", "pidfd"})
# null, zero, full, random, urandom; tty, console, ptmx; pseudo-terminals.
PLAIN_DEVICES = frozenset({(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)})
PTS_MAJORS = range(136, 144)
SECONDS_TO_ACCEPT = 3.0
"""For as long as a freeze waits for it at least (`workload/source.py`)."""
LISTED = 32  # of each kind, at most: facts travel
_SECRET = "/secretmem"
"""How the kernel names what memfd_secret(2) makes."""
_MEMORY = ("/memfd:", "/SYSV", "/dev/zero", "/anon_hugepage", _SECRET)
_ANONYMOUS = re.compile(r"anon_inode:\[?([^\]]+)\]?")


def container_facts(record: Container, task: Task, cgroup: Cgroup, upper: Path) -> ContainerFacts:
    """Inspect a running container. What ends or vanishes meanwhile is left out. Raises `CgroupFailed`."""
    spec = record.spec_json()
    pids = cgroup.pids()
    has_open = _Open.by(pids)
    sizes = [_status(pid) for pid in pids]
    return ContainerFacts(
        id=record.id,
        image=record.image,
        binary=record.runc_options().binary_name or "runc",
        pids=pids,
        host_namespaces=tuple(sorted(_host_namespaces(task.pid))),
        devices=_few({*has_open.devices, *_allowed_devices(spec)}),
        unsaved=_few(
            [
                *has_open.unsaved,
                *unsaved_processes(task.pid, pids),
                *([STOPPED] if cgroup.v1_freezer and any(map(is_stopped, pids)) else ()),
                *unsaved_sockets(pids),
                *([UNACCEPTED] if waits_for(SECONDS_TO_ACCEPT, unaccepted, task.pid, pids) else ()),
                *([UNSENT] if waits_for(SECONDS_TO_ACCEPT, unsent, task.pid, pids) else ()),
                *unsaved_files(task.pid, pids),
                *_interfaces(task.pid, spec),
            ]
        ),
        binds=tuple(binds(spec)),
        connections=to_others(task.pid, pids),
        stdio=tuple(_stdio(task.pid, number) for number in (0, 1, 2)),
        memory=cgroup.memory_usage(),
        anonymous=sum(map(_anonymous, sizes)),
        shared=sum(size.get("RssShmem", 0) for size in sizes),
        tmpfs=sum(_tmpfs(task.pid, {bind.destination for bind in binds(spec)})),
        upper=disk_usage(upper),
    )


def resident(pid: int) -> int:
    """Bytes of private anonymous memory that a process has, in memory or swapped out."""
    return _anonymous(_status(pid))


def may_read_limits(pid: int) -> bool:
    """Whether we may read a process' resource limits. One that is gone has none."""
    try:
        resource.prlimit(pid, resource.RLIMIT_CPU)
    except PermissionError:
        return False
    except OSError:
        pass
    return True


def disk_usage(root: Path) -> int:
    """Bytes on disk of all that is below `root`. Lists no directory as a whole: there may be millions of files in one."""
    total, todo = 0, [str(root)]
    while todo:
        with contextlib.suppress(OSError), os.scandir(todo.pop()) as listing:
            for entry in listing:
                with contextlib.suppress(OSError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
    return total


def _open_files(pids: Iterable[int]) -> Iterator[tuple[str, os.stat_result]]:
    """What the processes have open: the kernel's name for it, and its stat. One at a time: a process may have a million."""
    for pid in pids:
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as listing:
            for entry in listing:
                with contextlib.suppress(OSError):
                    yield os.readlink(entry.path), os.stat(entry.path)  # noqa: PTH115, PTH116 - a million times


@dataclass
class _Open:
    """What matters of what processes have open."""

    devices: set[str] = field(default_factory=set)
    unsaved: set[str] = field(default_factory=set)

    @staticmethod
    def by(pids: Iterable[int]) -> _Open:
        found = _Open()
        for link, status in _open_files(pids):
            if _is_device(status):
                found.devices.add(link)
            elif link.startswith(_SECRET):
                found.unsaved.add(SECRET)
            elif _is_ghost(link, status) and status.st_blocks * 512 > GHOST_BYTES:
                found.unsaved.add(GHOST)
            elif (kind := _ANONYMOUS.match(link)) and kind[1] not in SAVED:
                found.unsaved.add(kind[1])
        return found


def _is_ghost(link: str, found: os.stat_result) -> bool:
    """Whether it is a file that was deleted and lives on in a process alone, other than memory that looks like one."""
    return stat.S_ISREG(found.st_mode) and not found.st_nlink and not link.startswith(_MEMORY)


def _is_device(found: os.stat_result) -> bool:
    if not (stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        return False
    major, minor = os.major(found.st_rdev), os.minor(found.st_rdev)
    return (major, minor) not in PLAIN_DEVICES and major not in PTS_MAJORS


def deleted_but_open(pids: Iterable[int], mounted: Collection[str]) -> tuple[str, ...]:
    """Which of the files `mounted` into a container were deleted where they come from, and are open."""
    named = {
        link.removesuffix(" (deleted)").removesuffix("//deleted")
        for link, found in _open_files(pids)
        if not found.st_nlink
    }
    return tuple(sorted(named & set(mounted)))


def _interfaces(pid: int, spec: dict[str, Any]) -> Iterator[str]:
    """Interfaces beside loopback that are up in a network namespace that runc has made, and that nobody makes on the target."""
    if netns.is_own(spec):
        with contextlib.suppress(OSError, Failed):
            for name in network_namespace.interfaces(pid):
                yield f"{INTERFACE} {name}"


def _allowed_devices(spec: dict[str, Any]) -> Iterator[str]:
    """Device files that the spec puts into the container beyond the runtime's own."""
    for device in (spec.get("linux") or {}).get("devices") or []:
        if (device.get("major"), device.get("minor")) not in PLAIN_DEVICES:
            yield str(device.get("path"))


def unsaved_processes(init: int, pids: Collection[int]) -> Iterator[str]:
    """What CRIU cannot save of the processes themselves: one that another of them traces, in a user namespace of its
    own, whose first thread has ended, or that has secret memory."""
    with contextlib.suppress(OSError):
        if os.readlink(f"/proc/{init}/root") != "/":  # noqa: PTH115 - of another mount namespace
            yield OTHER_ROOT  # CRIU reads the mounts from its mountinfo, which lists what is below its root
    for pid in pids:
        with contextlib.suppress(OSError, ValueError):
            status = Path(f"/proc/{pid}/status").read_text()
            if (tracer := re.search(r"^TracerPid:\s+(\d+)$", status, re.MULTILINE)) and int(tracer[1]) in pids:
                yield TRACED
            if re.search(r"^State:\s+Z", status, re.MULTILINE) and _more_threads(pid):
                yield FIRST_THREAD
                continue
            if _SECRET in Path(f"/proc/{pid}/maps").read_text():
                yield SECRET
            if Path(f"/proc/{pid}/ns/user").readlink() != Path(f"/proc/{init}/ns/user").readlink():
                yield USER_NAMESPACE


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process. In a frozen cgroup v1 it waits for ever to become one that is traced: CRIU hangs in
    PTRACE_SEIZE (the kernel's ptrace_attach, JOBCTL_TRAPPING) where it could not be broken off."""
    with contextlib.suppress(OSError):
        return re.search(r"^State:\s+T", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE) is not None
    return False


def _more_threads(pid: int) -> bool:
    """Whether a process has a thread beside its first."""
    return any(one.name != str(pid) for one in Path(f"/proc/{pid}/task").iterdir())


def _host_namespaces(pid: int) -> Iterator[str]:
    for name in NAMESPACES:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/ns/{name}").readlink() == Path(f"/proc/1/ns/{name}").readlink():
                yield name


def binds(spec: dict[str, Any]) -> Iterator[Bind]:
    """What of the node a spec mounts into the container."""
    for mount in spec.get("mounts") or []:
        if mount.get("type") == "bind" or {"bind", "rbind"} & set(mount.get("options") or []):
            yield Bind(str(mount.get("source")), str(mount.get("destination")))


def _stdio(pid: int, number: int) -> str:
    path = Path(f"/proc/{pid}/fd/{number}")
    try:
        link, found = str(path.readlink()), path.stat()
    except OSError:
        return "closed"
    if stat.S_ISFIFO(found.st_mode):
        return "pipe"
    if stat.S_ISSOCK(found.st_mode):
        return "socket"
    if stat.S_ISCHR(found.st_mode):
        return "null" if (os.major(found.st_rdev), os.minor(found.st_rdev)) == (1, 3) else "terminal"
    return f"file {link}"


def _status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {name: int(size) << 10 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _anonymous(sizes: Mapping[str, int]) -> int:
    return sizes.get("RssAnon", 0) + sizes.get("VmSwap", 0)


def _tmpfs(pid: int, mounted: Collection[str]) -> Iterator[int]:
    """How much each of the container's own memory file systems holds; those that are `mounted` into it are not its own."""
    with contextlib.suppress(OSError):
        seen = set()
        for one in mounts(pid):
            own = one.root == "/" and one.point not in mounted
            if one.kind == "tmpfs" and one.device not in seen and own:
                seen.add(one.device)
                with contextlib.suppress(OSError):
                    found = os.statvfs(f"/proc/{pid}/root{one.point}")
                    yield (found.f_blocks - found.f_bfree) * found.f_frsize


def _few(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))[:LISTED]
