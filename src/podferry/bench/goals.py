"""The goals, and what the records say of each: pure functions from records to verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from podferry.lab.network import bits_per_second

Record = dict[str, Any]
MIB = 1 << 20
COMPLETED = "completed"
IMAGE_SCENARIOS = {"images", "crowd"}
FORMS = ("erofs", "dir")


@dataclass(frozen=True)
class GoalVerdict:
    """A goal and what was measured: the median of `runs`. `measured` is `None` where nothing was; `detail` says of what."""

    goal: str
    limit: float
    at_least: bool
    unit: str
    measured: float | None
    runs: int
    detail: str = ""

    @property
    def kept(self) -> bool | None:
        """Whether the goal is reached; `None` where nothing was measured."""
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    @property
    def margin(self) -> float | None:
        """By which share of the limit it is kept (positive) or missed (negative)."""
        if self.measured is None:
            return None
        better = self.measured - self.limit if self.at_least else self.limit - self.measured
        return better / self.limit if self.limit else better


class ScenarioRuns:
    """The completed runs of a scenario and method, and medians over them."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records

    def of(self, scenario: str, method: str) -> list[Record]:
        """Those that completed."""
        return [one for one in self.all(scenario, method) if one["outcome"] == COMPLETED]

    def all(self, scenario: str, method: str) -> list[Record]:
        """Those that completed and the others."""
        return [one for one in self._records if (one["scenario"], one["method"]) == (scenario, method)]

    def values(self, scenario: str, method: str, value: str | Callable[[Record], float | None]) -> list[float]:
        """A field, or what a function makes of the record, of every run that has it."""
        take = value if callable(value) else lambda record: record.get(value)
        return [float(found) for one in self.of(scenario, method) if (found := take(one)) is not None]

    def median(self, scenario: str, method: str, value: str | Callable[[Record], float | None]) -> float | None:
        """The median of `values`; `None` where there are none."""
        found = self.values(scenario, method, value)
        return median(found) if found else None


def verdicts(records: Sequence[Record]) -> Iterator[GoalVerdict]:
    """Every goal that the records' scenarios have to do with, in the order in which they were set."""
    runs = ScenarioRuns(records)
    scenarios = {str(one["scenario"]) for one in records}
    if scenarios & IMAGE_SCENARIOS:
        for form in FORMS:
            yield from _images(runs, form)
    if scenarios <= IMAGE_SCENARIOS:
        return
    yield from _downtime(runs)
    yield from _against(runs)
    yield from _costs(runs)
    yield from _speed(runs)
    yield from _memory(runs)
    yield from _storm(runs)
    yield _intact(records)


def _downtime(runs: ScenarioRuns) -> Iterator[GoalVerdict]:
    live, floor = (runs.median("downtime", method, "downtime_ms") for method in ("live", "floor"))
    count = len(runs.of("downtime", "live"))
    yield GoalVerdict(
        "downtime, 1 GiB, 50 MB/s written, against the floor",
        1.5,
        False,
        "x",
        _ratio(live, floor),
        count,
        _over("ms", live, floor),
    )
    yield GoalVerdict("the same, in ms: the aim", 150, False, "ms", live, count)
    sizes = {name: runs.median(name, "live", "downtime_ms") for name in ("small", "downtime", "large")}
    known = [value for value in sizes.values() if value is not None]
    spread = max(known) / min(known) if len(known) == len(sizes) else None
    detail = " / ".join("?" if value is None else f"{value:.0f}" for value in sizes.values())
    least = min(len(runs.of(name, "live")) for name in sizes)
    yield GoalVerdict(
        "downtime, largest to smallest of 64 MiB, 1 GiB, 4 GiB", 1.3, False, "x", spread, least, f"{detail} ms"
    )


def _against(runs: ScenarioRuns) -> Iterator[GoalVerdict]:
    def both(goal: str, limit: float, other: str, field: str, *, shorter: bool = False) -> GoalVerdict:
        live, there = (runs.median("downtime", method, field) for method in ("live", other))
        count = min(len(runs.of("downtime", method)) for method in ("live", other))
        if shorter:
            return GoalVerdict(goal, limit, True, "x", _ratio(there, live), count, _over("ms", there, live))
        return GoalVerdict(goal, limit, False, "x", _ratio(live, there), count, _over("ms", live, there))

    yield both("downtime shorter than that of stop, 1 GiB", 25, "stop", "downtime_ms", shorter=True)
    yield both("downtime against CRIU's lazy migration", 0.8, "criu-lazy", "downtime_ms")
    yield both("all pages home, from the request on, against CRIU's lazy migration", 0.6, "criu-lazy", "home_ms")
    yield both("longest stall after the resume against CRIU's lazy migration", 0.5, "criu-lazy", "stall_ms")


def _costs(runs: ScenarioRuns) -> Iterator[GoalVerdict]:
    count = len(runs.of("downtime", "live"))
    total = runs.median("downtime", "live", total_over_allowance)
    yield GoalVerdict("total time against 1.25 x (bytes sent / link rate) + 1 s", 1.0, False, "x", total, count)
    wire = runs.median("downtime", "live", wire_over_need)
    yield GoalVerdict("bytes on the wire against non-zero memory and what was written", 1.05, False, "x", wire, count)


def _speed(runs: ScenarioRuns) -> Iterator[GoalVerdict]:
    for goal, scenario, window in (
        ("speed during pre-copy, computing", "cpu", "during"),
        ("speed one second after the resume, 1 GiB read at random", "random", "second_after"),
    ):
        count = len(runs.of(scenario, "live"))
        wall, cpu = (runs.median(scenario, "live", _relative_speed(window, kind)) for kind in ("wall", "cpu"))
        detail = "" if cpu is None else f"by its own processor time {cpu:.3f}"
        yield GoalVerdict(goal, 0.95, True, "of the speed before", wall, count, detail)


