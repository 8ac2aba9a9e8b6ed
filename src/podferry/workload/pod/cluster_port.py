"""The seam between the engine and whoever speaks with Kubernetes' API server on this node.

`Cluster` is what the engine asks for while a pod moves; `Pods` is what it offers. Neither side knows more of the other, so that the
engine runs without Kubernetes and the API client without containerd.

A migration of a pod has one name on both nodes, the `id`: the uid of its Migration object. It names the journals too, so a second
attempt is a second Migration.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from podferry.core.connections import End
from podferry.core.translation import Translation
from podferry.engine.order import Order
from podferry.model import Mode
from podferry.workload.pod.probes import Probe

Json = dict[str, Any]


@dataclass(frozen=True)
class PodName:
    """One pod, and no other of the same name: `uid` tells."""

    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class PodOrder:
    """Move `pod`, which runs here, to the node `target`. `id` is the Migration's uid.

    `containers` are the names of those that must run on the target, in the order in which the kubelet starts them: restartable
    init containers (sidecars) first, then the containers of the spec. `probes` are its liveness probes that come by the network.
    `memory_limits` are bytes that containers may have on the target, where that is another limit than here. With `rehearse` the pod
    stays: its move is rehearsed.
    """

    id: str
    pod: PodName
    containers: tuple[str, ...]
    target: str
    order: Order = field(default_factory=Order)
    probes: tuple[Probe, ...] = ()
    memory_limits: Mapping[str, int] = field(default_factory=dict)
    rehearse: bool = False


@dataclass(frozen=True)
class MigrationName:
    """A Migration object, and no other of the same name."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True)
class PeerPod:
    """A pod at the other end of connections, by its uid, and the node that it is on, which has an agent."""

    uid: str
    node: str


@dataclass(frozen=True)
class MovingPod:
    """What a Migration says to the node of a pod at the other end of connections: the `addresses` of the pod that moves, as it
    leaves its source, and the uids of the pods of this node that may have connections with it."""

    addresses: frozenset[str]
    peers: frozenset[str]


class Cluster(Protocol):
    """Kubernetes, as the engine sees it. Every call may be made again by an agent that was restarted."""

    def address(self, node: str) -> str | None:
        """HOST:PORT of the agent of `node`; None where there is no such node."""
        ...

    def lives_at(self, host: str) -> bool:
        """Whether a node that is the source or the target of a Migration with this node has the IP address `host`."""
        ...

    async def admit(self, id: str, pod: PodName, source: str, mode: Mode) -> None:
        """Asked on the target, of an offer: may the node `source` have this node take `pod` in the migration `id`?

        Raises `Refused` unless that is what the Migration says now, and for every offer after the first: no node's word counts.
        """
        ...

    def keeps_name(self, id: str) -> bool:
        """Asked on the target, of a migration that it was admitted to: whether the target pod has the source's name. Then it can be
        made only after GO, when the source's object is gone."""
        ...

    async def replaced(self, id: str) -> bool:
        """Asked on the source after GO, when the target has given up: whether the source's object was given up for a pod of the
        same name. Then the job cannot go on here. Returns only when that is certain."""
        ...

    async def target_pod(self, id: str) -> PodName:
        """Asked on the target, near convergence, or after GO for one that `keeps_name`: have the controller make the target pod
        here, and return it.

        The kubelet then makes its containers one after another, so this must not wait until any of them runs. Raises what keeps
        the pod from being made: quota, a webhook, a missing volume. Cancelled when the migration goes back.
        """
        ...

    async def give_back(self, id: str) -> None:
        """Asked on the target, when the job will never run here: have the target pod deleted, whether or not there is one.

        Returns when that is sure to happen, not when it has.
        """
        ...

    async def hand_over(self, id: str) -> None:
        """Asked on the source, when the job runs on the target and the original is frozen for good: have the owner count the
        target pod, and the source pod deleted. The frozen original is killed as soon as this returns."""
        ...

    async def peers(self, id: str, wanted: Collection[str] = ()) -> tuple[MigrationName, Mapping[str, PeerPod]]:
        """Asked on the source and on the target, of a move that is to preserve connections: the Migration, and which pods are at
        the other ends of its pod's connections, by their addresses. Waits a while for those `wanted`. Raises `ObjectNotFound`."""
        ...

    async def moving(self, migration: MigrationName, target: str) -> MovingPod:
        """Asked on the node of such a pod, when the node `target` tells of it: what the Migration says. Raises `Refused`
        unless that node is its target, and connections are to be preserved now: no node's word counts."""
        ...

    async def moved(self, migration: MigrationName) -> bool | None:
        """Asked there, later: whether the pod has moved, or goes on at its source; None as long as either may be."""
        ...


class ConnectionPeers(Protocol):
    """The other ends of a pod's connections, as they are told on its target (`podferry.agent.connection_peers`)."""

    async def tell(
        self, migration: MigrationName, found: Sequence[tuple[PeerPod, Translation]]
    ) -> frozenset[tuple[End, End]]:
        """Have their nodes rewrite these connections, each as its peer's namespace sees it. Returns those that are no longer open
        there, by the same ends. Raises `PodferryError` where one of the nodes does not."""
        ...


class PodMigration(Protocol):
    """One half of a migration of a pod: the source's, or on the other node the target's."""

    @property
    def id(self) -> str:
        """The Migration's uid."""
        ...

    @property
    def role(self) -> str:
        """`source` or `target`."""
        ...

    @property
    def pod(self) -> PodName:
        """The pod that moves: the source's."""
        ...

    def record(self) -> Json:
        """All that is known now, as `podferry status --json` prints it (docs/cli.md): phase, outcome, bytes, rounds, downtime."""
        ...

    def listen(self, listener: Callable[[Json], None]) -> Callable[[], None]:
        """Call `listener` with each event: at every phase, and at most ten times a second between. Returns what ends it."""
        ...

    async def wait(self) -> Json:
        """Return the record once this half has ended. Its `outcome` is how, its `error` why not."""
        ...

    def cancel(self) -> bool:
        """Ask for the way back. False where it is too late, and always on the target: the source decides."""
        ...

    def resolve(self, *, run_on_source: bool) -> None:
        """An arbiter's verdict on a migration that lost contact after GO. Raises `Refused` in any other phase."""
        ...


class Pods(Protocol):
    """What the engine offers: `podferry.agent.service.Agent.pods`."""

    async def move(self, order: PodOrder) -> PodMigration:
        """Set out. Returns at once; whether it may move at all is the first thing that is found out, and ends as `refused`.

        Raises `Refused` where the pod is moving already. An `id` that was here before is not begun again: its half is returned.
        """
        ...

    def migrations(self) -> Mapping[str, PodMigration]:
        """Every half on this node since the agent's start, by id: what an earlier agent left unfinished is among them."""
        ...
