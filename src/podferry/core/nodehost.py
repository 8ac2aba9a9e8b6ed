"""Does this machine have what a node's agent needs? Facts in, findings out; `podferry.agent.doctor_facts` gathers the facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from podferry.core.facts import NodeFacts, RuntimeKind
from podferry.core.findings import Finding, blocked, fine, limited, mebibytes
from podferry.core.host import (
    NO_UDP_LITE_REMEDY,
    NO_UDP_LITE_WHY,
    Kernel,
    Privileges,
    needs_later_criu,
    of_kernel,
    of_privileges,
)
from podferry.core.preflight import DISK_RESERVE, MEMORY_RESERVE, OLDEST_CRIU, OLDEST_RUNC, PIPE_BYTES, numbers

OLDEST_RUNTIME = {RuntimeKind.CONTAINERD: (1, 7), RuntimeKind.CRIO: (1, 34)}
"""CRI-O: the oldest that was tried."""
OLDEST_PYTHON = (3, 11)
SMALL_RUN = 0.5
"""The share of memory below which `run` is worth a word: what arrives is held there."""


@dataclass(frozen=True)
class Place:
    """A directory's file system: its kind, the bytes that are free on it, the bytes that it can hold."""

    path: str
    kind: str
    free: int
    size: int


@dataclass(frozen=True)
class NodeHost:
    """A machine, as far as the agent on it cares. `facts` are those that agents tell each other; `socket` is where
    its container runtime answers, empty where it does not; `others` are other container runtimes that answer; `kubelet` is the
    kubelet's directory, empty where there is none: a node of a cluster gets the wrapper and, where it must, a CRIU from its
    agent's pod; `cpu_controller`
    whether containers can be slowed down."""

    privileges: Privileges
    kernel: Kernel
    facts: NodeFacts
    memory_total: int
    run: Place
    state: Place
    socket: str
    others: tuple[str, ...]
    kubelet: str
    wrapper: bool
    cpu_controller: bool
    python: tuple[int, ...]


def findings(host: NodeHost) -> list[Finding]:
    """Everything that matters, the most basic first."""
    return [finding for check in CHECKS for finding in check(host)]


def _basics(host: NodeHost) -> Iterator[Finding]:
    yield from of_privileges(host.privileges)
    yield from of_kernel(host.kernel)
    wanted = ".".join(map(str, OLDEST_PYTHON))
    found = ".".join(map(str, host.python))
    if host.python < OLDEST_PYTHON:
        yield blocked(
            "Python", found, f"podferry needs {wanted} or later", "install a later Python, or use the container image"
        )
    else:
        yield fine("Python", found)


def _programs(host: NodeHost) -> Iterator[Finding]:
    for name, version, oldest in (
        ("CRIU", host.facts.criu, OLDEST_CRIU),
        ("runc", host.facts.runc, OLDEST_RUNC),
        (host.facts.runtime.value, host.facts.runtime_version, OLDEST_RUNTIME[host.facts.runtime]),
    ):
        wanted = ".".join(map(str, oldest))
        if name == host.facts.runtime and not host.socket:
            continue  # _runtime says so
        late = name == "CRIU" and needs_later_criu(host.kernel.release, numbers(version))
        if late:
            yield blocked(
                name, f"{version or 'missing'}, on Linux {host.kernel.release}", NO_UDP_LITE_WHY, NO_UDP_LITE_REMEDY
            )
        elif version and numbers(version) >= oldest:
            yield fine(name, version)
        elif name == "CRIU" and host.kubelet:
            yield limited(name, version or "missing", "podferry's agent brings one of its own to a node of a cluster")
        elif version:
            yield blocked(name, version, f"{wanted} is the oldest that works", f"install a later {name}")
        elif name == host.facts.runtime:
            yield limited(
                name, "of an unknown version", f"{wanted} is the oldest that works", f"see `{name.lower()} --version`"
            )
        else:
            yield blocked(
                name, "missing", "containers are saved and restored by it", f"install {name} {wanted} or later"
            )


def _runtime(host: NodeHost) -> Iterator[Finding]:
    others = ", ".join(host.others)
    if not host.socket:
        yield blocked(
            "containerd",
            f"does not answer at its usual place{f'; {others} does' if others else ''}",
            "podferry moves containers of containerd, and pods whose containers a kubelet has CRI-O make",
            "install and start containerd; k3s takes --container-runtime-endpoint unix:///run/containerd/containerd.sock",
        )
    elif others:
        yield limited(
            "other container runtimes",
            others,
            "their containers cannot be moved, and are left alone",
            f"have jobs made by {host.facts.runtime}",
        )
    if host.facts.runtime is RuntimeKind.CRIO and host.socket:
        yield limited(
            "pods of CRI-O",
            "move to nodes with CRI-O alone",
            "layers are not shared through a remote file system, a container that is no pod's cannot move",
            "have the images of jobs on all nodes that they may move to, or use containerd",
        )
    if host.kubelet:
        yield fine("Kubernetes", f"a kubelet's directory is there: {host.kubelet}")
    elif not host.wrapper:
        yield limited(
            "podferry-runc",
            "not installed",
            "containers that runc itself starts cannot move",
            "see docs/agent.md, `Containers that can move`",
        )


def _cgroups(host: NodeHost) -> Iterator[Finding]:
    if host.cpu_controller:
        yield fine("cgroups", host.facts.cgroup)
    else:
        yield limited(
            "cgroups",
            f"{host.facts.cgroup}, without cpu",
            "a job that writes too fast for its link is not slowed down",
            "have systemd pass the cpu controller on (CPUAccounting=yes in containerd's unit does)",
        )


def _pipes(host: NodeHost) -> Iterator[Finding]:
    size = host.facts.pipe_max_size
    if size < PIPE_BYTES:
        yield blocked(
            "fs.pipe-max-size",
            str(size),
            f"CRIU's lazy dump needs {PIPE_BYTES}",
            f"sysctl -w fs.pipe-max-size={PIPE_BYTES}, and a file in /etc/sysctl.d for the next boot",
        )
    else:
        yield fine("fs.pipe-max-size", str(size))


def _room(host: NodeHost) -> Iterator[Finding]:
    memory, run, state = host.facts.memory_available, host.run, host.state
    if memory < MEMORY_RESERVE:
        yield blocked("memory", f"{mebibytes(memory)} available", "nothing can arrive here", "free memory")
    else:
        yield fine("memory", f"{mebibytes(memory)} available")
    remount = f"mount a tmpfs of its own at {run.path} (docs/agent.md), or remount with size=80%"
    found = f"{mebibytes(run.free)} free at {run.path} ({run.kind})"
    if run.kind not in ("tmpfs", "ramfs"):
        yield limited("run", found, "memory on its way is written to a disk, and a reboot leaves it there", remount)
    elif run.kind == "tmpfs" and run.size < SMALL_RUN * host.memory_total:
        yield limited("run", found, "larger jobs than that cannot arrive here: their memory waits there", remount)
    else:
        yield fine("run", found)
    found = f"{mebibytes(state.free)} free at {state.path} ({state.kind})"
    if state.kind in ("tmpfs", "ramfs"):
        yield blocked("state", found, "journals must survive a reboot", f"put {state.path} on a disk")
    elif state.free < DISK_RESERVE:
        yield blocked(
            "state", found, f"less than {mebibytes(DISK_RESERVE)}: nothing can arrive here", "free disk space"
        )
    else:
        yield fine("state", found)


CHECKS: tuple[Callable[[NodeHost], Iterator[Finding]], ...] = (_basics, _programs, _runtime, _cgroups, _pipes, _room)
