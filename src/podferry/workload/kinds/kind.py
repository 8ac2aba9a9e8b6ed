"""What an agent does with a workload, on either side of a migration: inspect, judge, offer, dump, find again, make.

A workload is n containers with their volumes, of which a container alone is the case n = 1. Its kind says what differs: who makes
and keeps the containers (`Owner` on the source, `Maker` on the target), and what else speaks against a move.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Generic, TypeVar

from podferry.core.facts import ContainerFacts, NodeFacts
from podferry.core.preflight import Question, refusals
from podferry.core.undo import Handler
from podferry.engine.journal import Journal, Part
from podferry.errors import Bug, Refused
from podferry.memory.tracking.tracker import Choice, TrackerKind, choose, probe
from podferry.model import Connections, Mode
from podferry.node import cri
from podferry.node.runtime import ContainerRuntime
from podferry.wire.messages import Offer
from podferry.workload.account import Promise
from podferry.workload.config import Config
from podferry.workload.frozen import FrozenContainer
from podferry.workload.inspected import View
from podferry.workload.nodefacts import node_facts
from podferry.workload.offered import Offered, decode
from podferry.workload.pod.kept_connections import KeptConnections
from podferry.workload.pod.probes import Probe
from podferry.workload.source import FrozenWorkload, Owner, SourceWorkload
from podferry.workload.source_container import SourceContainer
from podferry.workload.source_tree import SourceTree
from podferry.workload.target import Maker, TargetWorkload
from podferry.workload.target_container import ContainerMaker, TargetContainer

DUMP_FLAGS = ("--file-locks", "--tcp-established")


OfferedKind = TypeVar("OfferedKind", bound=Offered)


class WorkloadKind(ABC, Generic[OfferedKind]):
    """One kind of workload, whose containers `runtime` has. `offers` is what one looks like that is offered."""

    offers: type[OfferedKind]

    def __init__(self, config: Config, runtime: ContainerRuntime) -> None:
        self._config, self._runtime = config, runtime

    @cached_property
    def _choice(self) -> Choice:
        """How what it moves is tracked. This node's kernel does not change."""
        return choose(probe())

    def node_facts(self) -> NodeFacts:
        """What this node is and has."""
        return node_facts(self._config.state, self._config.run, self._runtime.kind, self._runtime.version())

    def sweep(self) -> None:
        """Remove what is here of workloads that are gone from this node: nothing, unless a kind leaves something."""

    # The source's half.

    def source(
        self, view: View, journal: Journal, tracker: TrackerKind, connections: Connections = Connections.CLOSE
    ) -> SourceWorkload:
        """The workload that was inspected, ready to be moved."""
        containers = [
            SourceContainer(self._config, self._runtime, Part(journal, number), member.running, tracker)
            for number, member in enumerate(view.members)
        ]

        def suspects(path: Path) -> set[bytes]:
            return {
                file
                for member, one in zip(view.members, containers, strict=True)
                for at in cri.mounted_at(member.spec, path)
                for file in one.mapped_shared(at)
            }

        trees = [SourceTree(path, partial(suspects, path)) for _, path in view.volumes]
        owner = self.owner(journal, self.known(view.offered), view.probes)
        keeping = self.keeping(view, journal) if connections is Connections.PRESERVE else None
        return SourceWorkload(containers, owner, trees, connections=connections, keeping=keeping)

    def keeping(self, view: View, journal: Journal) -> KeptConnections | None:
        """What knows which connections to others go on: those of this kind do not, unless it says otherwise."""
        return None

    def frozen(self, journal: Journal, name: str) -> FrozenWorkload | None:
        """The workload `name` on its source, as an earlier agent left it; None where it had not been inspected yet."""
        if "offered" not in journal.facts:
            return None
        offered = self.known(decode(journal.facts["offered"], name))
        containers = [
            FrozenContainer(Part(journal, number), self._runtime, record)
            for number, record in enumerate(offered.records)
        ]
        return FrozenWorkload(containers, self.owner(journal, offered))

    @abstractmethod
    def owner(self, journal: Journal, offered: OfferedKind, probes: Sequence[Probe] = ()) -> Owner:
        """The owner of the containers on this node."""

    @abstractmethod
    def source_handlers(self) -> dict[str, Handler]:
        """The undo steps for resources that the source holds."""

    # The target's half.

    def weigh(self, offer: Offer, offered: Offered) -> tuple[NodeFacts, list[Refused]]:
        """Can this node take what is offered? Its facts, and every reason why not. Raises `PeerMisbehaved`."""
        here, known = self.node_facts(), self.known(offered)
        container = ContainerFacts.from_dict(offer.facts.get("container"))
        source = NodeFacts.from_dict(offer.facts.get("node"))
        asked = refusals(Question(container, source, here, Mode(offer.mode)))
        return here, [*self.unallowed(known), *asked, *self.missing(known)]

    def unallowed(self, offered: OfferedKind) -> Iterator[Refused]:
        """Refusals of parts of an offer that no target accepts from another node."""
        yield from ()

    def missing(self, offered: OfferedKind) -> Iterator[Refused]:
        """Refusals because this node lacks what the offer needs, or because a name is taken."""
        yield from ()

    def target(
        self, journal: Journal, name: str, offered: Offered | None = None, promise: Promise | None = None
    ) -> TargetWorkload:
        """The workload `name` that is to run here: what is `offered` now, or what the journal says was. `promise` is what it was
        promised of memory and disk."""
        known = self.known(offered or decode(journal.facts["offered"], name))
        containers = []
        for number in range(len(known.records)):
            part = Part(journal, number)
            maker = self.container_maker(part, known, number)
            containers.append(TargetContainer(self._config, self._runtime, part, maker, promise))
        return TargetWorkload(self._config, journal, containers, self.maker(journal), known.volumes, promise)

    @abstractmethod
    def maker(self, journal: Journal) -> Maker:
        """The maker of the workload on this node."""

    @abstractmethod
    def container_maker(self, journal: Part, offered: OfferedKind, number: int) -> ContainerMaker:
        """The maker of its container `number` on this node."""

    @abstractmethod
    def target_handlers(self) -> dict[str, Handler]:
        """The undo steps for resources that the target holds."""

    def known(self, offered: Offered) -> OfferedKind:
        """An offer that is one of this kind's. Raises `Bug` for another's."""
        if not isinstance(offered, self.offers):
            raise Bug(f"{type(offered).__name__} was taken for {self.offers.__name__}")
        return offered
