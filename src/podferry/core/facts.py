"""Facts of nodes and containers from which preflight decides whether a container may move: values that travel between agents.

`podferry.node` gathers them, `preflight` judges by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from podferry.core.strict import NotStrict, from_json, to_json
from podferry.errors import PeerMisbehaved


class CgroupKind(StrEnum):
    """Which cgroup trees a node has."""

    V1 = "v1"
    V2 = "v2"
    HYBRID = "hybrid"


class RuntimeKind(StrEnum):
    """The container runtime of a node."""

    CONTAINERD = "containerd"
    CRIO = "CRI-O"


@dataclass(frozen=True)
class NodeFacts:
    """A node. Versions are empty where the program is missing; sizes are in bytes. `runtime` is the container runtime.

    `cpu_flags` are the processor's features as /proc/cpuinfo names them; `run_free` is what fits into the directory that
    holds memory on its way; `clock` is the node's wall clock, in seconds since 1970; `lazy_pages` says whether restored
    tasks can be fed by userfaultfd; `pagemap_scan`, `wp_async` and `soft_dirty` are what memory trackers need;
    `memory_skipping_dump` says whether CRIU's dump can leave private memory where it is; `selinux` whether SELinux
    enforces its policy.
    """

    kernel: str
    machine: str
    page_size: int
    boot: str
    cpus: int
    cpu_model: str
    cpu_flags: tuple[str, ...]
    criu: str
    runc: str
    runtime: RuntimeKind
    runtime_version: str
    cgroup: CgroupKind
    memory_available: int
    disk_free: int
    run_free: int
    lazy_pages: bool
    pagemap_scan: bool
    wp_async: bool
    soft_dirty: bool
    memory_skipping_dump: bool
    pipe_max_size: int
    clock: float
    selinux: bool

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON; `from_dict` is the inverse."""
        facts: dict[str, Any] = to_json(self)
        return facts

    @staticmethod
    def from_dict(data: Any) -> NodeFacts:
        """Facts that a peer sent. Raises `PeerMisbehaved` for anything else."""
        try:
            return from_json(NodeFacts, data)
        except NotStrict as error:
            raise PeerMisbehaved.because("the peer's description of its node is invalid", error) from error


@dataclass(frozen=True)
class Bind:
    """A directory or file of the node that is mounted into the container."""

    source: str
    destination: str


@dataclass(frozen=True)
class ContainerFacts:
    """A running container. Sizes are in bytes.

    `host_namespaces` are those it shares with the node's first process. `devices` are device files that it has open or
    may open, beyond those that every container has. `unsaved` names kernel objects that it has open and CRIU cannot
    save: `io_uring`, `userfaultfd`, `perf_event`, .... `connections` are its TCP connections to others than
    itself. `stdio` says what descriptors 0, 1 and 2 of its first process are: `pipe`, `null`, `terminal`,
    `socket`, `closed` or `file PATH`. `memory` is all that its cgroup uses, `anonymous` what a migration sends as pages,
    `shared` and `tmpfs` what CRIU writes into its images while the container stands still.
    """

    id: str
    image: str
    binary: str
    pids: tuple[int, ...]
    host_namespaces: tuple[str, ...]
    devices: tuple[str, ...]
    unsaved: tuple[str, ...]
    binds: tuple[Bind, ...]
    connections: tuple[str, ...]
    stdio: tuple[str, ...]
    memory: int | None
    anonymous: int
    shared: int
    tmpfs: int
    upper: int

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON; `from_dict` is the inverse."""
        facts: dict[str, Any] = to_json(self)
        return facts

    @staticmethod
    def from_dict(data: Any) -> ContainerFacts:
        """Facts that a peer sent. Raises `PeerMisbehaved` for anything else."""
        try:
            return from_json(ContainerFacts, data)
        except NotStrict as error:
            raise PeerMisbehaved.because("the peer's description of the container is invalid", error) from error
