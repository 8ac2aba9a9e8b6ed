"""Looking at containers and nodes before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from podferry.core.allowed_spec import DEFAULT_CAPABILITIES
from podferry.core.facts import ContainerFacts, NodeFacts
from podferry.core.preflight import GUARDS, LIMITS, Question, refusals, unthrottled, warnings
from podferry.engine.journal import Journal, Part
from podferry.errors import Refused, UsageError
from podferry.memory.kernel.guards import has_guards
from podferry.memory.tracking.tracker import Choice, TrackerKind, choose, probe
from podferry.model import Mode
from podferry.node import apparmor
from podferry.node.cgroup import Cgroup
from podferry.node.containerd import Containerd, ContainerdNotFound
from podferry.node.jobfacts import container_facts, may_read_limits
from podferry.node.newfile import check_new
from podferry.node.records import Container, Stdio, Task, TaskStatus, upper_dir
from podferry.wire.messages import Offer
from podferry.workload.config import Config
from podferry.workload.makers.containerd import ContainerdOwner
from podferry.workload.nodefacts import node_facts
from podferry.workload.offered import Offered, log_file
from podferry.workload.source import SourceWorkload
from podferry.workload.source_container import Output, RunningContainer, SourceContainer

RUNTIME = "podferry-runc"
DUMP_FLAGS = ("--file-locks", "--tcp-established")


def with_unsaved(facts: ContainerFacts) -> ContainerFacts:
    """These facts, with what else of the processes CRIU cannot save: guard pages, limits that it may not read."""
    found = {GUARDS: any(has_guards(pid) for pid in facts.pids), LIMITS: not all(map(may_read_limits, facts.pids))}
    return replace(facts, unsaved=(*facts.unsaved, *(name for name, so in found.items() if so)))


@dataclass(frozen=True)
class View:
    """A container as a migration needs to know it."""

    offered: Offered
    task: Task
    upper: Path
    container: ContainerFacts
    node: NodeFacts
    tracker: Choice
    why_unthrottled: str = ""

    def offer(self, migration: str, mode: Mode) -> Offer:
        """What the target is asked."""
        return Offer(
            migration,
            self.offered.record.id,
            mode,
            self.offered.to_dict(),
            {"container": self.container.to_dict(), "node": self.node.to_dict()},
            self.container.anonymous,
            self.container.upper,
        )

    def source(self, config: Config, containerd: Containerd, journal: Journal, kind: TrackerKind) -> SourceWorkload:
        """The container, ready to be moved."""
        offered = self.offered
        running = RunningContainer(offered.record, self.task, self.upper, Output(offered.log), flags=offered.flags)
        container = SourceContainer(config, containerd, Part(journal, 0), running, kind)
        return SourceWorkload([container], ContainerdOwner(containerd, offered.log))

    def question(self, mode: Mode, target: NodeFacts | None = None) -> Question:
        """What preflight is asked."""
        return Question(self.container, self.node, target, mode)

    def warnings(self, mode: Mode, target: NodeFacts | None) -> list[str]:
        """What is worth knowing although it does not stand in the way."""
        found = warnings(self.question(mode, target))
        if self.why_unthrottled and mode is Mode.LIVE:
            found.append(unthrottled(self.why_unthrottled))
        return found

    def demand_movable(self, mode: Mode) -> Choice:
        """How it will be tracked in `mode`. Raises the first reason of this node's for which it cannot move."""
        for refusal in refusals(self.question(mode)):
            raise refusal
        return self.tracker if mode is Mode.LIVE else Choice(TrackerKind.NONE, f"mode {mode} tracks nothing")


