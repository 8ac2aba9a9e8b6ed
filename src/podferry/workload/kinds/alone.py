"""Stand-alone containers: only containerd knows them, and podferry has containerd create them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from podferry.core.allowed_spec import DEFAULT_CAPABILITIES
from podferry.core.undo import Handler
from podferry.engine.journal import Journal, Part
from podferry.errors import Refused, UsageError
from podferry.node import apparmor
from podferry.node.cgroup import Cgroup
from podferry.node.containerd import Containerd
from podferry.node.containerd_errors import ContainerdNotFound
from podferry.node.jobfacts import resident
from podferry.node.newfile import check_new
from podferry.node.open_connections import open_connections
from podferry.node.records import Container, Stdio
from podferry.workload import frozen
from podferry.workload.config import Config
from podferry.workload.inspected import View, inspect, running_task, why_not
from podferry.workload.kinds.kind import DUMP_FLAGS, WorkloadKind
from podferry.workload.makers import containerd as made_by_containerd
from podferry.workload.makers.containerd import ContainerdContainer, ContainerdOwner
from podferry.workload.offered import OfferedContainer, log_file
from podferry.workload.pod.probes import Probe
from podferry.workload.source_container import Output, RunningContainer
from podferry.workload.target import Maker


class ContainersAlone(WorkloadKind[OfferedContainer]):
    """The containers of containerd's namespace that the configuration names."""

    offers = OfferedContainer

    def __init__(self, config: Config, containerd: Containerd) -> None:
        super().__init__(config, containerd)
        self._containerd = containerd

    # What is here.

    def containers(self) -> list[dict[str, Any]]:
        """All containers here, as `podferry ps` shows them. Raises `Refused` where they are CRI-O's."""
        self._refuse_crio()
        tasks = {task.id: task for task in self._containerd.tasks()}
        rows = []
        for record in self._containerd.containers():
            task = tasks.get(record.id)
            why = why_not(record, task)
            rows.append(
                {
                    "name": record.id,
                    "node": self._config.node,
                    "state": task.status.name.lower() if task else "no task",
                    "memory_bytes": self._memory(record) if task else 0,
                    "image": record.image,
                    "movable": why is None,
                    "why": str(why or ""),
                }
            )
        return rows

    def view(self, name: str) -> View:
        """Inspect one container. Raises `UsageError` where there is none, `Refused` where it cannot be looked at."""
        self._refuse_crio()
        try:
            record = self._containerd.container(name)
        except ContainerdNotFound as missing:
            raise UsageError(
                f"there is no container {name} on {self._config.node}", remedy="podferry ps lists them"
            ) from missing
        task = running_task(self._containerd, record)
        upper = self._containerd.upper(record)
        layers = self._containerd.lineage(record.snapshotter, record.snapshot_key)
        stdio = Stdio(task.stdin, task.stdout, task.stderr, task.terminal)
        output = Output(log_file(stdio))
        staying = self._containerd.staying(record.snapshotter, layers)
        offered = OfferedContainer(record, layers, stdio, DUMP_FLAGS, staying)
        member = inspect(self._containerd, name, RunningContainer(record, task, upper, output, flags=DUMP_FLAGS))
        connections = open_connections(task.pid, member.facts.pids)
        return View(name, (member,), offered, member.facts, self.node_facts(), self._choice, connections=connections)

    def _refuse_crio(self) -> None:
        if self._config.crio:
            raise Refused(
                f"{self._config.node} has CRI-O, whose containers move only as pods of Kubernetes",
                why="podferry has containerd make a container that moves alone, and CRI-O makes none but a kubelet's",
                remedy="see the pods with kubectl, and move one with kubectl podferry migrate",
            )

    def _memory(self, record: Container) -> int:
        cgroup = Cgroup.of_container(self._containerd.runc_root(record), record.id)
        return sum(resident(pid) for pid in cgroup.pids())

    # The source's half.

    def owner(self, journal: Journal, offered: OfferedContainer, probes: Sequence[Probe] = ()) -> ContainerdOwner:
        """Nobody but containerd knows of it; who ends it removes its log."""
        return ContainerdOwner(self._containerd, offered.log)

    def source_handlers(self) -> dict[str, Handler]:
        """The undo steps for resources that the source holds."""
        return frozen.handlers()

    # The target's half.

    def unallowed(self, offered: OfferedContainer) -> Iterator[Refused]:
        """What its record asks for and no node gives it."""
        capabilities = DEFAULT_CAPABILITIES | self._config.capabilities
        yield from offered.against(namespace=self._config.namespace, capabilities=capabilities)

    def missing(self, offered: OfferedContainer) -> Iterator[Refused]:
        """Check the log's path, the name, the AppArmor profile and the image's layers."""
        record, node = offered.record, self._config.node
        if offered.log is not None:
            try:
                check_new(self._config.logs, offered.log)
            except Refused as taken:
                yield taken
        if any(one.id == record.id for one in self._containerd.containers()):
            yield Refused(
                f"there is a container named {record.id} on {node} already", remedy="remove it, or rename one"
            )
        if (unconfined := apparmor.refusal(record.spec_json(), record.id, node)) is not None:
            yield unconfined
        if missing := self._containerd.find_layers(record.snapshotter, offered.layers):
            stays = f", which stays on the source's disk: {reason}" if (reason := offered.staying.get(missing)) else ""
            yield Refused(
                f"the image {record.image} is not on {node}",
                why=f"its snapshotter {record.snapshotter} does not find the layer {missing}{stays}",
                remedy=f"pull {record.image} there, for the snapshotter {record.snapshotter}",
            )

    def maker(self, journal: Journal) -> Maker:
        """A maker without work: there is nothing to create but the container."""
        return Maker()

    def container_maker(self, journal: Part, offered: OfferedContainer, number: int) -> ContainerdContainer:
        """containerd, by our call."""
        return ContainerdContainer(self._config, self._containerd, offered)

    def target_handlers(self) -> dict[str, Handler]:
        """The undo steps for resources that the target holds."""
        return made_by_containerd.target_handlers(self._config, self._containerd)
