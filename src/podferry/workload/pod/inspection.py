"""Looking at pods before anything is touched. The kubelet is not asked: its runtime's records and the kernel tell all there is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from podferry.core.facts import ContainerFacts, NodeFacts
from podferry.core.limits import TERMINATION_MESSAGE
from podferry.core.preflight import ContainerBound, Question, refusals, unthrottled, warnings
from podferry.engine.journal import Journal, Part
from podferry.errors import Refused, UsageError
from podferry.memory.tracking.tracker import Choice, TrackerKind, choose, probe
from podferry.model import Mode
from podferry.node import cri, payloads
from podferry.node.cgroup import Cgroup
from podferry.node.cri import Volume
from podferry.node.jobfacts import container_facts, deleted_but_open, disk_usage
from podferry.node.records import PodContainer, Task
from podferry.node.runtime import ContainerNotFound, ContainerRuntime
from podferry.node.sockets import to_others
from podferry.wire.messages import Offer
from podferry.workload.config import Config
from podferry.workload.inspection import DUMP_FLAGS, why_not, with_unsaved
from podferry.workload.makers.kubelet import HandOver, KubeletOwner
from podferry.workload.nodefacts import node_facts
from podferry.workload.pod.offered import LAST_WORDS, OfferedPod, PodPart
from podferry.workload.pod.ports import PodName
from podferry.workload.pod.probes import Probe
from podferry.workload.source import SourceWorkload
from podferry.workload.source_container import Output, RunningContainer, SourceContainer
from podferry.workload.source_tree import SourceTree


@dataclass(frozen=True)
class Member:
    """A container of a pod that runs. `upper` is its upper directory."""

    container: PodContainer
    task: Task
    upper: Path
    facts: ContainerFacts
    why_unthrottled: str = ""

    @property
    def spec(self) -> dict[str, Any]:
        """Its OCI spec."""
        return self.container.record.spec_json()


@dataclass(frozen=True)
class PodView:
    """A pod as a migration needs to know it. `refused` are the reasons against it that are of pods alone."""

    pod: PodName
    members: tuple[Member, ...]
    volumes: tuple[tuple[Volume, Path], ...]
    facts: ContainerFacts
    node: NodeFacts
    tracker: Choice
    refused: tuple[Refused, ...]

    @property
    def offered(self) -> OfferedPod:
        """What travels."""
        parts = (PodPart(one.container.name, one.container.record.id, DUMP_FLAGS) for one in self.members)
        return OfferedPod(self.pod, tuple(parts), tuple(volume for volume, _ in self.volumes))

    def offer(self, migration: str, mode: Mode) -> Offer:
        """What the target is asked."""
        facts = {"container": self.facts.to_dict(), "node": self.node.to_dict()}
        offered = self.offered.to_dict()
        return Offer(migration, str(self.pod), mode, offered, facts, self.facts.anonymous, self.facts.upper)

    def refusals(self, mode: Mode) -> list[Refused]:
        """Every reason of this node's for which it cannot move."""
        return [*self.refused, *refusals(Question(self.facts, self.node, None, mode))]

    def warnings(self, mode: Mode) -> list[str]:
        """What is worth knowing although it does not stand in the way."""
        found = warnings(Question(self.facts, self.node, None, mode))
        if mode is Mode.LIVE and (whys := [one.why_unthrottled for one in self.members if one.why_unthrottled]):
            found.append(unthrottled(whys[0]))
        return found

    def demand_movable(self, mode: Mode) -> Choice:
        """How it will be tracked in `mode`. Raises the first reason for which it cannot move."""
        for refusal in self.refusals(mode):
            raise refusal
        return self.tracker if mode is Mode.LIVE else Choice(TrackerKind.NONE, f"mode {mode} tracks nothing")

    def source(
        self,
        config: Config,
        runtime: ContainerRuntime,
        journal: Journal,
        kind: TrackerKind,
        hand_over: HandOver,
        probes: Sequence[Probe] = (),
    ) -> SourceWorkload:
        """The pod, ready to be moved."""
        containers = [
            SourceContainer(config, runtime, Part(journal, number), self._running(member, config.kubelet), kind)
            for number, member in enumerate(self.members)
        ]

        def suspects(path: Path) -> set[bytes]:
            return {
                file
                for member, one in zip(self.members, containers, strict=True)
                for at in cri.mounted_at(member.spec, path)
                for file in one.mapped_shared(at)
            }

        def payloads_open_in(images: Iterable[bytes]) -> bytes:
            return payloads.pack(payloads.open_in(images, self.pod.uid, config.kubelet))

        owner = KubeletOwner(
            journal, hand_over, departed=config.departed / self.pod.uid, payloads=payloads_open_in, probes=probes
        )
        return SourceWorkload(
            containers, owner, [SourceTree(path, partial(suspects, path)) for _, path in self.volumes]
        )

    def _running(self, member: Member, kubelet: Path) -> RunningContainer:
        last_words = cri.termination_message(member.spec, self.pod.uid, member.container.name, kubelet)
        return RunningContainer(
            member.container.record,
            member.task,
            member.upper,
            Output(member.container.log, fifos(member.task)),
            flags=DUMP_FLAGS,
            enclosed={LAST_WORDS: last_words} if last_words else {},
            guarded=True,
        )


