"""The halves of all migrations on one node: how each begins, as a source, as a target, or where an earlier agent left it."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import structlog

from podferry.core.connections import BRIEF, told
from podferry.core.phases import SOURCE_ENDS, TARGET_ENDS, SourcePhase
from podferry.core.strict import from_json
from podferry.engine.journal import Journal, forget_old, journals
from podferry.engine.migration_record import MigrationRecord
from podferry.engine.order import Order
from podferry.engine.rehearsal import Rehearsal
from podferry.engine.source import Source
from podferry.engine.target import Target
from podferry.errors import PodferryError, Refused
from podferry.model import Connections, Mode
from podferry.node.containerd import Containerd
from podferry.node.cri import NAMESPACE
from podferry.node.crio import Crio
from podferry.node.runtime import ContainerRuntime
from podferry.wire.channel import Channel
from podferry.wire.messages import Offer
from podferry.workload.account import Account, Promise, Room
from podferry.workload.config import Config
from podferry.workload.inspected import View
from podferry.workload.kinds.alone import ContainersAlone
from podferry.workload.kinds.kind import WorkloadKind
from podferry.workload.kinds.kubelet_pods import KubeletPods
from podferry.workload.offered import Offered, OfferedPod
from podferry.workload.pod.cluster_port import PodName
from podferry.workload.source import SourceWorkload
from podferry.workload.threads import run

KEEP_RECORDS = 200
MIGRATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")
"""The pattern of a migration's id, which is also the name of its directory."""

BEFORE_CUTOVER = frozenset({SourcePhase.CHECK, SourcePhase.PRECOPY, SourcePhase.PREPARE_TARGET})

Start = Callable[[Callable[[], Awaitable[None]]], None]
Dial = Callable[[str], AbstractAsyncContextManager[Channel]]
Half = Source | Target


async def inspected(inspect: Callable[[], View], connections: Connections) -> View:
    """The workload, at a moment at which it has none of the connections that it may not lose, where there is such a moment soon."""
    view = await run(inspect)
    for pause in BRIEF:
        if view.lost(connections) is None:
            break
        await anyio.sleep(pause)
        view = await run(inspect)
    return view


