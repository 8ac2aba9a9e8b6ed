"""Pods: the kubelet makes and keeps their containers. It is not asked: its runtime's records and the kernel tell all there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType

from podferry.core.connections import RECORDED, TCP, Backends, End
from podferry.core.limits import TERMINATION_MESSAGE
from podferry.core.preflight import ContainerBound, NoRoom
from podferry.core.undo import Handler
from podferry.engine.journal import Journal, Part
from podferry.errors import Refused, UsageError
from podferry.node import cri, payloads
from podferry.node.jobfacts import deleted_but_open, disk_usage
from podferry.node.open_connections import open_connections
from podferry.node.records import PodContainer, Task
from podferry.node.runtime import ContainerRuntime
from podferry.node.sockets import to_others
from podferry.workload.config import Config
from podferry.workload.inspected import Member, View, inspect, merged, running_task
from podferry.workload.kinds.kind import DUMP_FLAGS, WorkloadKind
from podferry.workload.makers import kubelet as made_by_kubelet
from podferry.workload.makers.arriving_connections import ArrivingConnections
from podferry.workload.makers.kubelet import KubeletContainer, KubeletMaker, KubeletOwner
from podferry.workload.offered import LAST_WORDS, OfferedPod, PodPart
from podferry.workload.pod.cluster_port import Cluster, ConnectionPeers, PodName
from podferry.workload.pod.kept_connections import KeptConnections, addresses
from podferry.workload.pod.probes import Probe
from podferry.workload.pod.translations import PodTranslations
from podferry.workload.source_container import Output, RunningContainer


class KubeletPods(WorkloadKind[OfferedPod]):
    """The pods of this node, in the cluster that it belongs to, if any."""

    offers = OfferedPod

    def __init__(
        self,
        config: Config,
        runtime: ContainerRuntime,
        cluster: Cluster | None,
        told: Callable[[], ConnectionPeers | None] | None = None,
    ) -> None:
        """`told` are the other ends of connections that are preserved."""
        super().__init__(config, runtime)
        self._given_cluster, self._told = cluster, told
        self.translations = PodTranslations(config.translations, config.state, runtime)

    @property
    def cluster(self) -> Cluster:
        """Kubernetes. Raises `Refused` where the agent belongs to none."""
        if self._given_cluster is None:
            raise Refused(
                f"the agent of {self._config.node} does not belong to a Kubernetes cluster",
                remedy="run podferry's DaemonSet there",
            )
        return self._given_cluster

    def sweep(self) -> None:
        """Remove the marks of pods that are gone from this node."""
        for mark in self._marks():
            uid = mark.name.partition("_")[0]
            if not self._runtime.holds_pod(uid):
                mark.unlink(missing_ok=True)

    def _marks(self) -> Iterator[Path]:
        for directory in (self._config.arrived, self._config.departed):
            with suppress(FileNotFoundError):
                yield from directory.iterdir()

    # What is here.

    def view(
        self,
        pod: PodName,
        names: Sequence[str],
        probes: Sequence[Probe] = (),
        memory_limits: Mapping[str, int] = MappingProxyType({}),
    ) -> View:
        """Inspect the containers `names` of a pod, of which some are to have other `memory_limits` (bytes) on the target. Raises
        `UsageError` where it is not here, `Refused` where one does not run."""
        there = self._runtime.pod(pod.uid)
        if not there:
            raise UsageError(f"there is no pod {pod} on {self._config.node}", why=f"no container has its uid {pod.uid}")
        members = tuple(self._member(pod, name, there) for name in names)
        volumes = cri.volumes([member.spec for member in members], pod.uid, self._config.kubelet)
        parts = tuple(PodPart(one.name, one.running.record.id, one.running.flags) for one in members)
        size = sum(disk_usage(path) for _, path in volumes)
        first, pids = members[0].running.task.pid, [pid for member in members for pid in member.facts.pids]
        return View(
            str(pod),
            members,
            OfferedPod(pod, parts, tuple(volume for volume, _ in volumes)),
            merged(str(pod), [member.facts for member in members], size, to_others(first, pids)),
            self.node_facts(),
            self._choice,
            volumes,
            tuple(probes),
            (*self._refused(pod, members), *without_room(members, memory_limits)),
            open_connections(first, pids, self._moved(pod.uid)),
        )

    def _member(self, pod: PodName, name: str, there: Mapping[str, PodContainer]) -> Member:
        if name not in there:
            raise Refused(f"the container {name} of {pod} does not run", remedy="wait until the pod is running")
        container = there[name]
        record = container.record
        try:
            task = running_task(self._runtime, record)
        except Refused as why:
            raise Refused.because(f"the container {name} of {pod} cannot move", why, remedy=why.remedy) from why
        last_words = cri.termination_message(record.spec_json(), pod.uid, name, self._config.kubelet)
        running = RunningContainer(
            record,
            task,
            self._runtime.upper(record),
            Output(container.log, fifos(task)),
            flags=DUMP_FLAGS,
            enclosed={LAST_WORDS: last_words} if last_words else {},
            guarded=True,
        )
        return inspect(self._runtime, name, running)

    def _refused(self, pod: PodName, members: Sequence[Member]) -> Iterator[Refused]:
        kubelet = self._config.kubelet
        for member in members:
            name = member.name
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

    def _moved(self, uid: str) -> Backends:
        known = self.translations.of(uid)

        def moved(protocol: str, local: End, remote: End) -> End | None:
            there = known.get((local, remote)) if protocol == TCP else None
            return End(there.now.remote_now, remote.port) if there else None

        return moved

    # The source's half.

    def keeping(self, view: View, journal: Journal) -> KeptConnections:
        """Those to pods on nodes with an agent."""
        wanted = frozenset(addresses(view.connections[:RECORDED]))
        uid, id = self.known(view.offered).pod.uid, journal.directory.name
        return KeptConnections(id, uid, wanted, self.cluster, self.translations)

    def owner(self, journal: Journal, offered: OfferedPod, probes: Sequence[Probe] = ()) -> KubeletOwner:
        """The kubelet, and whoever the pod belongs to in the cluster."""

        def payloads_open_in(images: Iterable[bytes]) -> bytes:
            return payloads.pack(payloads.open_in(images, offered.pod.uid, self._config.kubelet))

        return KubeletOwner(
            journal,
            partial(self.cluster.hand_over, journal.directory.name),
            departed=self._config.departed / offered.pod.uid,
            payloads=payloads_open_in,
            probes=probes,
            replaced=partial(self.cluster.replaced, journal.directory.name),
        )

    def source_handlers(self) -> dict[str, Handler]:
        """The undo steps for resources that the source holds."""
        return made_by_kubelet.source_handlers()

    # The target's half.

    def maker(self, journal: Journal) -> KubeletMaker:
        """The controller makes the pod, and the kubelet its containers."""
        others = self._told() if self._told is not None else None
        arriving = ArrivingConnections(journal, self.cluster, self.translations, others) if others else None
        return KubeletMaker(self._config, journal, self.cluster, arriving)

    def container_maker(self, journal: Part, offered: OfferedPod, number: int) -> KubeletContainer:
        """The kubelet."""
        return KubeletContainer(self._config, self._runtime, journal, offered.containers[number])

    def target_handlers(self) -> dict[str, Handler]:
        """The undo steps for resources that the target holds."""
        return made_by_kubelet.target_handlers(self._config, self._runtime, self.cluster, self.translations)


def without_room(members: Iterable[Member], limits: Mapping[str, int]) -> Iterator[Refused]:
    """Containers that hold more memory by now than `limits` (bytes, by their names) give them on the target."""
    for one in members:
        most = limits.get(one.name)
        if most is not None and one.held >= most:
            yield NoRoom(
                f"the container {one.name} has more memory than it may have on the target",
                why=f"it has {one.held >> 20} MiB, and spec.resources limits it to {most >> 20} MiB",
                remedy=f"a memory limit of more than {(one.held >> 20) + 1} MiB, with room to grow",
            )


def fifos(task: Task) -> tuple[Path, ...]:
    """The FIFOs between a container's shim and containerd."""
    return tuple(Path(one) for one in (task.stdout, task.stderr) if one.startswith("/"))
