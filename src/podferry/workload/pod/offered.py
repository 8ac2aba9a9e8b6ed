"""What the source tells the target of a pod: which containers and volumes are on their way. Everything else of the pod, the
target's kubelet makes after its own object; so nothing of it need be believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from podferry.core.strict import AllowedRange, NotStrict, from_json, to_json
from podferry.criu.checkpoint import FLAGS
from podferry.errors import PeerMisbehaved
from podferry.node.cri import CONTAINER_NAME, Volume
from podferry.node.pod_records import UID
from podferry.workload.numbers import MOST_CONTAINERS
from podferry.workload.pod.ports import PodName

LAST_WORDS = "podferry-last-words"
"""Among CRIU's images: what a container has written of its termination message so far."""
PAYLOADS = "podferry-payloads"
"""Among the first container's: payloads of volumes in which something is open (`podferry.node.payloads`)."""


@dataclass(frozen=True)
class PodPart:
    """A container of the pod. `id` is its own on the source; `flags` are those of the dump and the restore."""

    name: Annotated[str, AllowedRange(1, 63)]
    id: Annotated[str, AllowedRange(1, 200)]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class OfferedPod:
    """A pod as it is offered. `containers` are in the order in which the kubelet starts them."""

    pod: PodName
    containers: Annotated[tuple[PodPart, ...], AllowedRange(1, MOST_CONTAINERS)]
    volumes: Annotated[tuple[Volume, ...], AllowedRange(0, 128)]

    def for_journal(self) -> dict[str, Any]:
        """As a journal keeps it: names alone."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """As it travels; `from_dict` is its inverse."""
        data: dict[str, Any] = to_json(self)
        return data

    @staticmethod
    def describes(data: dict[str, Any]) -> bool:
        """Whether an offer is of a pod, and not of a container alone."""
        return "pod" in data

    @staticmethod
    def from_dict(data: dict[str, Any], name: str) -> OfferedPod:
        """Decode an offer of the pod `name` (NAMESPACE/NAME). Raises `PeerMisbehaved` for what no source of ours sends."""
        try:
            offered = from_json(OfferedPod, data)
        except NotStrict as error:
            raise PeerMisbehaved.because("not an offer of a pod", error) from error
        names = [one.name for one in offered.containers]
        if str(offered.pod) != name or not UID.fullmatch(offered.pod.uid):
            raise PeerMisbehaved("an offer names one pod and holds another", why=f"{name!r}, {offered.pod}")
        if len(set(names)) < len(names) or not all(map(CONTAINER_NAME.fullmatch, names)):
            raise PeerMisbehaved("not an offer of a pod", why=f"containers {names}")
        if len(set(offered.volumes)) < len(offered.volumes):
            raise PeerMisbehaved("not an offer of a pod", why="a volume is listed twice")
        if not all(set(one.flags) <= FLAGS for one in offered.containers):
            raise PeerMisbehaved("not an offer of a pod", why="flags that are none")
        return offered
