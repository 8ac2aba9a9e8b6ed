"""Whether two minutes of runs look worse than a reference of the same runs. It says so and judges nothing: so few runs cannot.

Every figure is first divided by the floor's downtime in its own round. That takes out the machine, and how busy it is, as far as it
goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from podferry.bench.compare import CONTROLS, FIGURES
from podferry.bench.goals import COMPLETED
from podferry.bench.scenarios import FLOOR

Record = dict[str, Any]

WATCHED = ("downtime_ms", "lost_ms", "total_ms")
NOTABLE = 1.25
"""What a median of two or three runs is above that of the reference where it is worth a look."""


@dataclass(frozen=True)
class Drift:
    """A figure of a scenario's method in units of the floor: the reference's median and largest, and the median now."""

    scenario: str
    method: str
    figure: str
    reference: float
    largest: float
    now: float

    @property
    def ratio(self) -> float:
        """Now against the reference."""
        return self.now / self.reference

    @property
    def worse(self) -> bool:
        """Whether it is worth a look: clearly larger, and larger than in every run of the reference."""
        return self.ratio > NOTABLE and self.now > self.largest

    def __str__(self) -> str:
        what = f"{self.scenario}, {self.method}: {self.figure}"
        return f"{what} {self.now:.2f} x the floor, {self.ratio:.2f} x the reference ({self.reference:.2f})"


def drifts(reference: Sequence[Record], records: Sequence[Record]) -> Iterator[Drift]:
    """Every watched figure that both have."""
    for scenario, method in dict.fromkeys((one["scenario"], one["method"]) for one in records):
        if method == FLOOR or method in CONTROLS:
            continue
        for figure in WATCHED:
            before, now = (relative(found, scenario, method, figure) for found in (reference, records))
            if before and now and median(before) > 0:
                yield Drift(scenario, method, figure, median(before), max(before), median(now))


def relative(records: Sequence[Record], scenario: str, method: str, figure: str) -> list[float]:
    """The figure of every completed run in units of the floor of its round."""
    floors = {
        one["run"]: one["downtime_ms"] for one in records if one["method"] == FLOOR and one["outcome"] == COMPLETED
    }
    return [
        value / floors[one["run"]]
        for one in records
        if (one["scenario"], one["method"], one["outcome"]) == (scenario, method, COMPLETED) and floors.get(one["run"])
        if (value := FIGURES[figure](one)) is not None
    ]


def said(reference: Sequence[Record], records: Sequence[Record]) -> list[str]:
    """What there is to say to a person, a line each."""
    failed = [
        f"{one['scenario']}, {one['method']}, run {one['run']}: {one['outcome']}"
        for one in records
        if one["outcome"] != COMPLETED
    ]
    found = list(drifts(reference, records))
    worse = [f"WORSE? {one}" for one in found if one.worse]
    if worse:
        worse.append(
            "two or three runs on a machine that does other things too: measure again with podferry bench evaluate --budget 30"
        )
    if not found and reference:
        worse.append("no figure has both a run here and one in the reference")
    return [*(f"did not complete: {one}" for one in failed), *worse, *(f"{one}" for one in found if not one.worse)]
