"""When to stop copying: one pure function that looks at what the rounds brought and says what to do next, and why.

The rule aims at `max_downtime`: of it, `LAST_PAGES_SHARE` may be spent on the last pages, the rest belongs to dump and restore.
A round is worth another while it leaves clearly less to send than the one before. Where it no longer does, the job writes as
fast as the link carries, and only slowing the job, post-copy or giving up will end it.

Worked examples (link 118 MB/s, max_downtime 200 ms, so 50 ms or 5.9 MB for the last pages):

| pending after each round | quota | allowed | decision |
|---|---|---|---|
| 5 MB | - | - | cut over: what is left takes 42 ms |
| 450, 190 MB | - | - | go on: each round leaves less |
| 900, 910, 905 MB | 100 % | throttle | throttle to 70 % |
| 900, 910, 905 MB | 10 % | throttle | give up: nothing slower is left |
| 900, 910, 905 MB | 100 % | postcopy | switch to post-copy |
| 900, 910, 905 MB | 100 % | nothing | give up: writes 113 MB/s, link carries 118 MB/s |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

LAST_PAGES_SHARE = 0.25
CLEARLY_LESS = 0.9
PATIENCE = 3
QUOTA_STEPS = (0.7, 0.5, 0.3, 0.2, 0.1)
GUESSED_RATE = 100e6


class Step(StrEnum):
    """What to do after a round."""

    CUT_OVER = "cut over"
    GO_ON = "go on"
    THROTTLE = "throttle"
    POSTCOPY = "postcopy"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Round:
    """One pass: what it sent, how long it took, and what had been written again when it ended."""

    number: int
    pages: int
    bytes: int
    seconds: float
    pending_bytes: int

    @property
    def dirty_rate(self) -> float:
        """Bytes that the job wrote anew per second while the round ran."""
        return self.pending_bytes / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Policy:
    """What the user allows and aims at. `max_downtime` is in seconds."""

    max_downtime: float = 0.2
    throttle: bool = True
    postcopy: bool = False
    max_rounds: int = 30


@dataclass(frozen=True)
class Decision:
    """What to do next and why; `quota` is the share of its processor time that a throttled job keeps."""

    step: Step
    reason: str
    quota: float = 1.0


def decide(rounds: Sequence[Round], policy: Policy, *, rate: float, quota: float = 1.0) -> Decision:
    """What to do after the last of `rounds`.

    `rate` is what the link has carried, in bytes a second (0 where nothing was sent yet: then a gigabit link is assumed);
    `quota` is the share of processor time that the job has now.
    """
    last = rounds[-1]
    rate = rate or GUESSED_RATE
    left = last.pending_bytes / rate
    if left <= policy.max_downtime * LAST_PAGES_SHARE:
        return Decision(Step.CUT_OVER, f"what is left takes {left * 1e3:.0f} ms", quota)
    if not _stuck(rounds) and last.number < policy.max_rounds:
        return Decision(Step.GO_ON, f"{left * 1e3:.0f} ms are left, and each round leaves less", quota)
    story = f"the job writes {last.dirty_rate / 1e6:.0f} MB/s and the link carries {rate / 1e6:.0f} MB/s"
    slower = next((one for one in QUOTA_STEPS if one < quota - 1e-9), None)
    if policy.throttle and slower is not None and last.number < 2 * policy.max_rounds:
        return Decision(Step.THROTTLE, f"{story}: slowing the job to {slower:.0%}", slower)
    if policy.postcopy:
        return Decision(Step.POSTCOPY, f"{story}: fetching the rest after the cut-over", quota)
    return Decision(Step.GIVE_UP, f"cannot converge: {story}", quota)


def _stuck(rounds: Sequence[Round]) -> bool:
    """True when the last `PATIENCE` rounds together did not leave clearly less than the one before them."""
    if len(rounds) <= PATIENCE:
        return False
    return rounds[-1].pending_bytes > CLEARLY_LESS * rounds[-1 - PATIENCE].pending_bytes
