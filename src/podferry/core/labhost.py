"""Can this machine run the lab? Facts in, findings out; `podferry.lab.hostfacts` gathers the facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from podferry.core.findings import Finding, blocked, fine, limited, mebibytes
from podferry.core.host import (
    NO_UDP_LITE_REMEDY,
    NO_UDP_LITE_WHY,
    SYS_RESOURCE,
    Kernel,
    Privileges,
    needs_later_criu,
    of_kernel,
    of_privileges,
)
from podferry.core.preflight import PIPE_BYTES

NOT_BELOW_OVERLAYS = (
    "overlay",
    "tmpfs",
    "ramfs",
    "nfs",
    "nfs4",
    "fuseblk",
    "fuse",
    "9p",
    "virtiofs",
    "aufs",
    "ecryptfs",
)
"""File systems that the nodes' overlays cannot lie on."""
LEAST_MEMORY, GOOD_MEMORY = 512 << 20, 3 << 29
"""Two nodes and a storage node hold 270 MiB (measured); the demo's jobs and what is on its way are 768 MiB more."""
KUBERNETES_MEMORY = 1 << 30
"""More, for a control plane and two kubelets, which hold 530 MiB (measured), and for podferry's pods."""
LEAST_DISK, GOOD_DISK = 512 << 20, 2 << 30
LEAST_INODES = 50_000
SOCKETS_NEED_CRIU_42 = (6, 16)
"""The first Linux on which CRIU before 4.2 cannot dump a container that has a socket of inet open."""
V2_CONTROLLERS = ("cpu", "memory", "pids")

TRIALS = {
    "namespaces": ("the lab's nodes are namespaces", "run it with all capabilities and an unconfined seccomp profile"),
    "mount": ("nodes have a root of their own", "run it unconfined by AppArmor; in a container, with --privileged"),
    "proc": ("nodes have a /proc of their own", "in a container: --privileged, which leaves /proc and /sys unmasked"),
    "sysfs": ("nodes have a /sys of their own", "in a container: --privileged, which leaves /proc and /sys unmasked"),
    "devices": ("nodes have devices of their own", "run it with CAP_MKNOD and with access to devices"),
    "overlay": ("roots and containers are overlays", "modprobe overlay; PODFERRY_STATE names another disk"),
    "mqueue": ("nodes have POSIX message queues, as containers do", "use a kernel with CONFIG_POSIX_MQUEUE"),
    "fuse": ("the nodes' network file system is a FUSE one", "modprobe fuse; in a container, --device /dev/fuse"),
    "bridge": ("nodes are joined by a bridge", "modprobe bridge"),
    "veth": ("nodes are joined by virtual links", "modprobe veth"),
    "rate": ("links have a rate (tc-tbf)", "modprobe sch_tbf, of the package with the kernel's further modules"),
}
"""Operations that doctor tries: why the lab needs each, and the remedy where it fails."""


@dataclass(frozen=True)
class Disk:
    """The file system that the lab's state is on. Sizes are in bytes; `inodes` is None where it has no fixed number."""

    path: str
    kind: str
    free: int
    inodes: int | None
    options: frozenset[str]


@dataclass(frozen=True)
class Cgroups:
    """`kind` is v1, v2 or hybrid; `writable` says whether groups can be made there; `controllers` are those that nodes
    can have."""

    kind: str
    writable: bool
    controllers: frozenset[str]


@dataclass(frozen=True)
class LabHost:
    """A machine, as far as the lab cares. `trials` has a reason for everything of `TRIALS` that was tried and failed, and
    empty text for what worked; `to_build` the bytes that images still need; `programs_missing` what apt-get would install;
    `mirror_problem` why no Debian mirror is known; `pipe_settable` whether fs.pipe-max-size can be written; `daemons` the
    container runtimes of the host that answer; `clashes` routes of the host into the lab's own range."""

    privileges: Privileges
    kernel: Kernel
    trials: Mapping[str, str]
    cgroups: Cgroups
    memory: int
    disk: Disk
    to_build: int
    programs_missing: tuple[str, ...]
    apt: bool
    mirror_problem: str
    pipe_max_size: int
    pipe_settable: bool
    tmp_noexec: bool
    daemons: tuple[str, ...]
    subnet: str
    clashes: tuple[str, ...]
    ipv6: bool
    criu: tuple[int, ...]
    kubernetes: bool = False


