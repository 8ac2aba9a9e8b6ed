"""Properties that a machine has whether it runs the lab or is a node itself, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from podferry.core.findings import Finding, blocked, fine, limited

SYS_RESOURCE = "sys_resource"
CAPABILITIES = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap",
    "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner",
    "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice",
    SYS_RESOURCE, "sys_time", "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap",
    "mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf",
    "checkpoint_restore",
)  # fmt: skip
"""By their numbers, as linux/capability.h has them."""
NEEDED = (
    "chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap", "net_admin", "sys_chroot",
    "sys_ptrace", "sys_admin", "mknod", "setfcap",
)  # fmt: skip
MACHINES = ("x86_64", "aarch64")


@dataclass(frozen=True)
class Privileges:
    """The caller's privileges: `capabilities` are those in effect, `user_namespace` says whether it is in one of its own,
    `confined` is the AppArmor profile or SELinux context that holds it, empty where none does."""

    root: bool
    user_namespace: bool
    capabilities: frozenset[str]
    confined: str = ""


@dataclass(frozen=True)
class Kernel:
    """The features of this kernel; None where only root can find out. `checkpoint` is CONFIG_CHECKPOINT_RESTORE, `tracker` how
    written memory is found (`uffd`, `soft-dirty`, `none`), `tracker_reason` why so, `lazy_pages` whether restored memory
    can be filled by userfaultfd, `userns_restricted` AppArmor's restriction of unprivileged user namespaces."""

    release: str
    machine: str
    checkpoint: bool
    lazy_pages: bool | None
    tracker: str | None
    tracker_reason: str
    userns_restricted: bool = False
    selinux: bool = False

    @property
    def version(self) -> tuple[int, ...]:
        """Major and minor number of the release."""
        return version_of(self.release)


def version_of(release: str) -> tuple[int, ...]:
    """Major and minor number of a kernel's release, such as `6.12.48+deb13-amd64`."""
    return tuple(int(part) for part in release.partition("-")[0].split(".")[:2] if part.isdecimal())


NO_UDP_LITE, CRIU_WITHOUT_UDP_LITE = (7, 1), (4, 3)
"""The first Linux without that protocol, and the first CRIU that saves a network namespace of such a kernel."""
NO_UDP_LITE_WHY = "Linux has had no UDP-Lite since 7.1, which CRIU before 4.3 takes for a failure of every dump"
NO_UDP_LITE_REMEDY = "install CRIU 4.3 or later, or boot Linux 7.0 or earlier"


def needs_later_criu(release: str, criu: tuple[int, ...]) -> bool:
    """Whether this CRIU cannot save a container on this kernel, for the kernel has no UDP-Lite."""
    return version_of(release) >= NO_UDP_LITE and criu < CRIU_WITHOUT_UDP_LITE


def of_privileges(found: Privileges) -> Iterator[Finding]:
    """May the caller do what it must?"""
    if not found.root:
        yield blocked(
            "user",
            "not root",
            "namespaces, mounts, cgroups and the memory of other processes need root, and some of what is below",
            "run it with sudo",
        )
        return
    if found.user_namespace:
        yield blocked(
            "user",
            "root of a user namespace only (a rootless container)",
            "such a root may neither make device nodes nor mount what nodes need",
            "use a root of the machine itself, or a container started by root with --privileged",
        )
        return
    yield fine("user", "root")
    missing = [name for name in NEEDED if name not in found.capabilities]
    if missing:
        yield blocked(
            "capabilities",
            "missing: " + ", ".join(f"CAP_{name.upper()}" for name in missing),
            "namespaces, mounts and the restoring of processes need them",
            "run it with all capabilities; in a container, with --privileged",
        )
    elif SYS_RESOURCE not in found.capabilities:
        yield limited(
            "capabilities",
            "all that are needed but CAP_SYS_RESOURCE",
            "jobs that do not run as root cannot be moved: their resource limits cannot be read",
            "run it with all capabilities, or the jobs as root",
        )
    else:
        yield fine("capabilities", "all that are needed")
    if found.confined:
        yield limited(
            "confinement",
            found.confined,
            "what it forbids fails, mounts above all",
            "run it unconfined; in a container, with --security-opt apparmor=unconfined or --privileged",
        )


SELINUX_WHY = "CRIU would restore processes and files with labels that the policy of the target need not allow"
SELINUX_REMEDY = (
    "make it permissive (setenforce 0, and SELINUX=permissive in /etc/selinux/config), or leave this node out"
)


def of_kernel(found: Kernel, *, lab: bool = False) -> Iterator[Finding]:
    """Can this kernel save, track, restore and feed processes? In a `lab`, nothing has labels of SELinux's."""
    name = f"Linux {found.release} on {found.machine}"
    if found.machine not in MACHINES:
        yield blocked("kernel", name, "podferry knows the registers of these only", f"use {' or '.join(MACHINES)}")
    elif not found.checkpoint:
        yield blocked(
            "kernel",
            name,
            "it has no CONFIG_CHECKPOINT_RESTORE, so CRIU cannot work",
            "use a distribution's own kernel",
        )
    elif found.machine != "x86_64":
        yield limited(
            "kernel", name, "no whole move has been tried on this processor yet", "try it before you rely on it"
        )
    else:
        yield fine("kernel", name)
    yield from _of_userfaultfd(found)
    yield from _of_tracking(found)
    if found.userns_restricted:
        yield fine("user namespaces", "AppArmor keeps them from users without privileges; root has them")
    if found.selinux:
        if lab:
            yield limited(
                "SELinux", "enforcing", "no lab has been tried with it", "if migrations fail, look for denials"
            )
        else:
            yield blocked("SELinux", "enforcing", SELINUX_WHY, SELINUX_REMEDY)


def _of_userfaultfd(found: Kernel) -> Iterator[Finding]:
    if found.lazy_pages is None:
        yield limited("userfaultfd", "not tried", "only root can tell", "run it with sudo")
    elif found.lazy_pages:
        yield fine("userfaultfd", "it reports forks, moves and removals")
    else:
        yield blocked(
            "userfaultfd",
            "missing, or it does not report forks, moves and removals",
            "nothing can be restored here: memory is filled by it",
            "use a kernel with CONFIG_USERFAULTFD, and a seccomp profile that allows userfaultfd(2)",
        )


def _of_tracking(found: Kernel) -> Iterator[Finding]:
    if found.tracker is None:
        yield limited("tracking", "not tried", "only root can tell", "run it with sudo")
    elif found.tracker == "none":
        yield limited(
            "tracking",
            found.tracker_reason,
            "mode live cannot leave this machine; postcopy and stop can",
            "use Linux 6.7 or later, or a kernel with CONFIG_MEM_SOFT_DIRTY",
        )
    elif found.tracker == "soft-dirty":
        yield limited(
            "tracking",
            found.tracker_reason,
            "the job is paused for a moment in every round",
            "Linux 6.7 or later does without",
        )
    else:
        yield fine("tracking", found.tracker_reason)
