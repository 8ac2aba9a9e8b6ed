"""A pod's connections to others on its target: both ends' namespaces rewrite addresses before the right to run passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from podferry.criu import connections
from podferry.engine.journal import Journal
from podferry.node.netlock import Namespace
from podferry.workload.pod import kept_connections
from podferry.workload.pod.cluster_port import Cluster, ConnectionPeers
from podferry.workload.pod.translations import PodTranslations, own_addresses
from podferry.workload.target_container import TargetContainer
from podferry.workload.threads import at_once

NETWORK_LOCK, TRANSLATION = "network-lock", "translation"
"""In the ledger."""


class ArrivingConnections:
    """Those of one pod. `here` is what this node knows of its pods' connections, `others` tells the other nodes."""

    def __init__(self, journal: Journal, cluster: Cluster, here: PodTranslations, others: ConnectionPeers) -> None:
        self._journal, self._cluster, self._here, self._others = journal, cluster, here, others

    async def connect(self, containers: Sequence[TargetContainer]) -> None:
        """Rewrite what the connections send and get, here and at the other ends. Until their sockets are restored nothing of them
        is let in: it would find no socket, and be answered with a reset. What has ended since is closed in the images."""
        first = containers[0].maker.made_already
        kept = await at_once(kept_connections.read, containers[0].incoming.images)
        if not kept or first is None:
            return
        network = Namespace.of(first.spec_json(), 0)
        self._journal.acquire(NETWORK_LOCK, **asdict(network), silent=True)
        await at_once(network.lock, {one.ends for one in kept}, False)
        own = {one.version: one for one in reversed(await at_once(own_addresses, network))}
        uid = self._journal.facts["target_pod"]
        migration, pods = await self._cluster.peers(self._journal.directory.name, {str(one.remote_now) for one in kept})
        found = [
            (pods[str(one.remote_now)], replace(one, local_now=own[one.local_now.version]))
            for one in kept
            if str(one.remote_now) in pods and one.local_now.version in own
        ]
        self._journal.acquire(TRANSLATION, uid=uid)
        await at_once(self._here.take, uid, network, [one for _, one in found], migration)
        missing = await self._others.tell(migration, [(pod, one.other) for pod, one in found])
        there = {one.ends for _, one in found} - {(local, remote) for remote, local in missing}
        ended = {one.ends for one in kept} - there
        for one in containers:
            await at_once(connections.close, one.incoming.images, ended)
