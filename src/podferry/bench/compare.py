"""Two results files beside each other: what got better, what worse, and what of it may be chance. Pure functions over records.

Runs are paired: the same scenario, method and run number. What is compared is the ratio of the medians. Its confidence interval
is a percentile bootstrap over the pairs (B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). The test
is the randomization test for pairs (R. A. Fisher, The Design of Experiments, 1935, chapter III): had nothing changed, the
difference of a pair would as likely have the other sign. It is exact, and asks nothing of how the figures are distributed. SciPy
has both (`scipy.stats.bootstrap`, `permutation_test`); it would be by far the largest thing to install.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import product
from statistics import fmean, median
from typing import Any

from podferry.bench.goals import COMPLETED
from podferry.bench.lost import lost_ms

Record = dict[str, Any]
Figure = Callable[[Record], float | None]
Pair = tuple[float, float]

RESAMPLES = 2000
EXACT_PAIRS = 12
"""Up to so many pairs every choice of signs is tried: 4,096; beyond, as many random ones."""
CONFIDENCE = 0.95
ALPHA = 0.05
LEAST_PAIRS = 6
"""With fewer, even the largest difference has a chance of more than `ALPHA`: 2 / 2^5."""
THRESHOLD = 1.1
CONTROLS = {"unmoved"}
"""What is not measured, but measured against."""


def _field(name: str) -> Figure:
    def take(record: Record) -> float | None:
        found = record.get(name)
        return None if found is None else float(found)

    return take


FIGURES: dict[str, Figure] = {
    "downtime_ms": _field("downtime_ms"),
    "lost_ms": lost_ms,
    "total_ms": _field("total_ms"),
    "home_ms": _field("home_ms"),
    "stall_ms": _field("stall_ms"),
    "wire_bytes": _field("wire_bytes"),
    "first_pull_ms": _field("first_pull_ms"),
    "second_start_ms": _field("second_start_ms"),
    "import_cold_ms": _field("import_cold_ms"),
    "all_have_it_ms": _field("all_have_it_ms"),
}
"""What is compared; less is better in each."""


class ChangeVerdict(StrEnum):
    """What a comparison says."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "no difference"
    FEW = "too few runs"
    FAILED = "no longer completes"


@dataclass(frozen=True)
class Comparison:
    """One figure of a scenario's method: medians, their ratio (new to old) with its interval, and the chance `p` of a difference
    as large by luck alone. `ratio` is `None` where the old median is not positive, or nothing completed."""

    scenario: str
    method: str
    figure: str
    pairs: int
    old: float | None
    new: float | None
    ratio: float | None
    low: float | None
    high: float | None
    p: float | None
    verdict: ChangeVerdict

    def beyond(self, threshold: float) -> bool:
        """Whether it got worse, and by more than `threshold` (1.1: by a tenth)."""
        if self.verdict is ChangeVerdict.FAILED:
            return True
        return self.verdict is ChangeVerdict.WORSE and self.ratio is not None and self.ratio > threshold

    def to_dict(self) -> dict[str, Any]:
        """For a machine to read."""
        return asdict(self)


def compare(
    old: Sequence[Record], new: Sequence[Record], *, figures: Sequence[str] = (), relative_to: str | None = None
) -> list[Comparison]:
    """Every figure that both have, in the order of `new`.

    `relative_to` is a method by whose value in the same run each is divided first. That takes the machine out: results of different
    machines, or of a busy one, can be compared so. Where it has not this figure, as the floor, a time is divided by its downtime.
    """
    found = []
    for scenario, method in dict.fromkeys((one["scenario"], one["method"]) for one in new):
        if method in CONTROLS or method == relative_to:
            continue
        before, after = (_completed(records, scenario, method) for records in (old, new))
        if before and not after:
            found.append(_failed(scenario, method))
        for figure in figures or FIGURES:
            pairs = list(_pairs(before, after, figure, (old, new), relative_to))
            if pairs:
                found.append(judged(scenario, method, figure, pairs))
    return found


def only_in(old: Sequence[Record], new: Sequence[Record]) -> list[str]:
    """What `old` has measured and `new` has not tried, as "scenario, method"."""
    there, here = (dict.fromkeys((one["scenario"], one["method"]) for one in records) for records in (old, new))
    return [f"{scenario}, {method}" for scenario, method in there if (scenario, method) not in here]


