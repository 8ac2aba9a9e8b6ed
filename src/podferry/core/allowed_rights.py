"""The rights that a container's spec grants its processes: the bound for the rights in CRIU's images.

CRIU restores as root whatever its images say: ids, capabilities, mounts, groups. They come from a peer; so before the right to run
passes they are held against the spec of the container that was made here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from podferry.core.allowed_syscalls import Profile, profile_of

CAPABILITIES = (
    *(
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "LINUX_IMMUTABLE",
    ),
    *("NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO"),
    *("SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME"),
    *(
        "SYS_TTY_CONFIG",
        "MKNOD",
        "LEASE",
        "AUDIT_WRITE",
        "AUDIT_CONTROL",
        "SETFCAP",
        "MAC_OVERRIDE",
        "MAC_ADMIN",
        "SYSLOG",
    ),
    *("WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE"),
)
"""By their numbers in linux/capability.h."""
_NUMBERS = {f"CAP_{name}": number for number, name in enumerate(CAPABILITIES)}

NAMESPACES = {
    "pid": "pid_ns_id",
    "network": "net_ns_id",
    "ipc": "ipc_ns_id",
    "uts": "uts_ns_id",
    "mount": "mnt_ns_id",
    "user": "user_ns_id",
}
"""Kinds of namespaces as specs name them, and as CRIU's images do."""

READ_ONLY, NO_SUID, NO_DEV, NO_EXEC = 1, 2, 4, 8
_FLAGS = {"ro": READ_ONLY, "nosuid": NO_SUID, "nodev": NO_DEV, "noexec": NO_EXEC}
# Of what a runtime masks or makes read-only, what every kernel has. The rest may be missing on the source.
_EVERYWHERE = frozenset(
    {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/kcore", "/proc/keys", "/proc/timer_list"}
)


@dataclass(frozen=True)
class Rights:
    """The rights that the processes of one container may have. Capabilities are sets of bits."""

    uid: int
    gids: frozenset[int]
    bounding: int
    permitted: int
    no_new_privileges: bool
    seccomp: Profile | None
    apparmor: str
    selinux: str
    oom_score_adj: int | None
    namespaces: Mapping[str, str]
    """The kinds that are its own, and the paths of those that somebody else has made for it."""
    mounts: Mapping[str, int]
    """The mount points of the container, with the flags that each has at least."""
    cgroups: frozenset[str]
    """Which of these show groups: with cgroup v1 a memory file system that has one mount below it for each tree."""
    demanded: frozenset[str]
    """Where something must be mounted, since what is there may not be seen or written."""

    def mount_flags(self, place: str, *, of_a_group: bool) -> int:
        """The flags that a mount at `place` must have; `of_a_group` says whether groups are what it shows."""
        if of_a_group:
            above = [self.mounts[one] for one in self.cgroups if place == one or place.startswith(f"{one}/")]
            return functools.reduce(operator.or_, above, self.mounts.get(place, 0))
        return self.mounts.get(place, 0) & ~(READ_ONLY if place in self.cgroups else 0)

    def has(self, capability: str) -> bool:
        """Whether its processes can come by this capability."""
        return bool(self.bounding & bit(capability))


def bit(capability: str) -> int:
    """A capability's bit; none for one that is not known."""
    number = _NUMBERS.get(capability)
    return 0 if number is None else 1 << number


def rights_of(spec: Mapping[str, Any], exists: Callable[[str], bool], machine: str) -> Rights:
    """The rights that an OCI spec grants. The spec is this node's own: containerd has made a container from it.

    `exists` says whether there is something at a path of this node's: what is not there need not be covered. `machine` is
    this node's kind of processor, as uname(2) names it.
    """
    process, linux = _object(spec, "process"), _object(spec, "linux")
    user, sets = _object(process, "user"), _object(process, "capabilities")
    bounding = _bits(sets.get("bounding"))
    permitted = bounding & (_bits(sets.get("permitted")) | _bits(sets.get("effective")) | _bits(sets.get("ambient")))
    masked, read_only = (list(linux.get(name) or []) for name in ("maskedPaths", "readonlyPaths"))
    mounts = dict.fromkeys(read_only, READ_ONLY) | dict.fromkeys(masked, 0) | {"/": 0, "/dev/console": 0}
    for mount in spec.get("mounts") or []:
        flags = sum(_FLAGS[one] for one in set(mount.get("options") or []) if one in _FLAGS)
        mounts[mount["destination"]] = mounts.get(mount["destination"], 0) | flags
    return Rights(
        uid=user.get("uid", 0),
        gids=frozenset({user.get("gid", 0), *(user.get("additionalGids") or [])}),
        bounding=bounding,
        permitted=permitted,
        no_new_privileges=bool(process.get("noNewPrivileges")),
        seccomp=profile_of(linux.get("seccomp"), machine),
        apparmor="" if (profile := process.get("apparmorProfile") or "") == "unconfined" else profile,
        selinux=process.get("selinuxLabel") or "",
        oom_score_adj=process.get("oomScoreAdj"),
        namespaces={one["type"]: one.get("path") or "" for one in linux.get("namespaces") or []},
        mounts=mounts,
        cgroups=frozenset(one["destination"] for one in spec.get("mounts") or [] if one.get("type") == "cgroup"),
        demanded=frozenset(path for path in (*masked, *read_only) if path in _EVERYWHERE and exists(path)),
    )


def _bits(names: Iterable[str] | None) -> int:
    return sum(bit(name) for name in set(names or ()))


def _object(of: Mapping[str, Any], name: str) -> dict[str, Any]:
    return of.get(name) or {}
