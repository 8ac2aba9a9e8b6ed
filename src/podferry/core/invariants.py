"""The numbered rules as predicates over what one agent can see, checked after every step that could break one.

The idea of invariants as predicates over a snapshot, with a metric each, is gke-labs/pod-migration's (`docs/invariants.md`).
"""

from __future__ import annotations

from dataclasses import dataclass

from podferry.core.phases import SOURCE_MAY_RUN, TARGET_MAY_RUN, SourcePhase, TargetPhase


@dataclass(frozen=True)
class Sight:
    """A migration as one agent sees it at one moment.

    `executing` is true when tasks of the container exist on this node and are not frozen; `restored` when they came out of a
    restore; `ledger` names what is still held. What is not asked, because the answer could break no rule, is as its default.
    """

    phase: SourcePhase | TargetPhase
    executing: bool = False
    restored: bool = True
    ended: bool = False
    ledger: tuple[str, ...] = ()


def broken(sight: Sight) -> list[str]:
    """The rules that do not hold in `sight`, as `I1: why`."""
    rules = []
    if isinstance(sight.phase, SourcePhase):
        if sight.executing and sight.phase not in SOURCE_MAY_RUN:
            rules.append(f"I1: the source executes the job in phase {sight.phase}, after the right to run has passed")
    elif sight.executing:
        if sight.phase not in TARGET_MAY_RUN:
            rules.append(f"I1: the target executes the job in phase {sight.phase}, before the right to run has passed")
        if not sight.restored:
            rules.append("I2: the target started the container cold")
    if sight.ended and sight.ledger:
        rules.append(f"I5: left behind: {', '.join(sight.ledger)}")
    return rules