def judged(scenario: str, method: str, figure: str, pairs: Sequence[Pair]) -> Comparison:
    """The comparison of these pairs (old, new)."""
    ratio, old, new = ratio_of_medians(pairs), median(one for one, _ in pairs), median(other for _, other in pairs)
    low, high = interval(pairs)
    p = chance(pairs)
    return Comparison(
        scenario, method, figure, len(pairs), old, new, ratio, low, high, p, _verdict(len(pairs), new - old, p)
    )


def ratio_of_medians(pairs: Sequence[Pair]) -> float | None:
    """The new median over the old one; `None` where that is not positive."""
    old = median(one for one, _ in pairs)
    return median(other for _, other in pairs) / old if old > 0 else None


def interval(pairs: Sequence[Pair], confidence: float = CONFIDENCE) -> tuple[float | None, float | None]:
    """The confidence interval of the ratio of medians. The same pairs always have the same."""
    chosen = random.Random(1)
    ratios = sorted(
        ratio for _ in range(RESAMPLES) if (ratio := ratio_of_medians(chosen.choices(pairs, k=len(pairs)))) is not None
    )
    if not ratios or len(pairs) == 1:
        return None, None
    tail = (1 - confidence) / 2
    return ratios[int(tail * (len(ratios) - 1))], ratios[int((1 - tail) * (len(ratios) - 1))]


def chance(pairs: Sequence[Pair]) -> float:
    """How likely a mean difference as large as this one is, either way, if nothing had changed."""
    differences = [other - one for one, other in pairs]
    least = abs(fmean(differences)) * (1 - 1e-9)
    if len(pairs) <= EXACT_PAIRS:
        signs = list(product((1, -1), repeat=len(pairs)))
        return sum(abs(_mean(differences, one)) >= least for one in signs) / len(signs)
    chosen, tries = random.Random(1), 1 << EXACT_PAIRS
    as_large = sum(abs(_mean(differences, chosen.choices((1, -1), k=len(differences)))) >= least for _ in range(tries))
    return (as_large + 1) / (tries + 1)


def _mean(differences: Sequence[float], signs: Sequence[int]) -> float:
    return fmean(difference * sign for difference, sign in zip(differences, signs, strict=True))


def _verdict(pairs: int, change: float, p: float) -> ChangeVerdict:
    if pairs < LEAST_PAIRS:
        return ChangeVerdict.FEW
    if p > ALPHA or change == 0:
        return ChangeVerdict.SAME
    return ChangeVerdict.WORSE if change > 0 else ChangeVerdict.BETTER


def _failed(scenario: str, method: str) -> Comparison:
    return Comparison(scenario, method, "completed", 0, None, None, None, None, None, None, ChangeVerdict.FAILED)


def _completed(records: Sequence[Record], scenario: str, method: str) -> dict[int, Record]:
    """The completed runs by their number."""
    found = (one for one in records if (one["scenario"], one["method"]) == (scenario, method))
    return {one["run"]: one for one in found if one["outcome"] == COMPLETED}


def _pairs(
    before: dict[int, Record],
    after: dict[int, Record],
    name: str,
    files: tuple[Sequence[Record], Sequence[Record]],
    relative_to: str | None,
) -> Iterator[Pair]:
    for number in sorted(before.keys() & after.keys()):
        values = []
        for record, records in ((before[number], files[0]), (after[number], files[1])):
            value = FIGURES[name](record)
            base = 1.0 if relative_to is None else _baseline(records, record, name, relative_to)
            values.append(value / base if value is not None and base else None)
        if values[0] is not None and values[1] is not None:
            yield values[0], values[1]


def _baseline(records: Sequence[Record], record: Record, name: str, method: str) -> float | None:
    """What `method` has in the same run: in this scenario, or else in the first that has it; 1 for bytes that it has none of."""
    same = [one for one in records if one["method"] == method and one["run"] == record["run"]]
    same.sort(key=lambda one: one["scenario"] != record["scenario"])
    figures = [FIGURES[name], *([FIGURES["downtime_ms"]] if name.endswith("_ms") else [])]
    values = (figure(one) for figure in figures for one in same if one["outcome"] == COMPLETED)
    return next((value for value in values if value is not None), None if name.endswith("_ms") else 1.0)
