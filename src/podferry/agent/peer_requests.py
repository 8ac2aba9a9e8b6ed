"""Requests of other nodes' agents: to accept a workload, or to tell the outcome of a migration."""

from __future__ import annotations

from functools import partial

from podferry.agent.admission import demand_allowed, demand_peer
from podferry.agent.connection_peers import Translator
from podferry.agent.migrations import MIGRATION, Migrations, Start
from podferry.engine.target import Target
from podferry.errors import Failed, PeerMisbehaved, PeerUntrusted, PodferryError, Refused
from podferry.wire.channel import Channel
from podferry.wire.frames import Data
from podferry.wire.messages import Abort, Accept, ErrorReport, GaveUp, Message, Offer, Query, Refuse, Translate, Unknown
from podferry.workload.account import needed
from podferry.workload.config import Config
from podferry.workload.offered import decode
from podferry.workload.pod.cluster_port import Cluster
from podferry.workload.threads import run


class PeerRequests:
    """Conversations that peers begin."""

    def __init__(
        self,
        config: Config,
        cluster: Cluster | None,
        migrations: Migrations,
        start: Start,
        translator: Translator | None = None,
    ) -> None:
        self._config, self._cluster, self._migrations, self._start = config, cluster, migrations, start
        self._translator = translator
        self._weighed: set[str] = set()

    async def converse(self, channel: Channel) -> None:
        """One, to its end. Raises what ends it early."""
        demand_peer(self._config, self._cluster, channel.peer)
        first = await channel.receive()
        match first:
            case Offer():
                await self._receive(channel, first)
            case Query():
                await self._answer(channel, first.migration)
            case Translate():
                if self._translator is None:
                    raise Refused(f"the agent of {self._config.node} does not belong to a Kubernetes cluster")
                await self._translator.answer(channel, first)
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
            if offer.migration not in self._migrations.targets:
                self._migrations.account.release(offer.migration)
        if accepted is not None:
            target, first = accepted
            self._start(partial(self._migrations.hold_promise, target))
            await target.converse(channel, first, self._start, offer.timeout_s)

    async def _weigh(self, channel: Channel, offer: Offer) -> tuple[Target, Message | Data] | None:
        """Answer an offer. What was accepted and is really sent has a journal of its own when this returns."""
        reasons: list[PodferryError] = []
        migrations = self._migrations
        try:
            if not MIGRATION.fullmatch(offer.migration) or migrations.directory(offer.migration).exists():
                raise PeerMisbehaved(
                    f"{offer.migration!r} cannot be a migration's name, or is one's that was here before"
                )
            offered = decode(offer.container, offer.name)
            migrations.refuse_second(offer.name)
            await demand_allowed(self._config, self._cluster, channel.peer, offer, offered)
            facts, refused = await run(partial(migrations.weigh, offer, offered))
            reasons += refused
            if not reasons:
                promise = migrations.account.promise(offer.migration, needed(offer))
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
        return migrations.take(offer, channel.peer, offered, promise), first

    async def _answer(self, channel: Channel, migration: str) -> None:
        target = self._migrations.targets.get(migration) or self._migrations.remembered(migration)
        if target is None:
            await channel.send(Unknown(migration))
            return
        if target.record.source != channel.peer:
            raise PeerUntrusted(f"{channel.peer} asks for a migration of {target.record.source}'s")
        await target.report(channel, asked=True)
