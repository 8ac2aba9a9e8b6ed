"""A finding of `podferry doctor` about one property of a machine: fine, limited, or blocked with a remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from podferry.errors import Refused


class Verdict(StrEnum):
    """The verdict on a property, from the best to the worst."""

    FINE = "fine"
    LIMITED = "limited"
    BLOCKED = "blocked"


@dataclass(frozen=True)
class Finding:
    """One property of a machine. `check` names it, `found` says what is there; `why` says what follows from it and
    `remedy` what to do, both empty where it is fine."""

    check: str
    verdict: Verdict
    found: str
    why: str = ""
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        return {
            "check": self.check,
            "verdict": self.verdict.value,
            "found": self.found,
            "why": self.why,
            "remedy": self.remedy,
        }


class MachineUnfit(Refused):
    """A machine cannot do what it is wanted for."""

    code = "PF114"


def fine(check: str, found: str) -> Finding:
    """A property that is as it should be."""
    return Finding(check, Verdict.FINE, found)


def limited(check: str, found: str, why: str, remedy: str = "") -> Finding:
    """A property that leaves something impossible, but not everything."""
    return Finding(check, Verdict.LIMITED, found, why, remedy)


def blocked(check: str, found: str, why: str, remedy: str) -> Finding:
    """A property with which nothing works."""
    return Finding(check, Verdict.BLOCKED, found, why, remedy)


def worst(findings: Iterable[Finding]) -> Verdict:
    """The verdict on the whole machine."""
    order = list(Verdict)
    return max((one.verdict for one in findings), key=order.index, default=Verdict.FINE)


def require(what: str, findings: Iterable[Finding]) -> None:
    """Raise `MachineUnfit`, saying that `what`, with every reason at once, where something is in the way."""
    against = [one for one in findings if one.verdict is Verdict.BLOCKED]
    if against:
        raise MachineUnfit(
            what,
            why="; ".join(f"{one.check}: {one.found}; {one.why}" for one in against),
            remedy="; ".join(dict.fromkeys(one.remedy for one in against)) + " (`podferry doctor` shows all of it)",
        )


def mebibytes(size: int) -> str:
    """A size for people."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size >> 20} MiB"
