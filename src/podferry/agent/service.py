"""podferry-agent: what runs on a node, and what may be asked of it."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import structlog
from anyio.abc import TaskGroup

from podferry import __version__
from podferry.agent import control
from podferry.agent.admission import demand_allowed, demand_peer, known_addresses
from podferry.agent.control import Emit
from podferry.agent.pods import PodEngine
from podferry.core.facts import NodeFacts
from podferry.core.phases import SOURCE_ENDS, TARGET_ENDS, TARGET_MAY_RUN, SourceEvent
from podferry.core.precopy import PreCopyPolicy
from podferry.engine.inbox import Inbox
from podferry.engine.journal import Journal, Part, forget_old, journals
from podferry.engine.migration_record import MigrationRecord
from podferry.engine.rehearsal import REHEARSAL, Rehearsal, told
from podferry.engine.side import Side
from podferry.engine.source import Order, Source
from podferry.engine.target import Target
from podferry.errors import Failed, PeerLost, PeerMisbehaved, PeerUntrusted, PodferryError, Refused, UsageError, leaves
from podferry.fs.private import private_directory
from podferry.model import Mode
from podferry.node.containerd import Containerd
from podferry.wire.channel import Channel
from podferry.wire.frames import Data
from podferry.wire.messages import Abort, Accept, ErrorReport, GaveUp, Message, Offer, Query, Refuse, Unknown
from podferry.wire.tls import Credentials
from podferry.wire.transport import dial, listen, serve
from podferry.workload import frozen
from podferry.workload.account import Account, Promise, Room, free_here, needed
from podferry.workload.config import Config
from podferry.workload.frozen import FrozenContainer
from podferry.workload.inspection import Inspection
from podferry.workload.makers import containerd
from podferry.workload.makers.containerd import ContainerdOwner
from podferry.workload.offered import Offered
from podferry.workload.pod.offered import OfferedPod
from podferry.workload.pod.ports import Cluster
from podferry.workload.source import FrozenWorkload, SourceWorkload
from podferry.workload.threads import run

KEEP_RECORDS = 200
FORGET_EVERY = 3600.0  # seconds

Record = dict[str, Any]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")


class Agent:
    """The agent of one node."""

    def __init__(self, config: Config, cluster: Cluster | None = None) -> None:
        self.config, self._cluster = config, cluster
        self.log = structlog.get_logger().bind(node=config.node)
        self.credentials = Credentials.load(config.certificates)
        self.containerd = Containerd(config.containerd, config.namespace)
        self.inspection = Inspection(config, self.containerd)
        self._sources: dict[str, Source] = {}
        self._targets: dict[str, Target] = {}
        self._weighed: set[str] = set()
        self.account = Account(partial(free_here, config))
        self.pods = PodEngine(
            config, cluster, sources=self._sources, targets=self._targets, start=self._start, dial=self._dial
        )
        self._tasks: TaskGroup

    async def run(self, ready: Callable[[], object]) -> None:
        """Work until cancelled. `ready` is called once the agent answers and has taken up what an earlier one left."""
        ops: Mapping[str, control.Op] = {
            "ps": self.op_ps,
            "check": self.op_check,
            "migrate": self.op_migrate,
            "status": self.op_status,
            "cancel": self.op_cancel,
            "resolve": self.op_resolve,
            "node": self.op_node,
        }
        private_directory(self.config.run, below=self.config.run)
        private_directory(self.config.migrations, below=self.config.state)
        listener = listen(self.config.listen)
        async with anyio.create_task_group() as self._tasks:
            self._recover()
            self._start(self._forget_old)
            if self._cluster is not None:
                self._start(partial(run, self.pods.sweep))
            known = await run(known_addresses, self.config, self._cluster)
            serving = partial(serve, listener, self.credentials, self._converse, self._report, known=known)
            self._tasks.start_soon(serving)
            await control.serve(self.config.socket, ops, started=ready)

    async def _forget_old(self) -> None:
        """An agent that runs for months forgets old journals, too."""
        while True:
            await anyio.sleep(FORGET_EVERY)
            await run(forget_old, self.config.migrations, KEEP_RECORDS)

    def _start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do something in the background. One migration's bug must not end the others."""

        async def guarded() -> None:
            try:
                await work()
            except Exception:
                self.log.exception("bug")

        self._tasks.start_soon(guarded)

    # What an earlier agent left.

    def _recover(self) -> None:
        """Take up every migration that has not ended: finish it or undo it, by what its journal says. Of one that has, take
        back what it could not; where the container has moved since, nobody knows any more whose that is."""
        forget_old(self.config.migrations, KEEP_RECORDS)
        moved_since: set[str | None] = set()
        for directory in reversed(journals(self.config.migrations)):
            try:
                journal = Journal(directory)
            except (
                OSError,
                PodferryError,
            ) as error:  # of a later version, say: it is left alone, and the others are taken up
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

    def _again(self, journal: Journal) -> Source | Target:
        migration_record = MigrationRecord.from_dict(journal.load_record() or journal.facts["record"])
        if journal.facts["role"] == "source":
            source = self._sources[migration_record.id] = self._source_again(journal, migration_record)
            return source
        target = self._targets[migration_record.id] = self._target_again(journal, migration_record)
        if not target.machine.ended:
            self.account.restore(migration_record.id, Room.from_dict(journal.facts.get("promise")))
            self._start(partial(self._hold_promise, target))
        return target

    async def _hold_promise(self, target: Target) -> None:
        """What a migration was promised is free for others once it has ended here."""
        await target.ended.wait()
        self.account.release(target.record.id)

    def _source_again(self, journal: Journal, migration_record: MigrationRecord) -> Source:
        if journal.is_of_a_pod:
            return self.pods.source_again(journal, migration_record)
        held = None
        if "offered" in journal.facts:
            offered = Offered.from_dict(journal.facts["offered"], migration_record.name)
            container = FrozenContainer(Part(journal, 0), self.containerd, offered.record)
            held = FrozenWorkload([container], ContainerdOwner(self.containerd, offered.log))
        return Source(
            Order(migration_record.mode),
            partial(self._dial, migration_record.target),
            journal,
            migration_record,
            frozen.handlers(),
            held,
        )

    def _target_again(self, journal: Journal, migration_record: MigrationRecord) -> Target:
        if journal.is_of_a_pod:
            return self.pods.target_again(journal, migration_record)
        return self._target(
            journal, migration_record, Offered.from_dict(journal.facts["offered"], migration_record.name)
        )

    def _target(
        self, journal: Journal, migration_record: MigrationRecord, offered: Offered, promise: Promise | None = None
    ) -> Target:
        job = containerd.target(self.config, self.containerd, journal, offered, promise)
        return Target(job, journal, migration_record, containerd.target_handlers(self.config, self.containerd))

    # What people ask.

    async def op_ps(self, emit: Emit) -> list[Record]:
        """The containers of this node."""
        return await run(self.inspection.containers)

    async def op_node(self, emit: Emit) -> Record:
        """This node and its agent."""
        facts = await run(self.pods.node_facts if self.config.crio else self.inspection.node_facts)
        return {"node": self.config.node, "version": __version__, "peers": sorted(self.config.peers), **facts.to_dict()}

    async def op_check(
        self, emit: Emit, name: str, to: str, *, rehearse: bool = False, max_freeze_s: float | None = None
    ) -> Record:
        """Could this container move there? Nothing is touched, unless it is to be rehearsed as well."""
        answer = await self._check(name, to)
        if rehearse and answer["movable"]:
            order = replace(REHEARSAL, max_freeze=max_freeze_s or REHEARSAL.max_freeze)
            source, migration_record = await self._set_out(name, to, order, Rehearsal)
            await source.ended.wait()
            answer |= told(migration_record.to_dict())
        return answer

    async def _check(self, name: str, to: str) -> Record:
        self._check_names(name, to)
        view = await run(partial(self.inspection.container, name))
        reasons: list[PodferryError] = []
        target: NodeFacts | None = None
        offer = view.offer(f"check-{secrets.token_hex(4)}", Mode.LIVE)
        async with anyio.create_task_group() as helpers:
            inbox = await Inbox.open(helpers, self._dial(to))
            await inbox.channel.send(offer)
            answer = await inbox.expect(Accept, Refuse)
            if isinstance(answer, Refuse):
                reasons += [one.error() for one in answer.refusals]
            elif isinstance(answer, Accept):
                target = NodeFacts.from_dict(answer.facts)
            await inbox.channel.send(Abort(offer.migration, "only a check"))
            await inbox.close()
        return {
            "name": name,
            "source": self.config.node,
            "target": to,
            "movable": not reasons,
            "refusals": [reason.to_dict() for reason in reasons],
            "warnings": view.warnings(Mode.LIVE, target),
            "tracker": str(view.tracker.kind),
            "tracker_reason": view.tracker.reason,
            "memory_bytes": offer.memory_bytes,
            "upper_bytes": offer.upper_bytes,
        }

    async def op_migrate(
        self,
        emit: Emit,
        name: str,
        to: str,
        mode: str = Mode.LIVE,
        timeout_s: float | None = None,
        max_downtime_ms: float | None = None,
        bandwidth: float | None = None,
        max_freeze_s: float | None = None,
        allow_postcopy: bool = False,
        allow_throttle: bool = True,
    ) -> Record:
        """Move a container. Goes on if whoever asked hangs up."""
        if mode not in {str(one) for one in Mode}:
            raise UsageError(f"there is no mode {mode!r}", why=f"there are {', '.join(Mode)}")
        order = Order(
            Mode(mode),
            timeout=timeout_s or Order.timeout,
            bandwidth=bandwidth,
            max_freeze=max_freeze_s,
            policy=PreCopyPolicy(
                max_downtime=(max_downtime_ms or PreCopyPolicy.max_downtime * 1e3) / 1e3,
                throttle=allow_throttle,
                postcopy=allow_postcopy,
            ),
        )
        self._check_names(name, to)
        source, migration_record = await self._set_out(name, to, order)
        events, inbox = anyio.create_memory_object_stream[Record](1024)

        def receive(event: Record) -> None:
            if events.statistics().current_buffer_used < 1024:
                events.send_nowait(event)

        stop = migration_record.listen(receive)
        try:
            async with anyio.create_task_group() as forwarding:

                async def pass_on() -> None:
                    async for event in inbox:
                        await emit(event)

                forwarding.start_soon(pass_on)
                await source.ended.wait()
                events.close()
        finally:
            stop()
        return migration_record.to_dict()

    async def op_status(self, emit: Emit, id: str | None = None) -> list[Record]:
        """What happened in one migration, or in all that this node remembers, oldest first."""
        found = []
        for directory in journals(self.config.migrations):
            if id is None or directory.name == id:
                live: Side[Any, Any] | None = self._sources.get(directory.name) or self._targets.get(directory.name)
                record = live.record.to_dict() if live else _saved(directory)
                if record is not None:
                    found.append(record)
        return found

    async def op_cancel(self, emit: Emit, id: str) -> Record:
        """Take a migration back, as long as the right to run has not passed."""
        source = self._source(id)
        if not source.cancel():
            raise Refused(f"{id} cannot be cancelled any more", why=f"it is in phase {source.phase}")
        await source.ended.wait()
        return source.record.to_dict()

    async def op_resolve(self, emit: Emit, id: str, run_on: str, *, filled: bool = False) -> Record:
        """A person decides where a migration that lost contact after GO goes on. `filled`: the target has said that it has all
        of the job's memory."""
        if id in self._targets:
            return await self._resolve_target(self._targets[id], run_on)
        source = self._source(id)
        if run_on not in (source.record.source, source.record.target):
            raise UsageError(f"{run_on} is neither the source nor the target of {id}")
        here = run_on == source.record.source
        source.resolve(SourceEvent.RESOLVED_HERE if here else SourceEvent.RESOLVED_THERE, filled=filled)
        await source.ended.wait()
        return source.record.to_dict()

    async def _resolve_target(self, target: Target, run_on: str) -> Record:
        """The source decides; here a verdict can only hold the target to what it said."""
        if run_on == target.record.source and target.phase in TARGET_MAY_RUN:
            raise Refused(
                f"{target.record.name} runs here already",
                why=f"the target of {target.record.id} is in phase {target.phase}",
                remedy=f"podferry resolve {target.record.id} --run-on {target.record.target}",
            )
        return target.record.to_dict()

    # Setting out.

    async def _set_out(
        self, name: str, to: str, order: Order, half: type[Source] = Source
    ) -> tuple[Source, MigrationRecord]:
        self._refuse_second(name)
        id = f"{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        journal = Journal(self.config.migrations / id)
        migration_record = MigrationRecord(id, name, self.config.node, to, order.mode)
        journal.note(role="source", record=migration_record.to_dict())
        source = half(order, partial(self._dial, to), journal, migration_record, frozen.handlers())
        self._sources[id] = source
        rehearsal = issubclass(
            half, Rehearsal
        )  # which is offered, and tracked, as the move would be that it stands for
        mode = Mode.LIVE if rehearsal else order.mode

        async def propose() -> tuple[Offer, SourceWorkload]:
            view = await run(partial(self.inspection.container, name))
            choice = view.demand_movable(mode)
            migration_record.extra["tracker"], migration_record.extra["tracker_reason"] = (
                str(choice.kind),
                choice.reason,
            )
            migration_record.extra["warnings"] = view.warnings(order.mode, None)
            journal.note(offered=view.offered.for_journal(), record=migration_record.to_dict())
            job = view.source(self.config, self.containerd, journal, choice.kind)
            return replace(view.offer(id, mode), rehearsal=rehearsal), job

        self._start(partial(source.run, propose))
        return source, migration_record

    def _refuse_second(self, name: str) -> None:
        for source in self._sources.values():
            if source.record.name == name and not source.machine.ended:
                raise Refused(
                    f"{name} is being migrated already",
                    why=f"migration {source.record.id} is in phase {source.phase}",
                    remedy=f"wait for it, or podferry cancel {source.record.id}",
                )
        for target in self._targets.values():
            if target.record.name == name and not target.machine.ended:
                raise Refused(
                    f"{name} is still arriving here", why=f"migration {target.record.id}", remedy="wait for it"
                )

    def _check_names(self, name: str, to: str) -> None:
        if to == self.config.node:
            raise UsageError(
                f"{name} is on {to} already", why="source and target are one node", remedy="name another node"
            )
        if to not in self.config.peers:
            known = ", ".join(sorted(self.config.peers)) or "none"
            raise UsageError(f"this agent knows no node {to}", why=f"the other nodes are: {known}")

    def _source(self, id: str) -> Source:
        if id not in self._sources:
            raise UsageError(f"this node is not the source of a migration {id}", remedy="podferry status lists them")
        return self._sources[id]

    def _dial(self, node: str) -> AbstractAsyncContextManager[Channel]:
        address = self.config.peers.get(node) or (self._cluster and self._cluster.address(node))
        if not address:
            raise PeerLost(f"cannot reach {node}", why="this agent knows no node of that name")
        return dial(node, address, self.credentials)

    # What other agents want.

    async def _converse(self, channel: Channel) -> None:
        demand_peer(self.config, self._cluster, channel.peer)
        first = await channel.receive()
        match first:
            case Offer():
                await self._receive(channel, first)
            case Query():
                await self._answer(channel, first.migration)
            case _:
                raise PeerMisbehaved(f"{channel.peer} sent a {type(first).__name__} as its first message")

    async def _receive(self, channel: Channel, offer: Offer) -> None:
        if offer.migration in self._weighed:
            raise PeerMisbehaved(f"{channel.peer} offers {offer.migration[:80]!r} twice at the same time")
        self._weighed.add(offer.migration)
        try:
            accepted = await self._weigh(channel, offer)
        finally:
            self._weighed.discard(offer.migration)
            if offer.migration not in self._targets:
                self.account.release(offer.migration)
        if accepted is not None:
            target, first = accepted
            self._start(partial(self._hold_promise, target))
            await target.converse(channel, first, self._start, offer.timeout_s)

    async def _weigh(self, channel: Channel, offer: Offer) -> tuple[Target, Message | Data] | None:
        """Answer an offer. What was accepted and is really sent has a journal of its own when this returns."""
        reasons: list[PodferryError] = []
        try:
            if not _ID.fullmatch(offer.migration) or (self.config.migrations / offer.migration).exists():
                raise PeerMisbehaved(
                    f"{offer.migration!r} cannot be a migration's name, or is one's that was here before"
                )
            offered, weigh = self._offered(offer)
            self._refuse_second(offer.name)
            await demand_allowed(self.config, self._cluster, channel.peer, offer, offered)
            facts, refused = await run(weigh)
            reasons += refused
            if not reasons:
                promise = self.account.promise(offer.migration, needed(offer))
        except PodferryError as error:
            reasons.append(error)
        if reasons:
            await channel.send(Refuse(offer.migration, tuple(map(ErrorReport.of, reasons))))
            await channel.receive()
            return None
        await channel.send(Accept(offer.migration, facts.to_dict()))
        first = await channel.receive()
        if isinstance(first, Abort):
            nothing = Failed("the source took its offer back before anything was made here", why=first.reason)
            await channel.send(GaveUp(offer.migration, ErrorReport.of(nothing)))
            return None
        journal = Journal(self.config.migrations / offer.migration)
        migration_record = MigrationRecord(
            offer.migration, offer.name, channel.peer, self.config.node, Mode(offer.mode)
        )
        journal.note(
            role="target",
            offered=offered.for_journal(),
            record=migration_record.to_dict(),
            promise=promise.room.to_dict(),
            rehearsal=offer.rehearsal,
        )
        if isinstance(offered, OfferedPod):
            target = self.pods.target(journal, migration_record, offered, promise)
        else:
            target = self._target(journal, migration_record, offered, promise)
        self._targets[offer.migration] = target
        return target, first

    def _offered(self, offer: Offer) -> tuple[Offered | OfferedPod, Callable[[], tuple[NodeFacts, list[Refused]]]]:
        """What is offered, and how to find out whether it can be taken."""
        if OfferedPod.describes(offer.container):
            return OfferedPod.from_dict(offer.container, offer.name), partial(self.pods.weigh, offer)
        offered = Offered.from_dict(offer.container, offer.name)
        return offered, partial(self.inspection.weigh, offer, offered)

    async def _answer(self, channel: Channel, migration: str) -> None:
        target = self._targets.get(migration) or self._remembered(migration)
        if target is None:
            await channel.send(Unknown(migration))
            return
        if target.record.source != channel.peer:
            raise PeerUntrusted(f"{channel.peer} asks for a migration of {target.record.source}'s")
        await target.report(channel, asked=True)

    def _remembered(self, migration: str) -> Target | None:
        """The target's half of a migration that had ended before this agent began."""
        if not _ID.fullmatch(migration) or not (self.config.migrations / migration).exists():
            return None
        journal = Journal(self.config.migrations / migration)
        journal.close()
        if journal.facts.get("role") != "target" or journal.phase not in TARGET_ENDS:
            return None
        return self._target_again(journal, MigrationRecord.from_dict(journal.load_record() or journal.facts["record"]))

    def _report(self, error: PodferryError) -> None:
        cause = next(leaves(error.__cause__ or error))
        self.log.warning(
            "a conversation ended with an error", error=str(error), cause=repr(cause), evidence=error.evidence
        )


def _saved(directory: Path) -> Record | None:
    try:
        record: Record = json.loads((directory / "record.json").read_text())
    except (OSError, ValueError):
        return None
    return record
