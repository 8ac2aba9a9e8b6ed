"""Whose the addresses are at the other ends of a pod's connections.

An agent lists the connections, and may read neither pods nor nodes: the controller, which may, writes the answer into the
Migration's status. Who reads a Migration may not read other namespaces: a pod's name is told only in its own one.
"""

from __future__ import annotations

import ipaddress

from podferry.controller.whereabouts import address_of
from podferry.kube import status as store
from podferry.kube.client import NODES, PODS, Api, Json
from podferry.kube.connection_status import AddressKind, ConnectionPeer, addresses
from podferry.kube.migration import Migration

AGENTS = {"app.kubernetes.io/name": "podferry-agent"}
_OVER = ("Succeeded", "Failed")


async def with_peers(api: Api, migration: Migration) -> Migration:
    """The Migration, whose status says of each address at the other end of its pod's connections whose it is."""
    status = migration.status
    wanted, known = addresses(status.connections), {one.address: one for one in status.peers}
    if wanted <= known.keys():
        return migration
    lookup = _Lookup(api, migration.namespace)
    found = [known.get(one) or await lookup.whose(one) for one in sorted(wanted)]

    def told(now: Migration) -> bool:
        now.status.peers = found
        return not now.ended

    return await store.change(api, migration, told)


class _Lookup:
    """Asks the API server for one address after the other."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api, self._namespace = api, namespace
        self._nodes: dict[str, str] | None = None
        self._agents: dict[str, bool] = {}

    async def whose(self, address: str) -> ConnectionPeer:
        """Whose the address is now."""
        pod = await self._pod(address)
        if pod is None or pod["spec"].get("hostNetwork"):
            node = (await self._of_nodes()).get(address) or (pod and pod["spec"].get("nodeName"))
            if not node:
                return ConnectionPeer(address=address, kind=AddressKind.OUTSIDE)
            return ConnectionPeer(address=address, kind=AddressKind.NODE, name=node, agent=await self._has_agent(node))
        about, node = pod["metadata"], str(pod["spec"].get("nodeName", ""))
        name = about["name"] if about["namespace"] == self._namespace else ""
        if not await self._has_agent(node):
            return ConnectionPeer(address=address, kind=AddressKind.POD, name=name)
        return ConnectionPeer(
            address=address,
            kind=AddressKind.POD,
            name=name,
            agent=True,
            uid=about["uid"],
            node=node,
            node_address=await address_of(self._api, node),
        )

    async def _pod(self, address: str) -> Json | None:
        """The pod that has the address. API servers select by a pod's first address alone: of the other family all are looked
        at, page by page."""
        found, _ = await self._api.list(PODS, fields={"status.podIP": address})
        if (one := next(filter(_lives, found), None)) is not None:
            return one
        if ipaddress.ip_address(address).version == 4:
            return None
        async for page, _ in self._api.pages(PODS):
            for one in page:
                if _lives(one) and address in _addresses(one.get("status") or {}, "podIPs", "ip"):
                    return one
        return None

    async def _of_nodes(self) -> dict[str, str]:
        if self._nodes is None:
            self._nodes = {}
            async for page, _ in self._api.pages(NODES):
                for one in page:
                    named = dict.fromkeys(
                        _addresses(one.get("status") or {}, "addresses", "address"), one["metadata"]["name"]
                    )
                    self._nodes |= named
        return self._nodes

    async def _has_agent(self, node: str) -> bool:
        if node not in self._agents:
            found, _ = await self._api.list(PODS, labels=AGENTS, fields={"spec.nodeName": node})
            self._agents[node] = any(map(_lives, found))
        return self._agents[node]


def _lives(pod: Json) -> bool:
    return (pod.get("status") or {}).get("phase") not in _OVER


def _addresses(status: Json, field: str, key: str) -> set[str]:
    return {str(one.get(key)) for one in status.get(field) or []}
