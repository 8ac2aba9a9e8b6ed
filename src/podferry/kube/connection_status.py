"""What a Migration's status says of its pod's connections: the agent lists them, the controller says whose the addresses are."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from podferry.core.connections import Fate, PeerKind
from podferry.kube.objects import IP_ADDRESS, ObjectPart

MOST_CONNECTIONS = 64
"""Of a pod that a status lists."""
_END = 64
"""Characters of an address with its port, or without."""


class AddressKind(StrEnum):
    """Whose an address is."""

    POD = "Pod"
    NODE = "Node"
    OUTSIDE = "Outside"


class ListedConnection(ObjectPart):
    """A connection of the pod's, and what a move makes of it."""

    protocol: Annotated[str, Field(description="tcp, or udp of a datagram socket that is connected.", max_length=8)]
    local: Annotated[str, Field(description="The pod's end, ADDRESS:PORT.", max_length=_END)]
    remote: Annotated[str, Field(description="The other end, as the pod knows it.", max_length=_END)]
    backend: Annotated[
        str,
        Field(
            description="Who is really at the other end, where a Service or another translation stands between and the "
            "connection tracking of the source's node knows it.",
            max_length=_END,
        ),
    ] = ""
    peer: Annotated[PeerKind, Field(description="inside: both ends are the pod's; or another.")]
    fate: Annotated[
        Fate,
        Field(
            description="lives; preserved: it lives on where status.peers has a pod with an agent for it, and is closed elsewhere; "
            "closed, at both ends; readdressed: a datagram socket goes on and sends from the new address, and "
            "answers to the old one are lost."
        ),
    ]
    why: Annotated[str, Field(description="Why, in words.", max_length=200)] = ""

    @property
    def address(self) -> str | None:
        """The address that is really at the other end, as Kubernetes writes it; None of a connection within the pod."""
        if self.peer is PeerKind.INSIDE:
            return None
        host = (self.backend or self.remote).rpartition(":")[0].strip("[]")
        try:
            return str(ipaddress.ip_address(host))
        except ValueError:  # an agent's word
            return None


class ConnectionPeer(ObjectPart):
    """Whose an address is at the other end of connections."""

    address: Annotated[str, Field(description="The address.", max_length=_END)]
    kind: Annotated[
        AddressKind,
        Field(
            description="Pod; Node: a node's own, and so its hostNetwork pods', too; or Outside: no pod's and no node's."
        ),
    ]
    name: Annotated[
        str,
        Field(description="The node's name; or the pod's, where it is in the Migration's namespace.", max_length=253),
    ] = ""
    agent: Annotated[bool, Field(description="Whether an agent of podferry runs on that node, or the pod's.")] = False
    uid: Annotated[str, Field(description="The pod's uid, where an agent runs on its node.", max_length=64)] = ""
    node: Annotated[str, Field(description="That node's name.", max_length=253)] = ""
    node_address: Annotated[
        str | None, Field(description="That node's InternalIP.", max_length=45, pattern=IP_ADDRESS)
    ] = None

    def __str__(self) -> str:
        where = "" if self.kind is AddressKind.OUTSIDE or self.agent else " (no agent there)"
        if self.kind is AddressKind.POD:
            return f"Pod {self.name or 'of another namespace'}{where}"
        return f"{self.kind} {self.name}".rstrip() + where


def addresses(found: Iterable[ListedConnection]) -> set[str]:
    """The addresses of others at the ends of connections."""
    return {address for one in found if (address := one.address) is not None}