def findings(host: LabHost) -> list[Finding]:
    """Everything that matters, the most basic first."""
    return [finding for check in CHECKS for finding in check(host)]


def _privileges(host: LabHost) -> Iterator[Finding]:
    yield from of_privileges(host.privileges)


def _kernel(host: LabHost) -> Iterator[Finding]:
    yield from of_kernel(host.kernel, lab=True)
    if needs_later_criu(host.kernel.release, host.criu):
        yield blocked(
            "nodes' CRIU",
            f"{'.'.join(map(str, host.criu))}, below Linux {host.kernel.release}",
            NO_UDP_LITE_WHY,
            NO_UDP_LITE_REMEDY,
        )
    elif host.kernel.version >= SOCKETS_NEED_CRIU_42 and host.criu < (4, 2):
        yield limited(
            "nodes' CRIU",
            f"{'.'.join(map(str, host.criu))}, below Linux {host.kernel.release}",
            "it cannot dump a job that has a socket of inet open",
            "podferry lab up --debian forky has a later one",
        )


def _trials(host: LabHost) -> Iterator[Finding]:
    works = [name for name, failure in host.trials.items() if not failure]
    if works:
        yield fine("namespaces and modules", "tried: " + ", ".join(works))
    for name, failure in host.trials.items():
        if failure:
            why, remedy = TRIALS[name]
            yield blocked(name, failure, why, remedy)


def _cgroups(host: LabHost) -> Iterator[Finding]:
    found = host.cgroups
    if not found.kind:
        yield blocked(
            "cgroups", "none are mounted", "nodes and containers live in cgroups", "mount cgroup2 at /sys/fs/cgroup"
        )
    elif not found.writable and host.privileges.root:
        yield blocked(
            "cgroups",
            f"{found.kind}, read-only",
            "nodes and containers live in cgroups",
            "in a container: --privileged, or mount /sys/fs/cgroup writable",
        )
    elif missing := [name for name in V2_CONTROLLERS if name not in found.controllers]:
        yield limited(
            "cgroups",
            f"{found.kind}, without {', '.join(missing)}",
            "containers are not limited by them"
            + ("; a job that writes too fast is not slowed down" * ("cpu" in missing)),
            "have systemd, or who runs this container, pass these controllers on",
        )
    else:
        yield fine("cgroups", f"{found.kind} with {', '.join(sorted(found.controllers))}")


def _memory(host: LabHost) -> Iterator[Finding]:
    more = KUBERNETES_MEMORY if host.kubernetes else 0
    found = f"{mebibytes(host.memory)} available"
    if host.memory < LEAST_MEMORY + more:
        yield blocked(
            "memory", found, f"two nodes and a storage node need {mebibytes(LEAST_MEMORY + more)}", "free or add memory"
        )
    elif host.memory < GOOD_MEMORY + more:
        yield limited(
            "memory",
            found,
            f"the demo's two jobs of 256 MiB may not fit: it wants {mebibytes(GOOD_MEMORY + more)}",
            "move smaller jobs, or add memory",
        )
    else:
        yield fine("memory", found)