class Inspection:
    """The eyes of an agent."""

    def __init__(self, config: Config, containerd: Containerd) -> None:
        self._config, self._containerd = config, containerd
        self._choice = choose(probe())

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

    def container(self, name: str) -> View:
        """Inspect one container. Raises `UsageError` where there is none, `Refused` where it cannot be looked at."""
        self._refuse_crio()
        try:
            record = self._containerd.container(name)
        except ContainerdNotFound as missing:
            raise UsageError(
                f"there is no container {name} on {self._config.node}", remedy="podferry ps lists them"
            ) from missing
        try:
            task = self._containerd.task(name)
        except ContainerdNotFound:
            task = None
        if (why := why_not(record, task)) is not None or task is None:
            raise why or Refused(f"{name} has no task")
        mounts = self._containerd.mounts(record.snapshotter, record.snapshot_key)
        upper = upper_dir(mounts)
        layers = self._containerd.lineage(record.snapshotter, record.snapshot_key)
        stdio = Stdio(task.stdin, task.stdout, task.stderr, task.terminal)
        log_file(stdio)
        cgroup = Cgroup.of_container(self._containerd.runc_root(record), record.id)
        return View(
            Offered(record, layers, stdio, DUMP_FLAGS, self._containerd.staying(record.snapshotter, layers)),
            task,
            upper,
            with_unsaved(container_facts(record, task, cgroup, upper)),
            self.node_facts(),
            self._choice,
            cgroup.why_no_quota(),
        )

    def node_facts(self) -> NodeFacts:
        """What this node is and has."""
        return node_facts(self._config.state, self._config.run, self._containerd.kind, self._containerd.version())

    def weigh(self, offer: Offer, offered: Offered) -> tuple[NodeFacts, list[Refused]]:
        """Can this node take what is offered? Its facts, and every reason why not. Raises `PeerMisbehaved`."""
        record, here = offered.record, self.node_facts()
        container = ContainerFacts.from_dict(offer.facts.get("container"))
        source = NodeFacts.from_dict(offer.facts.get("node"))
        found = offered.against(
            namespace=self._config.namespace, capabilities=DEFAULT_CAPABILITIES | self._config.capabilities
        )
        found += refusals(Question(container, source, here, Mode(offer.mode)))
        if offered.log is not None:
            try:
                check_new(self._config.logs, offered.log)
            except Refused as taken:
                found.append(taken)
        if any(one.id == record.id for one in self._containerd.containers()):
            found.append(
                Refused(
                    f"there is a container named {record.id} on {self._config.node} already",
                    remedy="remove it, or rename one",
                )
            )
        if (unconfined := apparmor.refusal(record.spec_json(), record.id, self._config.node)) is not None:
            found.append(unconfined)
        if missing := self._containerd.find_layers(record.snapshotter, offered.layers):
            stays = f", which stays on the source's disk: {reason}" if (reason := offered.staying.get(missing)) else ""
            found.append(
                Refused(
                    f"the image {record.image} is not on {self._config.node}",
                    why=f"its snapshotter {record.snapshotter} does not find the layer {missing}{stays}",
                    remedy=f"pull {record.image} there, for the snapshotter {record.snapshotter}",
                )
            )
        return here, found

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


def why_not(record: Container, task: Task | None) -> Refused | None:
    """What can be said against moving a container from its records alone."""
    binary = record.runc_options().binary_name
    if Path(binary).name != RUNTIME:
        return Refused(
            f"{record.id} was not started through {RUNTIME}",
            why=f"its OCI runtime is {binary or 'runc'}",
            remedy=f"start it with the runtime {RUNTIME} (ctr run --runc-binary, or runtimeClassName: podferry)",
        )
    if task is None:
        return Refused(f"{record.id} does not run", why="it has no task", remedy="start it first")
    if task.status is not TaskStatus.RUNNING:
        return Refused(
            f"{record.id} does not run", why=f"its task is {task.status.name.lower()}", remedy="start it first"
        )
    return None


def resident(pid: int) -> int:
    """Bytes of private anonymous memory that a process has, in memory or swapped out."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    sizes = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return sum(int(sizes[name].split()[0]) << 10 for name in ("RssAnon", "VmSwap") if name in sizes)
