"""At which addresses the two nodes of a Migration are: its status says so, since agents read no nodes."""

from __future__ import annotations

import re

from podferry.kube import status as store
from podferry.kube.client import NODES, Api, Json
from podferry.kube.migration import Migration
from podferry.kube.objects import IP_ADDRESS
from podferry.kube.paths import NameRefused


async def address_of(api: Api, node: str | None) -> str | None:
    """The InternalIP of a node; None where it has none, or is not there, as no node of a name that no object can have is."""
    try:
        found = await api.find(NODES, node) if node else None
    except NameRefused:
        return None
    addresses = ((found or {}).get("status") or {}).get("addresses") or []
    inside = (str(one["address"]) for one in addresses if one["type"] == "InternalIP")
    return next((one for one in inside if re.fullmatch(IP_ADDRESS, one)), None)


async def kept_up(api: Api, migration: Migration) -> Migration:
    """The Migration, whose status says where its nodes are now: one may have been replaced under its name, or be gone."""
    status = migration.status
    now = await address_of(api, status.source_node), await address_of(api, status.target_node)
    if now == (status.source_address, status.target_address):
        return migration

    def moved(newest: Migration) -> bool:
        newest.status.source_address, newest.status.target_address = now
        return not newest.ended

    return await store.change(api, migration, moved)


def addresses_of(pod: Json) -> list[str]:
    """A pod's addresses, of both families where it has them."""
    found = (str(one.get("ip")) for one in (pod.get("status") or {}).get("podIPs") or [])
    return [one for one in found if re.fullmatch(IP_ADDRESS, one)]
