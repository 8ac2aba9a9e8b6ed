"""The facts by which `podferry doctor` judges whether this machine can run the lab. What it can, it tries, and takes away."""

from __future__ import annotations

import ipaddress
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from podferry.agent.doctor_facts import OTHER_RUNTIMES, kernel
from podferry.core.findings import Finding, Verdict
from podferry.core.findings import require as require_none_against
from podferry.core.labhost import TRIALS, Cgroups, Disk, LabHost, findings
from podferry.errors import PodferryError
from podferry.lab import cgroups, network, root_images, state
from podferry.lab.debian import OF_NODES, mirror
from podferry.lab.kernel import PIPE_MAX_SIZE
from podferry.lab.kubernetes.portable_criu import of_nodes
from podferry.lab.machine import NAMESPACES
from podferry.lab.progress import Progress
from podferry.node import host
from podferry.node.process import CLEAN_ENVIRONMENT, run
from podferry.workload.nodefacts import memory_available

_PATH = CLEAN_ENVIRONMENT["PATH"]
TRIAL = Path(__file__).with_name("trial.sh")
TRIAL_SECONDS = 60.0
RUNTIMES = (("containerd", Path("/run/containerd/containerd.sock")), *OTHER_RUNTIMES)
_NO_LIMIT = 1 << 60


def examine(lab: str, *, debian: str = OF_NODES, kubernetes: bool = False) -> list[Finding]:
    """What speaks for and against a lab of this name here, with nodes made of `debian`."""
    return findings(lab_host(lab, debian=debian, kubernetes=kubernetes))


def require(lab: str, progress: Progress, *, debian: str, kubernetes: bool) -> None:
    """Raises `MachineUnfit` with every reason where this machine cannot run the lab; says what works in part only."""
    found = examine(lab, debian=debian, kubernetes=kubernetes)
    require_none_against("the lab cannot run on this machine", found)
    if limits := [one.check for one in found if one.verdict is Verdict.LIMITED]:
        progress(f"this machine will do, with limits (`podferry doctor` says which): {', '.join(limits)}")


def lab_host(lab: str, *, debian: str = OF_NODES, kubernetes: bool = False) -> LabHost:
    """The facts. Without root some are left out, see `core.host`."""
    missing = tuple(
        sorted({package for program, package in _programs().items() if not shutil.which(program, path=_PATH)})
    )
    to_build = root_images.unbuilt(debian)
    if to_build and not shutil.which("debootstrap", path=_PATH):
        missing = (*missing, "debootstrap")
    disk = host.mount_of(state.STATE)
    privileges = host.privileges()
    network_of_lab = f"{state.subnet(lab)}.0/24"
    return LabHost(
        privileges=privileges,
        kernel=kernel(),
        trials=_trials() if privileges.root else {},
        cgroups=_cgroups(),
        memory=min(memory_available(), _memory_left()),
        disk=Disk(str(state.STATE), disk.kind, host.room(state.STATE)[0], host.free_inodes(state.STATE), disk.options),
        to_build=sum(one.size for one in to_build),
        programs_missing=missing,
        apt=bool(shutil.which("apt-get", path=_PATH)),
        mirror_problem=_mirror_problem(),
        pipe_max_size=int(PIPE_MAX_SIZE.read_text()),
        pipe_settable=os.access(PIPE_MAX_SIZE, os.W_OK),
        tmp_noexec="noexec" in host.mount_of(Path(tempfile.gettempdir())).options,
        daemons=host.answering(RUNTIMES),
        subnet=network_of_lab,
        clashes=tuple(routes_into(network_of_lab, Path("/proc/net/route").read_text())),
        ipv6=Path("/proc/net/if_inet6").exists(),
        criu=of_nodes(debian, kubernetes=kubernetes),
        kubernetes=kubernetes,
    )


def _programs() -> dict[str, str]:
    return {
        **network.PROGRAMS,
        "unshare": "util-linux",
        "nsenter": "util-linux",
        "setpriv": "util-linux",
        "dpkg": "dpkg",
    }


def _mirror_problem() -> str:
    try:
        mirror()
    except PodferryError as unknown:
        return str(unknown)
    return ""


def _trials() -> dict[str, str]:
    """What of `TRIALS` works, in namespaces and a directory that are gone afterwards: empty text, or why it does not."""
    place = host.existing(state.STATE)
    try:
        with tempfile.TemporaryDirectory(prefix=".podferry-doctor-", dir=place) as tried:
            done = run(
                ["unshare", *NAMESPACES, "--fork", "--kill-child", "sh", TRIAL, tried],
                check=False,
                timeout=TRIAL_SECONDS,
            )
    except (OSError, PodferryError) as failure:
        return {"namespaces": str(failure)}
    said = dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
    if "namespaces" not in said:
        return {"namespaces": (done.stderr.strip() or "unshare failed").splitlines()[-1]}
    return {name: said[name] for name in TRIALS if name in said}


def _cgroups() -> Cgroups:
    mounted = cgroups.hierarchies()
    versions = {one.version for one in mounted if one.version == 2 or not one.controllers.startswith("name=")}
    kind = {frozenset({1}): "v1", frozenset({2}): "v2", frozenset({1, 2}): "hybrid"}.get(frozenset(versions), "")
    own = [one for one in mounted if one.version == (1 if 1 in versions else 2)]
    controllers = {
        name for one in mounted if one.version == 1 for name in one.controllers.split(",") if "=" not in name
    }
    for one in own:
        if one.version == 2:
            controllers |= set(host.setting(str(one.home / "cgroup.controllers")).split())
    return Cgroups(kind, all(os.access(one.home, os.W_OK) for one in own), frozenset(controllers))


def _memory_left() -> int:
    """Bytes until a memory limit of the cgroups that we are in."""
    least = _NO_LIMIT
    for one in cgroups.hierarchies():
        if one.version == 2 or "memory" in one.controllers.split(","):
            names = (
                ("memory.max", "memory.current")
                if one.version == 2
                else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            )
            for directory in (one.own, *one.own.parents):
                if not directory.is_relative_to(one.mount):
                    break
                limit, used = (host.setting(str(directory / name)) for name in names)
                if limit.isdecimal() and used.isdecimal() and int(limit) < _NO_LIMIT:
                    cache = _inactive_file(host.setting(str(directory / "memory.stat")))
                    least = min(least, max(0, int(limit) - int(used) + cache))
    return least


def _inactive_file(stat: str) -> int:
    """Bytes of files that the kernel would give up before it runs out of memory; a v1 group's own and below."""
    fields = dict(line.split(" ", 1) for line in stat.splitlines() if " " in line)
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))


def routes_into(subnet: str, table: str) -> Iterator[str]:
    """The routes of this machine, as /proc/net/route has them, that lead into a network, but for the default one."""
    for line in table.splitlines()[1:]:
        interface, destination, _, _, _, _, _, mask = line.split()[:8]
        length = int(mask, 16).bit_count()
        if length:
            route = ipaddress.IPv4Network((_address(destination), length))
            if route.overlaps(ipaddress.IPv4Network(subnet)):
                yield f"{route} at {interface}"


def _address(text: str) -> int:
    """The kernel prints the word as it lies in memory."""
    return int.from_bytes(struct.pack("=I", int(text, 16)), "big")
