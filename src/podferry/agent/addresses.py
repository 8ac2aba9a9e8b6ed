"""Where the agents of other nodes listen. A node may be replaced under its name, so an address is looked up again in time."""

from __future__ import annotations

import time

import structlog
from anyio.abc import TaskGroup

from podferry.errors import PodferryError
from podferry.kube.client import NODES, Api
from podferry.wire.transport import parse_address
from podferry.workload.config import PORT

FRESH = 5.0
"""Seconds for which an address is used without another look."""


class Addresses:
    """Of nodes, by name. What was known is used until something newer is."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._known: dict[str, str] = {}
        self._looked: dict[str, float] = {}

    async def look_up(self, node: str) -> None:
        """Learn the address of `node`, unless that was done just now. Raises only where none is known."""
        if time.monotonic() - self._looked.get(node, -FRESH) < FRESH:
            return
        self._looked[node] = time.monotonic()
        try:
            found = await self._api.find(NODES, node)
        except PodferryError as error:
            if node not in self._known:
                del self._looked[node]
                raise
            structlog.get_logger().info("a node's address cannot be looked up now", of=node, error=str(error))
            return
        addresses = ((found or {}).get("status") or {}).get("addresses") or []
        inside = next((one["address"] for one in addresses if one["type"] == "InternalIP"), None)
        if inside:
            self._known[node] = f"[{inside}]:{PORT}" if ":" in inside else f"{inside}:{PORT}"

    def has(self, host: str) -> bool:
        """Whether a node that this one has had to do with has this IP address."""
        return any(parse_address(one)[0] == host for one in self._known.values())

    def of(self, node: str, tasks: TaskGroup) -> str | None:
        """HOST:PORT of the agent of `node`, as it is known now. Who asks is about to dial: `tasks` sees to it that the next try
        finds the address of a node that has another by now."""
        if time.monotonic() - self._looked.get(node, -FRESH) >= FRESH:
            tasks.start_soon(self._look_again, node)
        return self._known.get(node)

    async def _look_again(self, node: str) -> None:
        try:
            await self.look_up(node)
        except PodferryError as error:
            structlog.get_logger().info("a node's address cannot be looked up now", of=node, error=str(error))
