"""A running workload as a migration needs to know it, before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from podferry.core.connections import ConnectionsLost, OpenConnection, preserving, refused
from podferry.core.facts import ContainerFacts, NodeFacts
from podferry.core.preflight import GUARDS, LIMITS, Question, refusals, unthrottled, warnings
from podferry.errors import Refused
from podferry.memory.kernel.guards import has_guards
from podferry.memory.tracking.tracker import Choice, TrackerKind
from podferry.model import Connections, Mode
from podferry.node.cgroup import Cgroup
from podferry.node.cri import Volume
from podferry.node.jobfacts import container_facts, may_read_limits
from podferry.node.records import Container, Task, TaskStatus
from podferry.node.runtime import ContainerNotFound, ContainerRuntime
from podferry.wire.messages import Offer
from podferry.workload.offered import Offered
from podferry.workload.pod.probes import Probe
from podferry.workload.source_container import RunningContainer

RUNTIME = "podferry-runc"


@dataclass(frozen=True)
class Member:
    """A running container of the workload; `name` is its own in a pod, its id where it is alone. `held` are the bytes of memory
    that it holds, what it has of files left out."""

    name: str
    running: RunningContainer
    facts: ContainerFacts
    why_unthrottled: str = ""
    held: int = 0

    @property
    def spec(self) -> dict[str, Any]:
        """Its OCI spec."""
        return self.running.record.spec_json()


@dataclass(frozen=True)
class View:
    """A workload. `facts` are those of all its containers together; `refused` are reasons against it that are of its kind alone.
    `volumes` are its file systems beside the containers' upper layers, and where they are; `probes` its liveness probes;
    `connections` those that it has open now."""

    name: str
    members: tuple[Member, ...]
    offered: Offered
    facts: ContainerFacts
    node: NodeFacts
    tracker: Choice
    volumes: tuple[tuple[Volume, Path], ...] = ()
    probes: tuple[Probe, ...] = ()
    refused: tuple[Refused, ...] = ()
    connections: tuple[OpenConnection, ...] = ()

    def offer(self, migration: str, mode: Mode) -> Offer:
        """What the target is asked."""
        facts = {"container": self.facts.to_dict(), "node": self.node.to_dict()}
        offered = self.offered.to_dict()
        return Offer(migration, self.name, mode, offered, facts, self.facts.anonymous, self.facts.upper)

    def question(self, mode: Mode, target: NodeFacts | None = None) -> Question:
        """What preflight is asked."""
        return Question(self.facts, self.node, target, mode)

    def refusals(self, mode: Mode) -> list[Refused]:
        """Every reason of this node's for which it cannot move."""
        return [*self.refused, *refusals(self.question(mode))]

    def warnings(self, mode: Mode, target: NodeFacts | None = None) -> list[str]:
        """Warnings: properties of the move that do not prevent it."""
        found = warnings(self.question(mode, target))
        if mode is Mode.LIVE and (whys := [one.why_unthrottled for one in self.members if one.why_unthrottled]):
            found.append(unthrottled(whys[0]))
        return found

    def asked_for(self, asked: Connections) -> View:
        """The same, where the move is `asked` for to do so with the connections: what becomes of them may be another thing."""
        if asked is not Connections.PRESERVE:
            return self
        facts = replace(self.facts, connections=())  # of which preflight would say that they are closed
        return replace(self, facts=facts, connections=preserving(self.connections))

    def lost(self, asked: Connections) -> ConnectionsLost | None:
        """Why it may not move where it was `asked` for that no connection is lost."""
        return refused(self.name, self.connections, asked)

    def demand_movable(self, mode: Mode, connections: Connections = Connections.CLOSE) -> Choice:
        """How it will be tracked in `mode`. Raises the first reason of this node's for which it cannot move."""
        for refusal in self.refusals(mode):
            raise refusal
        if (lost := self.lost(connections)) is not None:
            raise lost
        return self.tracker if mode is Mode.LIVE else Choice(TrackerKind.NONE, f"mode {mode} tracks nothing")


def task_of(runtime: ContainerRuntime, record: Container) -> Task | None:
    """A container's task; None where it has none."""
    try:
        return runtime.task(record.id)
    except ContainerNotFound:
        return None


def running_task(runtime: ContainerRuntime, record: Container) -> Task:
    """The task of a container that can be moved by its records. Raises `Refused` with what they say against it."""
    task = task_of(runtime, record)
    if (why := why_not(record, task)) is not None or task is None:
        raise why or Refused(f"{record.id} has no task")
    return task


def inspect(runtime: ContainerRuntime, name: str, running: RunningContainer) -> Member:
    """What the kernel says of a container that runs."""
    record = running.record
    cgroup = Cgroup.of_container(runtime.runc_root(record), record.id)
    facts = container_facts(record, running.task, cgroup, running.upper)
    if (held := cgroup.memory_held()) is None:
        held = facts.anonymous + max(facts.shared, facts.tmpfs)
    return Member(name, running, with_unsaved(facts), cgroup.why_no_quota(), held)


def with_unsaved(facts: ContainerFacts) -> ContainerFacts:
    """These facts, with what else of the processes CRIU cannot save: guard pages, limits that it may not read."""
    found = {GUARDS: any(has_guards(pid) for pid in facts.pids), LIMITS: not all(map(may_read_limits, facts.pids))}
    return replace(facts, unsaved=(*facts.unsaved, *(name for name, so in found.items() if so)))


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


def merged(name: str, facts: Sequence[ContainerFacts], volumes: int, open: tuple[str, ...] = ()) -> ContainerFacts:
    """Containers as one, for what is asked of a job as a whole. What is mounted is judged apart; `open` are their connections.

    `volumes` are the bytes in the file systems that move with the pod.
    """

    def all_of(field: str) -> tuple[Any, ...]:
        return tuple(sorted({one for each in facts for one in getattr(each, field)}))

    return ContainerFacts(
        id=name,
        image=facts[0].image,
        binary=facts[0].binary,
        pids=all_of("pids"),
        host_namespaces=all_of("host_namespaces"),
        devices=all_of("devices"),
        unsaved=all_of("unsaved"),
        binds=(),
        connections=open,
        stdio=facts[0].stdio,
        memory=sum(one.memory or 0 for one in facts),
        anonymous=sum(one.anonymous for one in facts),
        shared=sum(one.shared for one in facts),
        tmpfs=sum(one.tmpfs for one in facts),
        upper=sum(one.upper for one in facts) + volumes,
    )
