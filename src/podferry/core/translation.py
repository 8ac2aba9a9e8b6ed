"""Connections that go on although one of their ends has another address now: what each end's node has to know of them."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from podferry.core.connections import TCP, Address, End, end_of

MOST = 2000
"""Connections of one workload that are kept, or that one peer's agent is told of: a message is bounded."""


@dataclass(frozen=True)
class Translation:
    """A connection as one of its namespaces sees it: the ends that its socket has, and the addresses that these have on the wire
    now. Ports are the same in both."""

    protocol: str
    local: End
    remote: End
    local_now: Address
    remote_now: Address

    @property
    def other(self) -> Translation:
        """The same connection as the other end's namespace sees it."""
        return Translation(self.protocol, self.remote, self.local, self.remote_now, self.local_now)

    @property
    def ends(self) -> tuple[End, End]:
        """By what its namespace knows it."""
        return self.local, self.remote

    @property
    def is_needed(self) -> bool:
        """Whether an address is another now."""
        return (self.local_now, self.remote_now) != (self.local.address, self.remote.address)

    def to_dict(self) -> dict[str, str]:
        """As it is written down, and sent."""
        return {
            "protocol": self.protocol,
            "local": str(self.local),
            "remote": str(self.remote),
            "local_now": str(self.local_now),
            "remote_now": str(self.remote_now),
        }

    @staticmethod
    def from_dict(told: Mapping[str, Any]) -> Translation:
        """What `to_dict` made. Raises `ValueError`, `KeyError` or `TypeError` for anything else."""
        local, remote = end_of(told["local"]), end_of(told["remote"])
        now = ipaddress.ip_address(told["local_now"]), ipaddress.ip_address(told["remote_now"])
        if told["protocol"] != TCP or len({one.version for one in (local.address, remote.address, *now)}) != 1:
            raise ValueError("no connection of TCP, or not all of its addresses are of one family")
        return Translation(TCP, local, remote, *now)