def _memory(runs: ScenarioRuns) -> Iterator[GoalVerdict]:
    count = len(runs.of("drain", "live"))
    peak = runs.median("drain", "live", agents_peak)
    yield GoalVerdict(
        "memory of the larger agent, its lazy-pages daemon included", 150, False, "MiB", peak and peak / MIB, count
    )
    drain = runs.median("drain", "live", store_and_job)
    yield GoalVerdict(
        "page store and job together while it drains, against the job alone afterwards", 1.25, False, "x", drain, count
    )


def _storm(runs: ScenarioRuns) -> Iterator[GoalVerdict]:
    def throttled(one: Record) -> bool:
        return bool(one["outcome"] == COMPLETED)

    def postcopied(one: Record) -> bool:
        return bool(one["outcome"] == COMPLETED and one["facts"].get("postcopy"))

    def gave_up(one: Record) -> bool:
        return one["outcome"] == "rolled-back" and "cannot converge" in str(one["facts"].get("reason"))

    for method, ends, expected in (
        ("throttle", "by throttling", throttled),
        ("postcopy-allowed", "by post-copy", postcopied),
        ("neither", 'with "cannot converge", running on', gave_up),
    ):
        every = runs.all("storm", method)
        share = sum(map(expected, every)) / len(every) if every else None
        yield GoalVerdict(f"400 MB/s on 1 Gbit/s ends {ends}", 1.0, True, "of the runs", share, len(every))


def _intact(records: Sequence[Record]) -> GoalVerdict:
    checked = [one for one in records if one.get("damaged") is not None]
    damaged = sum(one["damaged"] + one["damaged_files"] for one in checked)
    return GoalVerdict(
        "pages and files of the job that were not intact",
        0,
        False,
        "",
        float(damaged) if checked else None,
        len(checked),
    )


def _images(runs: ScenarioRuns, form: str) -> Iterator[GoalVerdict]:
    count, crowds = len(runs.of("images", form)), len(runs.of("crowd", form))

    def against(goal: str, limit: float, field: str, *, sooner: bool = False) -> GoalVerdict:
        ours, plain = (runs.median("images", method, field) for method in (form, "overlayfs"))
        ratio, detail = (
            (_ratio(plain, ours), _over("ms", plain, ours))
            if sooner
            else (_ratio(ours, plain), _over("ms", ours, plain))
        )
        return GoalVerdict(
            f"{form}: {goal}", limit, sooner, "x", ratio, min(count, len(runs.of("images", "overlayfs"))), detail
        )

    layers = runs.median("images", form, "second_layer_bytes")
    received = runs.median("images", form, "second_link_bytes")
    detail = "" if received is None else f"of {received / MIB:.1f} MiB that it received at all"
    yield GoalVerdict(f"{form}: layers that the second node downloaded", 0, False, "bytes", layers, count, detail)
    yield against("second node's start sooner than with overlayfs", 5, "second_start_ms", sooner=True)
    yield against("first node's pull against overlayfs", 1.3, "first_pull_ms")
    yield against("import of numpy and scipy against local disk, warm", 1.05, "import_warm_ms")
    yield against("the same, cold", 1.5, "import_cold_ms")
    yield against("the same, cold, as the first that imports them anywhere", 1.5, "import_first_ms")
    unpacked = runs.values("crowd", form, "unpacked")
    yield GoalVerdict(
        f"{form}: ten nodes at once, a layer unpacked", 1, False, "times", max(unpacked, default=None), crowds
    )
    many, one = (runs.median(scenario, form, "share_bytes") for scenario in ("crowd", "images"))
    ratio = _ratio(many, one)
    yield GoalVerdict(
        f"{form}: bytes on the share for ten nodes",
        1.0,
        False,
        "of one's",
        None if ratio is None else round(ratio, 3),
        min(count, crowds),
    )


def total_over_allowance(record: Record) -> float | None:
    """Total time against 1.25 x (bytes sent / link rate) + 1 s."""
    rate = bits_per_second(record["link"])
    if rate is None or record.get("wire_bytes") is None:
        return None
    return float(record["total_ms"] / 1e3 / (1.25 * record["wire_bytes"] * 8 / rate + 1))


def wire_over_need(record: Record) -> float | None:
    """Bytes on the wire against non-zero memory and what was written until the freeze."""
    if None in (record.get("wire_bytes"), record.get("written_bytes")) or not record.get("nonzero_bytes"):
        return None
    return float(record["wire_bytes"] / (record["nonzero_bytes"] + record["written_bytes"]))


def agents_peak(record: Record) -> float | None:
    """The larger agent's peak in bytes; the lazy-pages daemon's counts as the target's."""
    peaks = record["facts"].get("agent_bytes")
    if not peaks:
        return None
    daemon = max((sample[2] for sample in record["facts"].get("samples", [])), default=0)
    source, target = peaks.values()
    return float(max(source, target + daemon))


def store_and_job(record: Record) -> float | None:
    """The largest sum of page store and job once the job has pages, against the job's own size at the end."""
    samples = [sample for sample in record["facts"].get("samples", []) if sample[3]]
    if not samples:
        return None
    return float(max(store + job for _, store, _, job in samples) / samples[-1][3])


def _relative_speed(window: str, kind: str) -> Callable[[Record], float | None]:
    def ratio(record: Record) -> float | None:
        speed = record["speed"]
        return float(speed[window][kind] / speed["before"][kind]) if speed[window] and speed["before"] else None

    return ratio


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _over(unit: str, one: float | None, other: float | None) -> str:
    return "" if one is None or other is None else f"{one:.0f} / {other:.0f} {unit}"
