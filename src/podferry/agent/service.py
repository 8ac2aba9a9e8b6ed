"""podferry-agent: what runs on a node, and what may be asked of it."""

from __future__ import annotations

import json
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
from podferry.agent.admission import known_addresses
from podferry.agent.connection_peers import Translator
from podferry.agent.control import Emit
from podferry.agent.migrations import KEEP_RECORDS, Migrations, inspected, runtime_of_pods
from podferry.agent.peer_requests import PeerRequests
from podferry.agent.pod_requests import PodRequests
from podferry.core.connections import TOLD
from podferry.core.connections import told as told_of_connections
from podferry.core.facts import NodeFacts
from podferry.core.phases import TARGET_MAY_RUN, SourceEvent
from podferry.core.precopy import PreCopyPolicy
from podferry.engine.inbox import Inbox
from podferry.engine.journal import forget_old, journals
from podferry.engine.order import Order
from podferry.engine.rehearsal import REHEARSAL, Rehearsal, told
from podferry.engine.side import Side
from podferry.engine.source import Source
from podferry.engine.target import Target
from podferry.errors import PeerLost, PodferryError, Refused, UsageError, leaves
from podferry.fs.private import private_directory
from podferry.model import Connections, Mode
from podferry.node.containerd import Containerd
from podferry.wire.channel import Channel
from podferry.wire.messages import Abort, Accept, Refuse
from podferry.wire.tls import Credentials
from podferry.wire.transport import dial, listen, serve
from podferry.workload.account import Account, free_here
from podferry.workload.config import Config
from podferry.workload.kinds.alone import ContainersAlone
from podferry.workload.kinds.kubelet_pods import KubeletPods
from podferry.workload.pod.cluster_port import Cluster
from podferry.workload.threads import run

FORGET_EVERY = 3600.0  # seconds

Record = dict[str, Any]