def _disk(host: LabHost) -> Iterator[Finding]:
    disk = host.disk
    images = f", and {mebibytes(host.to_build)} are for images that are not built yet" if host.to_build else ""
    found = f"{mebibytes(disk.free)} free at {disk.path} ({disk.kind})"
    elsewhere = "point PODFERRY_STATE to a directory on a larger disk"
    if disk.kind in NOT_BELOW_OVERLAYS:
        yield blocked(
            "disk",
            f"{disk.path} is on {disk.kind}",
            "the nodes' overlays need a plain disk file system below them",
            "mount a volume there, or point PODFERRY_STATE to a directory on ext4, xfs or btrfs",
        )
        return
    if unfit := sorted(disk.options & {"ro", "noexec", "nodev"}):
        yield blocked(
            "disk",
            f"{disk.path} is mounted {', '.join(unfit)}",
            "the nodes' programs and devices lie there",
            f"mount -o remount,{','.join({'ro': 'rw', 'noexec': 'exec', 'nodev': 'dev'}[one] for one in unfit)}, "
            "or point PODFERRY_STATE elsewhere",
        )
        return
    if disk.inodes is not None and disk.inodes < LEAST_INODES and host.to_build:
        yield blocked("disk", f"{disk.inodes} inodes free at {disk.path}", f"images need {LEAST_INODES}", elsewhere)
    if disk.free < LEAST_DISK + host.to_build:
        yield blocked(
            "disk", found, f"a lab needs {mebibytes(LEAST_DISK + host.to_build)}{images}", f"free some, or {elsewhere}"
        )
    elif disk.free < GOOD_DISK + host.to_build:
        yield limited("disk", found, f"containers' images and files may fill it{images}", f"free some, or {elsewhere}")
    else:
        yield fine("disk", found)


def _building(host: LabHost) -> Iterator[Finding]:
    if host.programs_missing and not host.apt:
        yield blocked(
            "programs",
            f"missing: {', '.join(host.programs_missing)}, and there is no apt-get",
            "the lab's images are made of Debian packages",
            "use Debian or a derivative, or install these programs, apt and dpkg",
        )
    elif host.programs_missing:
        yield limited(
            "programs",
            f"missing: {', '.join(host.programs_missing)}",
            "`podferry lab up` installs them with apt-get",
            "install them before, if it should not",
        )
    else:
        yield fine("programs", "all there")
    if host.to_build and host.mirror_problem:
        yield blocked(
            "mirror",
            host.mirror_problem,
            "the lab's images are made of Debian packages",
            "set PODFERRY_DEBIAN_MIRROR to the address of a Debian mirror",
        )


def _settings(host: LabHost) -> Iterator[Finding]:
    name = "fs.pipe-max-size"
    if host.pipe_max_size >= PIPE_BYTES or SYS_RESOURCE in host.privileges.capabilities:
        yield fine(name, str(host.pipe_max_size))
    elif host.pipe_settable:
        yield fine(name, f"{host.pipe_max_size}; raised to {PIPE_BYTES} while a lab is up")
    else:
        yield limited(
            name,
            f"{host.pipe_max_size}, and it cannot be written here",
            "dumps that hand memory to pipes fail",
            f"sysctl -w fs.pipe-max-size={PIPE_BYTES} on the machine",
        )
    if host.tmp_noexec:
        yield fine("/tmp", "noexec; the lab runs nothing from there")


def _neighbours(host: LabHost) -> Iterator[Finding]:
    """The lab has its own network, containerd and files; what is said here is that nobody notices it."""
    if host.daemons:
        yield fine("container runtimes", f"{', '.join(host.daemons)}; the lab has its own and does not touch them")
    if host.clashes:
        yield fine(
            "addresses", f"{host.subnet}, also {', '.join(host.clashes)} here; the lab's network is not joined to it"
        )
    else:
        yield fine("addresses", f"{host.subnet}, inside the lab only")
    if not host.ipv6:
        yield fine("IPv6", "off; the lab does without")


CHECKS: tuple[Callable[[LabHost], Iterator[Finding]], ...] = (
    _privileges,
    _kernel,
    _trials,
    _cgroups,
    _memory,
    _disk,
    _building,
    _settings,
    _neighbours,
)