class Migrations:
    """Those of one node, by id. `start` does something in the background, `dial` reaches the agent of a node."""

    def __init__(
        self,
        config: Config,
        alone: ContainersAlone,
        pods: KubeletPods,
        account: Account,
        *,
        start: Start,
        dial: Dial,
    ) -> None:
        self._config, self._start, self._dial = config, start, dial
        self.alone, self.pods, self.account = alone, pods, account
        self.sources: dict[str, Source] = {}
        self.targets: dict[str, Target] = {}
        self.log = structlog.get_logger().bind(node=config.node)

    def all(self) -> list[Half]:
        """Every half since the agent's start."""
        return [*self.sources.values(), *self.targets.values()]

    def half(self, id: str) -> Half | None:
        """One of them."""
        return self.sources.get(id) or self.targets.get(id)

    def directory(self, id: str) -> Path:
        """The directory of a migration's journal."""
        return self._config.migrations / id

    def kind(self, *, pod: bool) -> WorkloadKind[Any]:
        """The kind of workload: pods, or containers alone."""
        return self.pods if pod else self.alone

    def refuse_second(self, name: str, pod: PodName | None = None) -> None:
        """Raise `Refused` while the workload of this name moves; with `pod`, while that pod does, and no other of its name."""
        for half in self.all():
            if half.record.name != name or half.machine.ended or (pod is not None and pod_of(half.journal) != pod):
                continue
            if isinstance(half, Target):
                raise Refused(f"{name} is still arriving here", why=f"migration {half.record.id}", remedy="wait for it")
            raise Refused(
                f"{name} is being migrated already",
                why=f"migration {half.record.id} is in phase {half.phase}",
                remedy="wait for it, or cancel it" + ("" if pod else f" (podferry cancel {half.record.id})"),
            )

    # On the source.

    def leaves(self, uid: str) -> bool:
        """Whether a pod stands still to leave this node, or is about to."""
        return any(
            half.phase not in BEFORE_CUTOVER
            and not half.machine.ended
            and (pod := pod_of(half.journal))
            and pod.uid == uid
            for half in self.sources.values()
        )

    def set_out(
        self,
        id: str,
        name: str,
        to: str,
        kind: WorkloadKind[Any],
        inspect: Callable[[], View],
        *,
        order: Order,
        half: type[Source] = Source,
        mode: Mode,
        offered_as: Mode | None = None,
        **facts: Any,
    ) -> Source:
        """Begin to move the workload `name` to the node `to`, by `order`. `mode` is what the record says, `offered_as` the mode
        in which it is inspected and offered, where that is another; `facts` are noted in the journal."""
        self._start(partial(run, kind.sweep))
        journal = Journal(self.directory(id))
        record = MigrationRecord(id, name, self._config.node, to, mode)
        journal.note(role="source", record=record.to_dict(), **facts)
        source = half(order, partial(self._dial, to), journal, record, kind.source_handlers())
        self.sources[id] = source

        async def propose() -> tuple[Offer, SourceWorkload]:
            view = (await inspected(inspect, order.connections)).asked_for(order.connections)
            found = told(view.connections)
            record.extra["connections"], record.extra["connections_total"] = (
                found["connections"],
                found["connections_total"],
            )
            choice = view.demand_movable(offered_as or mode, order.connections)
            record.extra["tracker"], record.extra["tracker_reason"] = str(choice.kind), choice.reason
            record.extra["warnings"] = view.warnings(mode)
            journal.note(offered=view.offered.for_journal(), record=record.to_dict())
            job = kind.source(view, journal, choice.kind, order.connections)
            return replace(view.offer(id, offered_as or mode), rehearsal=issubclass(half, Rehearsal)), job

        self._start(partial(source.run, propose))
        return source

    # On the target.

    def weigh(self, offer: Offer, offered: Offered) -> tuple[Any, list[Refused]]:
        """Can this node take what is offered? Its facts, and every reason why not."""
        return self.kind(pod=isinstance(offered, OfferedPod)).weigh(offer, offered)

    def take(self, offer: Offer, peer: str, offered: Offered, promise: Promise) -> Target:
        """Begin to receive what `peer` offers."""
        journal = Journal(self.directory(offer.migration))
        record = MigrationRecord(offer.migration, offer.name, peer, self._config.node, Mode(offer.mode))
        journal.note(
            role="target",
            offered=offered.for_journal(),
            record=record.to_dict(),
            promise=promise.room.to_dict(),
            rehearsal=offer.rehearsal,
        )
        target = self.targets[offer.migration] = self._target(journal, record, offered, promise)
        return target

    def _target(
        self,
        journal: Journal,
        record: MigrationRecord,
        offered: Offered | None = None,
        promise: Promise | None = None,
    ) -> Target:
        kind = self.kind(pod=journal.is_of_a_pod)
        self._start(partial(run, kind.sweep))
        return Target(kind.target(journal, record.name, offered, promise), journal, record, kind.target_handlers())

    async def hold_promise(self, target: Target) -> None:
        """Release the resources promised to a migration once it has ended here."""
        await target.ended.wait()
        self.account.release(target.record.id)

    # What an earlier agent left.

    def recover(self) -> None:
        """Take up every migration that has not ended: finish it or undo it, by what its journal says. Of one that has, take
        back what it could not; where the container has moved since, nobody knows any more whose that is."""
        forget_old(self._config.migrations, KEEP_RECORDS)
        moved_since: set[str | None] = set()
        for directory in reversed(journals(self._config.migrations)):
            try:
                journal = Journal(directory)
            except (OSError, PodferryError) as error:
                # of a later version, say: it is left alone, and the others are taken up
                self.log.error("a journal cannot be read", migration=directory.name, error=str(error))
                continue
            ends: frozenset[str] = SOURCE_ENDS if journal.facts.get("role") == "source" else TARGET_ENDS
            name = journal.facts.get("record", {}).get("name")
            ended, latest = journal.phase in ends, name not in moved_since
            moved_since.add(name)
            if name is None or (ended and not (journal.ledger.entries and latest)):
                journal.close()
                continue
            why = "was interrupted" if not ended else "left something behind"
            self.log.warning(f"taking up a migration that {why}", migration=directory.name, phase=journal.phase)
            try:
                half = self._again(journal)
                self._start(half.sweep if ended else half.go_on)
            except Exception:
                self.log.exception("what is left of a migration cannot be read", migration=directory.name)

    def _again(self, journal: Journal) -> Half:
        record = record_of(journal)
        if journal.facts["role"] == "source":
            source = self.sources[record.id] = self._source_again(journal, record)
            return source
        target = self.targets[record.id] = self._target(journal, record)
        if not target.machine.ended:
            self.account.restore(record.id, Room.from_dict(journal.facts.get("promise")))
            self._start(partial(self.hold_promise, target))
        return target

    def _source_again(self, journal: Journal, record: MigrationRecord) -> Source:
        kind = self.kind(pod=journal.is_of_a_pod)
        held = kind.frozen(journal, record.name)
        dial = partial(self._dial, record.target)
        return Source(Order(record.mode), dial, journal, record, kind.source_handlers(), held)

    def remembered(self, id: str) -> Target | None:
        """The target's half of a migration that had ended before this agent began."""
        if not MIGRATION.fullmatch(id) or not self.directory(id).exists():
            return None
        journal = Journal(self.directory(id))
        journal.close()
        if journal.facts.get("role") != "target" or journal.phase not in TARGET_ENDS:
            return None
        return self._target(journal, record_of(journal))


def record_of(journal: Journal) -> MigrationRecord:
    """What a journal's migration has come to."""
    return MigrationRecord.from_dict(journal.load_record() or journal.facts["record"])


def pod_of(journal: Journal) -> PodName | None:
    """The pod whose migration a journal tells, or None where it is of a container alone."""
    found = journal.facts.get("pod") or journal.facts.get("offered", {}).get("pod")
    return from_json(PodName, json.loads(json.dumps(found))) if found else None


def runtime_of_pods(config: Config) -> ContainerRuntime:
    """What makes the pods' containers on this node."""
    return Crio(Path(config.crio)) if config.crio else Containerd(config.containerd, NAMESPACE)