class Agent:
    """The agent of one node."""

    def __init__(self, config: Config, cluster: Cluster | None = None) -> None:
        self.config, self._cluster = config, cluster
        self.log = structlog.get_logger().bind(node=config.node)
        self.credentials = Credentials.load(config.certificates)
        self.alone = ContainersAlone(config, Containerd(config.containerd, config.namespace))
        pods = KubeletPods(config, runtime_of_pods(config), cluster, lambda: self.translator)
        self._oversee(pods, Account(partial(free_here, config)))
        self._tasks: TaskGroup

    def _oversee(self, pods: KubeletPods, account: Account) -> None:
        self.migrations = Migrations(self.config, self.alone, pods, account, start=self._start, dial=self._dial)
        self.pods = PodRequests(self.migrations)
        self.translator: Translator | None = None
        if self._cluster is not None:
            here, leaves = pods.translations, self.migrations.leaves
            self.translator = Translator(self.config.node, self._cluster, here, self._dial, leaves)
        self.peers = PeerRequests(self.config, self._cluster, self.migrations, self._start, self.translator)

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
            self.migrations.recover()
            self._start(self._forget_old)
            if self._cluster is not None:
                self._start(partial(run, self.migrations.pods.sweep))
            if self.translator is not None:
                self._start(self.translator.run)
            known = await run(known_addresses, self.config, self._cluster)
            serving = partial(serve, listener, self.credentials, self.peers.converse, self._report, known=known)
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

    # What people ask.

    async def op_ps(self, emit: Emit) -> list[Record]:
        """The containers of this node."""
        return await run(self.alone.containers)

    async def op_node(self, emit: Emit) -> Record:
        """This node and its agent."""
        facts = await run(self.migrations.kind(pod=bool(self.config.crio)).node_facts)
        return {"node": self.config.node, "version": __version__, "peers": sorted(self.config.peers), **facts.to_dict()}

    async def op_check(
        self,
        emit: Emit,
        name: str,
        to: str,
        *,
        rehearse: bool = False,
        max_freeze_s: float | None = None,
        connections: str = Connections.CLOSE,
    ) -> Record:
        """Could this container move there? Nothing is touched, unless it is to be rehearsed as well."""
        asked = _connections(connections)
        answer = await self._check(name, to, asked)
        if rehearse and answer["movable"]:
            order = replace(REHEARSAL, max_freeze=max_freeze_s or REHEARSAL.max_freeze, connections=asked)
            source = self._set_out(name, to, order, Rehearsal)
            await source.ended.wait()
            answer |= told(source.record.to_dict())
        return answer

    async def _check(self, name: str, to: str, connections: Connections) -> Record:
        self._check_names(name, to)
        view = await inspected(partial(self.alone.view, name), connections)
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
        if (lost := view.lost(connections)) is not None:
            reasons.append(lost)
        return {
            "name": name,
            "source": self.config.node,
            "target": to,
            "movable": not reasons,
            "refusals": [reason.to_dict() for reason in reasons],
            "warnings": view.warnings(Mode.LIVE, target),
            **told_of_connections(view.connections, TOLD),
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
        connections: str = Connections.CLOSE,
    ) -> Record:
        """Move a container. Goes on if whoever asked hangs up."""
        if mode not in {str(one) for one in Mode}:
            raise UsageError(f"there is no mode {mode!r}", why=f"there are {', '.join(Mode)}")
        order = Order(
            Mode(mode),
            timeout=timeout_s or Order.timeout,
            bandwidth=bandwidth,
            max_freeze=max_freeze_s,
            connections=_connections(connections),
            policy=PreCopyPolicy(
                max_downtime=(max_downtime_ms or PreCopyPolicy.max_downtime * 1e3) / 1e3,
                throttle=allow_throttle,
                postcopy=allow_postcopy,
            ),
        )
        self._check_names(name, to)
        source = self._set_out(name, to, order)
        events, inbox = anyio.create_memory_object_stream[Record](1024)

        def receive(event: Record) -> None:
            if events.statistics().current_buffer_used < 1024:
                events.send_nowait(event)

        stop = source.record.listen(receive)
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
        return source.record.to_dict()

    async def op_status(self, emit: Emit, id: str | None = None) -> list[Record]:
        """The record of one migration, or of all that this node keeps, the oldest first."""
        found = []
        for directory in journals(self.config.migrations):
            if id is None or directory.name == id:
                live: Side[Any, Any] | None = self.migrations.sources.get(
                    directory.name
                ) or self.migrations.targets.get(directory.name)
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
        if id in self.migrations.targets:
            return await self._resolve_target(self.migrations.targets[id], run_on)
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

    def _set_out(self, name: str, to: str, order: Order, half: type[Source] = Source) -> Source:
        """A rehearsal is offered, and tracked, as the move would be that it stands for."""
        self.migrations.refuse_second(name)
        return self.migrations.set_out(
            f"{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}",
            name,
            to,
            self.alone,
            partial(self.alone.view, name),
            order=order,
            half=half,
            mode=order.mode,
            offered_as=Mode.LIVE if issubclass(half, Rehearsal) else order.mode,
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
        if id not in self.migrations.sources:
            raise UsageError(f"this node is not the source of a migration {id}", remedy="podferry status lists them")
        return self.migrations.sources[id]

    def _dial(self, node: str) -> AbstractAsyncContextManager[Channel]:
        address = self.config.peers.get(node) or (self._cluster and self._cluster.address(node))
        if not address:
            raise PeerLost(f"cannot reach {node}", why="this agent knows no node of that name")
        return dial(node, address, self.credentials)

    def _report(self, error: PodferryError) -> None:
        cause = next(leaves(error.__cause__ or error))
        self.log.warning(
            "a conversation ended with an error", error=str(error), cause=repr(cause), evidence=error.evidence
        )


def _connections(asked: str) -> Connections:
    known = [one for one in Connections if one is not Connections.PRESERVE]
    if asked == Connections.PRESERVE:
        raise UsageError(
            f"connections {asked} is for pods",
            why="only Kubernetes knows who is at the other ends of a workload's connections",
            remedy=f"ask with {' or '.join(known)}",
        )
    if asked not in known:
        raise UsageError(f"connections cannot be {asked!r}", why=f"there are {', '.join(known)}")
    return Connections(asked)


def _saved(directory: Path) -> Record | None:
    try:
        record: Record = json.loads((directory / "record.json").read_text())
    except (OSError, ValueError):
        return None
    return record
