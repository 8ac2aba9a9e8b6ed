"""The addresses of other nodes' agents, taken from Migrations: an agent may not read Node objects.

A node may be replaced under its name. The controller writes its new address into each Migration that has not ended; one that has
ended says where the node was then, which only counts where nothing else is known.
"""

from __future__ import annotations

from podferry.kube.migration import Migration
from podferry.wire.transport import parse_address
from podferry.workload.config import PORT


class Addresses:
    """Of nodes, by name. What was known is used until something newer is."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def see(self, migration: Migration) -> None:
        """Learn the addresses of a Migration's nodes."""
        status = migration.status
        ends = ((status.source_node, status.source_address), (status.target_node, status.target_address))
        for node, host in (*ends, *((one.node, one.node_address) for one in status.peers)):
            if node and host and not (migration.ended and node in self._known):
                self._known[node] = f"[{host}]:{PORT}" if ":" in host else f"{host}:{PORT}"

    def has(self, host: str) -> bool:
        """Whether a node that this one has had to do with has this IP address."""
        return any(parse_address(one)[0] == host for one in self._known.values())

    def of(self, node: str) -> str | None:
        """HOST:PORT of the agent of `node`, as it is known now."""
        return self._known.get(node)
