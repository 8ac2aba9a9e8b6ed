"""The inventory of a job, read from the kernel during its freeze on the source, and before its first instruction on the target.

An inventory names each thread by its pid and tid inside the container, and says of it attribute by attribute what there is. Two of
them are compared here, without I/O; `podferry.node.inventory` takes them and puts right what can be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from podferry.errors import PeerMisbehaved

Attributes = Mapping[str, str]
Inventory = Mapping[str, Attributes]
"""`PID/TID` to attributes; those of a whole process stand at its first thread."""

EXPECTED = {
    "start-time": "a restored process begins when it is restored, counted from the boot of another node",
    "Seccomp_filters": "the kernel counts what CRIU installs one by one",
}
"""Attributes that may differ, and why."""

OOM_SCORE = "oom_score_adj"
_RAISES = 1 << 21 | 1 << 23
"""CAP_SYS_ADMIN and CAP_SYS_NICE, without which a process cannot give itself more of the processor or of the disk."""
_REAL_TIME_IO = 1
_POLICY, _FLAGS, _NICE, _PRIORITY = range(4)


def may_be_given(attribute: str, value: str, has: Attributes) -> bool:
    """Whether a thread that has `has` on the target may be given `value`, which the source said: it never gets more than it could
    take by itself. Of the scheduler's, what decides about priority was restored by CRIU from images that were judged."""
    words = value.split()
    if attribute == "scheduler":
        own = has.get(attribute, "").split()
        decisive = (_POLICY, _NICE, _PRIORITY)
        return len(words) == len(own) and all(words[one] == own[one] for one in decisive)
    if attribute == "io-priority":
        raises = int(has.get("CapPrm", "0") or "0", 16) & _RAISES
        return value.isdecimal() and (int(value) >> 13 != _REAL_TIME_IO or raises != 0)
    return True


def encode(inventory: Inventory) -> bytes:
    """The inventory as it travels with the images."""
    return json.dumps(inventory, separators=(",", ":")).encode()


def decode(data: bytes) -> Inventory:
    """The inverse of `encode`. Raises `PeerMisbehaved` for anything else."""
    try:
        found = json.loads(data)
        whole = all(isinstance(one, str) for had in found.values() for pair in had.items() for one in pair)
    except (ValueError, AttributeError, RecursionError) as error:
        raise PeerMisbehaved.because("the peer's inventory is invalid", error) from error
    if not whole:
        raise PeerMisbehaved("the peer's inventory is invalid", why="it has a value that is no text")
    return dict(found)


def with_oom_score(inventory: Inventory, least: int) -> Inventory:
    """The inventory of a job whose processes with a lower oom_score_adj than `least` were raised to that."""

    def low(value: str) -> bool:
        return value.removeprefix("-").isdecimal() and int(value) < least

    return {
        thread: {**had, OOM_SCORE: str(least)} if low(had.get(OOM_SCORE, "")) else had
        for thread, had in inventory.items()
    }


@dataclass(frozen=True)
class Difference:
    """`thread` (`PID/TID`) had `before` of `attribute`, and has `after`. Empty: it has none."""

    thread: str
    attribute: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.attribute} of {self.thread}: was {self.before or 'nothing'}, is {self.after or 'nothing'}"


def differences(before: Inventory, after: Inventory) -> list[Difference]:
    """All unexpected differences between two inventories, in order."""
    return list(_differences(before, after))


def _differences(before: Inventory, after: Inventory) -> Iterator[Difference]:
    for thread in sorted({*before, *after}):
        if thread not in before or thread not in after:
            yield Difference(
                thread, "thread", *(str(thread in one) if thread in one else "" for one in (before, after))
            )
            continue
        had, has = before[thread], after[thread]
        for attribute in sorted({*had, *has} - EXPECTED.keys()):
            if had.get(attribute, "") != has.get(attribute, ""):
                yield Difference(thread, attribute, had.get(attribute, ""), has.get(attribute, ""))
