"""Which peers may offer what: asked before anything that an offer says is looked at.

A certificate proves which node speaks, and no more. In a cluster the Migration object decides: it names the pod, the node that the
pod leaves and this node, and it admits one offer (`Cluster.admit`). Stand-alone, the operator's list of peers decides.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

from podferry.errors import PeerUntrusted, Refused
from podferry.model import Mode
from podferry.wire.greeters import plain
from podferry.wire.messages import Offer
from podferry.wire.transport import parse_address
from podferry.workload.config import Config
from podferry.workload.offered import Offered, OfferedContainer, OfferedPod
from podferry.workload.pod.cluster_port import Cluster


def demand_peer(config: Config, cluster: Cluster | None, peer: str) -> None:
    """Raise `PeerUntrusted` for a node with which this one has nothing to do, whoever certified it.

    In a cluster the nodes come and go: there each offer is held to its Migration, and a `Query` to the migration's source.
    """
    if peer == config.node:
        raise PeerUntrusted(f"{peer} is this node's own name", remedy="issue each node a certificate of its own")
    if cluster is None and peer not in config.peers:
        raise PeerUntrusted(
            f"{config.node} does not know {peer}",
            why=f"its peers are {', '.join(sorted(config.peers)) or 'none'}",
            remedy=f"add {peer} to peers in the configuration of {config.node}",
        )


async def demand_allowed(config: Config, cluster: Cluster | None, peer: str, offer: Offer, offered: Offered) -> None:
    """Raise `Refused` unless `peer` may have this node take what it offers.

    In a cluster this uses up the one offer of a Migration.
    """
    if cluster is None:
        if isinstance(offered, OfferedPod):
            raise Refused(
                f"the agent of {config.node} does not belong to a Kubernetes cluster",
                remedy="run podferry's DaemonSet there",
            )
        return
    if isinstance(offered, OfferedContainer):
        raise Refused(
            f"{config.node} takes pods only",
            why="its agent belongs to a Kubernetes cluster, where a Migration says what may come",
            remedy="create a Migration of the pod",
        )
    await cluster.admit(offer.migration, offered.pod, peer, Mode(offer.mode))


def known_addresses(config: Config, cluster: Cluster | None) -> Callable[[str], bool]:
    """Whether a peer lives at an address, for who waits while many knock. Names in the configuration are looked up now: slow."""
    hosts = {host for address in config.peers.values() for host in _addresses_of(address)}

    def known(host: str) -> bool:
        return host in hosts or (cluster is not None and cluster.lives_at(host))

    return known


def _addresses_of(address: str) -> set[str]:
    with suppress(OSError):
        found = socket.getaddrinfo(*parse_address(address), type=socket.SOCK_STREAM)
        return {plain(str(one[4][0])) for one in found}
    return set()
