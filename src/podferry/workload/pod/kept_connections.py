"""Which connections of a pod go on when it moves: told on the source, from what the cluster says of their other ends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from podferry.core.connections import TCP, Fate, KernelSocket, OpenConnection, end_of, may_be_preserved
from podferry.core.limits import PARSED_IMAGE
from podferry.core.translation import MOST, Translation
from podferry.errors import Failed, PeerMisbehaved
from podferry.node.newfile import small_file
from podferry.workload.pod.cluster_port import Cluster, PeerPod
from podferry.workload.pod.translations import PodTranslations, settle_ended

IMAGE = "connections.json"
"""Its name among CRIU's images."""


class KeptConnections:
    """Those of the pod `uid`, which moves in the migration `id`; `wanted` are the addresses of their other ends at the check."""

    def __init__(self, id: str, uid: str, wanted: frozenset[str], cluster: Cluster, here: PodTranslations) -> None:
        self._id, self._uid, self._wanted, self._cluster, self._here = id, uid, wanted, cluster, here
        self._peers: Mapping[str, PeerPod] = {}

    async def ask(self) -> None:
        """Learn which pods are at the other ends, and how moves of theirs have ended: the job still runs."""
        await settle_ended(self._uid, self._cluster, self._here)
        if self._wanted:
            _, self._peers = await self._cluster.peers(self._id, self._wanted)

    def of(self, sockets: Sequence[KernelSocket]) -> tuple[Translation, ...]:
        """Of the frozen pod's sockets, all of which these are, the connections that go on. Raises `Failed` where another end of one
        is itself on its way."""
        known = self._here.of(self._uid)
        found = []
        for local, remote in may_be_preserved(sockets):
            there = known.get((local, remote))
            if there is not None and there.pending:
                raise Failed(
                    f"the other end of the connection {local} -> {remote} moves at the same time",
                    why=f"the Migration {there.pending.namespace}/{there.pending.name} has not ended",
                    remedy="migrate when it has",
                )
            now = there.now.remote_now if there else remote.address
            if str(now) in self._peers:
                found.append(Translation(TCP, local, remote, local.address, now))
        return tuple(found[:MOST])


def addresses(found: Sequence[OpenConnection]) -> Iterator[str]:
    """Where the other ends of those are that may go on."""
    for one in found:
        if one.fate is Fate.PRESERVED:
            yield str(end_of(one.backend or one.remote).address)


def encode(kept: Sequence[Translation]) -> bytes:
    """As it travels."""
    return json.dumps([one.to_dict() for one in kept]).encode()


def read(images: Path) -> tuple[Translation, ...]:
    """What came with these images. Raises `PeerMisbehaved` for anything else."""
    try:
        told = json.loads(small_file(images / IMAGE, PARSED_IMAGE))
        found = tuple(map(Translation.from_dict, told))
    except FileNotFoundError:
        return ()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PeerMisbehaved.because("not a list of connections", error) from error
    if len(found) > MOST:
        raise PeerMisbehaved("more connections than a move preserves", why=f"{len(found)}, and {MOST} are the most")
    return found
