"""When to stop copying: pure functions that look at what the rounds brought and say what to do next, and why.

The rule aims at `max_downtime`: of it, `LAST_PAGES_SHARE` may be spent on the last pages, the rest belongs to dump and restore.
It judges the rounds since the circumstances changed last: since the beginning, since the job was slowed down, since the target
was prepared. While the best of the last `PATIENCE` rounds leaves clearly less than the best before, copying goes on: one
noisy round decides nothing. Where it no longer does, the job writes as fast as the link carries, and only slowing the job,
post-copy or giving up will end it. What plainly grows is not waited for before the job is slowed.

Worked examples (link 118 MB/s, max_downtime 200 ms, so 50 ms or 5.9 MB for the last pages; a round sends what the one before
left, the first 1000 MB):

| left after each round, MB | quota | allowed | decision |
|---|---|---|---|
| 5 | - | - | cut over: what is left takes 42 ms |
| 450, 190 | - | - | go on: each round leaves less |
| 60, 20, 9, 30, 8 | - | - | go on: one noisy round |
| 60, 20, 9, 10, 9, 9, 10, 9 | 100 % | throttle | throttle to 56 %: five rounds, and no better |
| 1000 | - | - | go on: one round says little |
| 1000, 1000 | 100 % | throttle | throttle to 20 %: everything is written again, nobody knows how often |
| 930, 850 | 100 % | throttle | throttle to 55 %, so that the job writes half of what the link carries |
| 930, 850 | 5 % | throttle | go on: nothing slower is left, but patience |
| 900, 910, 905, 900, 910, 905 | 5 % | throttle | give up |
| 900, 910, 905, 900, 910, 905 | 100 % | postcopy | switch to post-copy |
| 900, 910, 905, 900, 910, 905 | 100 % | nothing | give up: writes 117 MB/s, link carries 118 MB/s |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

PAGE = 4096
"""Bytes in which memory is counted here and on the wire, whatever a page of a node is (`podferry.memory.kernel.page_size`)."""
LAST_PAGES_SHARE = 0.25
CLEARLY_LESS = 0.9
PATIENCE = 5
HEADROOM = 0.5
"""A throttled job should write this share of what the link carries: then each round halves what is left."""
STEEPEST, GENTLEST = 0.2, 0.7
"""How much of its quota a job keeps at one step, at least and at most."""
LEAST_QUOTA = 0.05
GUESSED_RATE = 100e6
TYPICAL_ROUND = 4 << 20
"""A round of fewer bytes measures the way of a message, not the rate of the link."""
RECENT = 3
PACE = 0.1
SHORTEST_WAIT, LONGEST_WAIT = 0.05, 1.0


class Step(StrEnum):
    """The action after a pre-copy round."""

    CUT_OVER = "cut over"
    GO_ON = "go on"
    THROTTLE = "throttle"
    POSTCOPY = "postcopy"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Round:
    """One pass: what it sent (`bytes` on the wire), how long it took, how long (both in seconds) the copying had rested before,
    and what had been written again, since the round before, when it ended."""

    number: int
    pages: int
    bytes: int
    seconds: float
    pending_bytes: int
    rested: float = 0.0

    @property
    def memory_bytes(self) -> int:
        """How much memory the round carried."""
        return self.pages * PAGE

    @property
    def dirty_rate(self) -> float:
        """Bytes that the job wrote anew per second, as far as pages written twice do not hide them."""
        during = self.seconds + self.rested
        return self.pending_bytes / during if during > 0 else 0.0


@dataclass(frozen=True)
class PreCopyPolicy:
    """The options and the aim that the user has set. `max_downtime` is in seconds."""

    max_downtime: float = 0.2
    throttle: bool = True
    postcopy: bool = False
    max_rounds: int = 30


@dataclass(frozen=True)
class Decision:
    """The next action and its reason; `quota` is the share of its processor time that a throttled job keeps."""

    step: Step
    reason: str
    quota: float = 1.0


def link_rate(rounds: Sequence[Round]) -> float:
    """Bytes of memory a second that the last rounds of any size carried; 0 where there was none.

    It is memory that counts, not what became of it on the wire: what compresses well is sent faster.
    """
    telling = [one for one in rounds if one.memory_bytes >= TYPICAL_ROUND][-RECENT:]
    seconds = sum(one.seconds for one in telling)
    return sum(one.memory_bytes for one in telling) / seconds if seconds > 0 else 0.0


def decide(rounds: Sequence[Round], policy: PreCopyPolicy, *, rate: float, quota: float = 1.0) -> Decision:
    """Decide the action after the last of `rounds`, which are those since the circumstances changed.

    `rate` is what the link carries, in bytes of memory a second (0 where that is not known: then a gigabit link is assumed);
    `quota` is the share of processor time that the job has now.
    """
    last, rate = rounds[-1], rate or GUESSED_RATE
    left = last.pending_bytes / rate
    if left <= policy.max_downtime * LAST_PAGES_SHARE:
        return Decision(Step.CUT_OVER, f"what is left takes {left * 1e3:.0f} ms", quota)
    record = f"the job writes {last.dirty_rate / 1e6:.0f} MB/s and the link carries {rate / 1e6:.0f} MB/s"
    stuck = len(rounds) >= policy.max_rounds or _no_better(rounds)
    if policy.throttle and quota > LEAST_QUOTA and (stuck or _plainly_grows(rounds)):
        slower = _slower(last, rate, quota)
        return Decision(Step.THROTTLE, f"{record}: slowing the job to {slower:.0%} of its speed", slower)
    if not stuck:
        return Decision(Step.GO_ON, f"{left * 1e3:.0f} ms are left; {record}", quota)
    if policy.postcopy:
        return Decision(Step.POSTCOPY, f"{record}: fetching the rest after the cut-over", quota)
    return Decision(Step.GIVE_UP, f"cannot converge: {record}", quota)


def rest(rounds: Sequence[Round], rate: float) -> float:
    """Seconds to rest before the next round while the target is not prepared: long enough that rounds do not follow each other
    for nothing, and so short that the link can carry in `PACE` what is written meanwhile."""
    dirty = rounds[-1].dirty_rate if rounds else 0.0
    return min(max(PACE * (rate or GUESSED_RATE) / dirty, SHORTEST_WAIT), LONGEST_WAIT) if dirty else LONGEST_WAIT


def _no_better(rounds: Sequence[Round]) -> bool:
    """True when the best of the last `PATIENCE` rounds did not leave clearly less than the best before them."""
    if len(rounds) <= PATIENCE:
        return False
    before, lately = (min(one.pending_bytes for one in part) for part in (rounds[:-PATIENCE], rounds[-PATIENCE:]))
    return lately > CLEARLY_LESS * before


def _plainly_grows(rounds: Sequence[Round]) -> bool:
    """True when two rounds of telling size, one after the other, left about as much as they had sent, or more."""
    return len(rounds) >= 2 and all(
        one.memory_bytes >= TYPICAL_ROUND and one.pending_bytes >= CLEARLY_LESS * one.memory_bytes
        for one in rounds[-2:]
    )


def _slower(last: Round, rate: float, quota: float) -> float:
    """The next quota. A job that wrote again all that was sent may write any number of times as much."""
    hidden = last.pending_bytes >= 0.95 * last.memory_bytes
    keep = STEEPEST if hidden else min(max(HEADROOM * rate / last.dirty_rate, STEEPEST), GENTLEST)
    return max(LEAST_QUOTA, round(quota * keep, 3))