class PodInspection:
    """The eyes of an agent for pods."""

    def __init__(self, config: Config, runtime: ContainerRuntime) -> None:
        self._config, self._runtime = config, runtime
        self._choice = choose(probe())

    def node_facts(self) -> NodeFacts:
        """What this node is and has."""
        return node_facts(self._config.state, self._config.run, self._runtime.kind, self._runtime.version())

    def pod(self, pod: PodName, names: Sequence[str]) -> PodView:
        """Inspect the containers `names` of a pod. Raises `UsageError` where it is not here, `Refused` where one does not run."""
        there = self._runtime.pod(pod.uid)
        if not there:
            raise UsageError(f"there is no pod {pod} on {self._config.node}", why=f"no container has its uid {pod.uid}")
        members = tuple(self._member(pod, name, there) for name in names)
        specs = [member.spec for member in members]
        volumes = cri.volumes(specs, pod.uid, self._config.kubelet)
        size = sum(disk_usage(path) for _, path in volumes)
        return PodView(
            pod,
            members,
            volumes,
            merged(str(pod), [member.facts for member in members], size, connections(members)),
            self.node_facts(),
            self._choice,
            tuple(self._refused(pod, members)),
        )

    def _member(self, pod: PodName, name: str, there: Mapping[str, PodContainer]) -> Member:
        if name not in there:
            raise Refused(f"the container {name} of {pod} does not run", remedy="wait until the pod is running")
        container = there[name]
        record = container.record
        try:
            task = self._runtime.task(record.id)
        except ContainerNotFound:
            task = None
        if (why := why_not(record, task)) is not None or task is None:
            raise Refused.because(
                f"the container {name} of {pod} cannot move",
                why or ContainerNotFound("no task"),
                remedy=why.remedy if why else "",
            )
        upper = self._runtime.upper(record)
        cgroup = Cgroup.of_container(self._runtime.runc_root(record), record.id)
        facts = with_unsaved(container_facts(record, task, cgroup, upper))
        return Member(container, task, upper, facts, cgroup.why_no_quota())

    def _refused(self, pod: PodName, members: Sequence[Member]) -> Iterator[Refused]:
        kubelet = self._config.kubelet
        for member in members:
            name = member.container.name
            if shared := cri.shared_namespaces(member.spec):
                yield ContainerBound(
                    f"the container {name} shares namespaces with others",
                    why=", ".join(shared),
                    remedy="run the pod without shareProcessNamespace and hostUsers: false",
                )
            if binds := sorted(one.source for one in cri.foreign_binds(member.spec, pod.uid, kubelet)):
                yield ContainerBound(
                    f"the container {name} has directories of its node mounted",
                    why=", ".join(binds[:8]),
                    remedy="use a volume that both nodes have instead of hostPath",
                )
            if parts := sorted(set(cri.sub_paths_of_empty_dirs(member.spec, pod.uid, kubelet))):
                yield ContainerBound(
                    f"the container {name} has only a part of an emptyDir mounted",
                    why=", ".join(parts),
                    remedy="mount the whole volume: a subPath of an emptyDir cannot move yet",
                )
            words = cri.termination_message(member.spec, pod.uid, name, kubelet)
            with suppress(OSError):
                if words is not None and (
                    much := TERMINATION_MESSAGE.beyond(words.lstat().st_size, f"the container {name}")
                ):
                    yield much
            if stale := deleted_but_open(member.facts.pids, cri.mounted_parts(member.spec, pod.uid, kubelet)):
                yield ContainerBound(
                    f"the container {name} has a file of a ConfigMap or Secret open that has changed since",
                    why=f"{', '.join(stale)}, a part of a volume (subPath): the target has only the new one",
                    remedy="have the job close it, or mount the whole volume; that counts from the pod's next start",
                )


def fifos(task: Task) -> tuple[Path, ...]:
    """The FIFOs between a container's shim and containerd."""
    return tuple(Path(one) for one in (task.stdout, task.stderr) if one.startswith("/"))


def connections(members: Sequence[Member]) -> tuple[str, ...]:
    """The connections of a pod's containers to others than themselves."""
    pids = [pid for member in members for pid in member.facts.pids]
    return to_others(members[0].task.pid, pids) if members else ()


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
