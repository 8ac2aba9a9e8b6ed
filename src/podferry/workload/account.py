"""What this node has promised to migrations that are on their way to it: memory, the directory for memory on its way, and disk.

What is free says little as long as others are still sending what they were promised. So each promise is written down before an
offer is accepted and held until the migration has ended here; of what is free, the part that others have not used yet is theirs. A
job may grow on its way: then its promise is raised, if there is room, and its migration ends if there is none.

The promises are in the journals of the migrations, so that an agent that was restarted holds to what its predecessor promised.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from podferry.core.facts import ContainerFacts
from podferry.core.preflight import DISK_RESERVE, MEMORY_RESERVE, NoRoom
from podferry.model import Mode
from podferry.wire.messages import Offer
from podferry.workload.config import Config
from podferry.workload.nodefacts import memory_available

STEP = 64 << 20
"""Bytes by which a promise is raised at least: not with every page."""


@dataclass(frozen=True)
class Room:
    """Bytes of memory, of the directory for memory on its way (`run`), and of disk (`state`)."""

    memory: int = 0
    run: int = 0
    disk: int = 0

    def __add__(self, other: Room) -> Room:
        return Room(self.memory + other.memory, self.run + other.run, self.disk + other.disk)

    def less(self, other: Room) -> Room:
        """What is left of it, in each kind at least nothing."""
        return Room(max(0, self.memory - other.memory), max(0, self.run - other.run), max(0, self.disk - other.disk))

    def to_dict(self) -> dict[str, int]:
        """As a journal keeps it."""
        return {one.name: getattr(self, one.name) for one in fields(Room)}

    @staticmethod
    def from_dict(data: Mapping[str, Any] | None) -> Room:
        """The inverse of `to_dict`; nothing for an older journal, which has no promise."""
        return Room(**{one.name: int((data or {}).get(one.name, 0)) for one in fields(Room)})


RESERVE = Room(MEMORY_RESERVE, 0, DISK_RESERVE)
"""What is kept free whatever comes."""
NAMES = {
    "memory": ("memory", "free memory there, or choose another node"),
    "run": (
        "room in the directory of its agent for memory on its way (`run`, /run/podferry as a rule)",
        "make its tmpfs larger (docs/agent.md), use postcopy, or choose another node",
    ),
    "disk": ("disk", "free disk space there, or choose another node"),
}


class Promise:
    """What one migration was promised, and how much of it has been used."""

    def __init__(self, account: Account, id: str, room: Room) -> None:
        self._account, self.id, self.room = account, id, room
        self.used = Room()
        self.most = Room()

    @property
    def open(self) -> Room:
        """What may still come of it. What was used once and given back has become the job's own memory."""
        return self.room.less(self.most)

    def take(self, *, run: int = 0, disk: int = 0) -> None:
        """So many bytes more have arrived (fewer, if negative). Raises `NoRoom` where that is more than there is room for."""
        self.used += Room(run, run, disk)
        self.most = Room(*(max(one, two) for one, two in zip(_values(self.most), _values(self.used), strict=True)))
        beyond = Room(*(STEP if more else 0 for more in _values(self.most.less(self.room))))
        if any(_values(beyond)):
            self._account.demand(beyond, but=self.id)
            self.room = Room(*map(max, _values(self.room), _values(self.most + beyond)))


class Account:
    """The promises of one node. `free` says what there is now."""

    def __init__(self, free: Callable[[], Room]) -> None:
        self._free = free
        self._promises: dict[str, Promise] = {}

    def promise(self, id: str, room: Room) -> Promise:
        """Promise `room` to the migration `id`. Raises `NoRoom`, which says what was asked, is free, and is promised to others."""
        self.demand(room, but=id)
        return self.restore(id, room)

    def restore(self, id: str, room: Room) -> Promise:
        """Hold to what an earlier agent promised, whether or not there is room. How much was used of it nobody knows any more."""
        promise = self._promises[id] = Promise(self, id, room)
        return promise

    def release(self, id: str) -> None:
        """The migration has ended here, or never began."""
        self._promises.pop(id, None)

    def to_dict(self) -> dict[str, dict[str, int]]:
        """What is promised, by migration."""
        return {id: one.room.to_dict() for id, one in self._promises.items()}

    def demand(self, room: Room, *, but: str = "") -> None:
        """Raise `NoRoom` unless there is room for so much more, beside what all but one were promised."""
        free, others = self._free(), [one.open for id, one in self._promises.items() if id != but]
        promised = sum(others, Room())
        for name, (what, remedy) in NAMES.items():
            asked, there, theirs, kept = (getattr(one, name) for one in (room, free, promised, RESERVE))
            if asked and asked + kept > there - theirs:
                raise NoRoom(
                    f"the target has too little {what}",
                    why=f"the job needs {_mib(asked + kept)}; {_mib(there)} are free, and {_mib(theirs)} of that are promised to "
                    f"{len(others)} other migrations",
                    remedy=remedy if not theirs else f"wait until the other migrations have ended; or {remedy}",
                )


def free_here(config: Config) -> Room:
    """What there is on this node now."""
    return Room(memory_available(), shutil.disk_usage(config.run).free, shutil.disk_usage(config.state).free)


def needed(offer: Offer) -> Room:
    """What a job needs here by what its source says of it. It is held to that, and has to ask for what is beyond."""
    if "container" not in offer.facts:
        return Room(offer.memory_bytes, offer.memory_bytes, offer.upper_bytes)
    facts = ContainerFacts.from_dict(offer.facts["container"])
    in_images = facts.shared + facts.tmpfs
    # Post-copy fetches memory as it is filled; CRIU's images wait there in every mode.
    waits = in_images + (0 if Mode(offer.mode) is Mode.POSTCOPY else facts.anonymous)
    return Room(facts.anonymous + in_images, waits, facts.upper)


def _values(room: Room) -> tuple[int, int, int]:
    return room.memory, room.run, room.disk


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"
