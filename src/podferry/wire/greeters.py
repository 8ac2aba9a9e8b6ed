"""Who may be in the greeting at once: before it nobody is known but by the address, and silence costs an attacker nothing.

A connection that says nothing holds a slot until its deadline. So the slots are counted by address, the newest connection takes the
place of the oldest one of its address, and an address at which a peer is known to live takes the place of any other.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

MOST = 64
"""Connections in their greeting at once."""
OF_ONE_ADDRESS = 8
"""Of these from one IPv4 address, or one /64 of IPv6, which one host has to itself."""


@dataclass(eq=False)
class Slot:
    """A connection in its greeting. `makes_way` is called when it has lost its slot."""

    group: str
    known: bool
    lost: bool = False
    makes_way: Callable[[], object] = lambda: None


class Greeters:
    """The connections that are in their greeting, the oldest first. `known` says whether a peer is known to live at an address."""

    def __init__(self, known: Callable[[str], bool], most: int = MOST, of_one: int = OF_ONE_ADDRESS) -> None:
        self._known, self._most, self._of_one = known, most, of_one
        self._slots: list[Slot] = []

    def __len__(self) -> int:
        return len(self._slots)

    def enter(self, host: str) -> Slot | None:
        """A slot for a connection from `host`, for which another may be cancelled; None where all are held by known peers."""
        slot = Slot(group_of(host), self._known(plain(host)))
        same = [one for one in self._slots if one.group == slot.group]
        if len(same) >= self._of_one:
            self._make_way(same[0])
        elif len(self._slots) >= self._most:
            strangers = [one for one in self._slots if not one.known]
            if not strangers:
                return None
            if not slot.known:  # the address that holds most gives one up
                held = Counter(one.group for one in strangers)
                strangers.sort(key=lambda one: -held[one.group])
            self._make_way(strangers[0])
        self._slots.append(slot)
        return slot

    def leave(self, slot: Slot) -> None:
        """The greeting is over, or was cancelled."""
        if slot in self._slots:
            self._slots.remove(slot)

    def _make_way(self, slot: Slot) -> None:
        self._slots.remove(slot)
        slot.lost = True
        slot.makes_way()


def plain(host: str) -> str:
    """An address in its plainest form: an IPv4 address also where an IPv6 socket shows it. Names stay as they are."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def group_of(host: str) -> str:
    """What counts as one address."""
    try:
        address = ipaddress.ip_address(plain(host))
    except ValueError:
        return host
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)
