"""From an evaluation's records to its sections: what each says, its figures, its table. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from podferry.bench import report
from podferry.bench.evaluation.charts import Bars, Chart, Series, Waterfall
from podferry.bench.evaluation.utilization import LIMITS_TEXT, limit_rows
from podferry.bench.goals import ScenarioRuns, verdicts
from podferry.bench.lost import lost_ms
from podferry.bench.report import Table

Record = dict[str, Any]
Take = str | Callable[[Record], float | None]

MEMORY = {"small": 64, "memory-256": 256, "downtime": 1024, "large": 4096, "memory-8192": 8192}
DIRTY = {"dirty-0": 0, "dirty-10": 10, "processes-1": 50, "dirty-100": 100, "dirty-200": 200, "dirty-400": 400}
LINKS = {"link-100mbit": 0.1, "link-1gbit": 1.0, "link-10gbit": 10.0}
PROCESSES = {"processes-1": 1, "processes-8": 8, "processes-64": 64}
METHODS = ("floor", "live", "postcopy", "stop", "criu-lazy", "criu", "restart", "unmoved")
OURS = frozenset({"live", "postcopy"})
WORKS = {"downtime": "looks at the clock", "work-cpu": "computes", "work-random": "reads here and there",
         "work-stream": "reads from end to end"}  # fmt: skip
KINDS = {"processes-1": "one process", "processes-8": "8 processes", "processes-64": "64 processes",
         "sequential-512": "in order", "hot-512": "64 MiB hot"}  # fmt: skip
FILES = {"small": "no files", "upper-128": "128 MiB", "upper-1024": "1 GiB", "small-files": "100,000 small"}
IMAGE_FIGURES = {
    "first_pull_ms": "First pull",
    "second_start_ms": "Start on a second node",
    "import_cold_ms": "Cold import",
}
SHARING = {"memory-256": "private", "shared-256": "shared"}


@dataclass(frozen=True)
class Figure:
    """A picture: `name` for its file, what it shows, and itself."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Section:
    """A part of the report; `tables` are rows whose first holds the titles."""

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = field(default=())

    @property
    def empty(self) -> bool:
        """Whether the records had nothing for it."""
        return not self.figures and not self.tables


def sections(records: Sequence[Record]) -> list[Section]:
    """Everything that the records have data for, in the order of the report."""
    runs = ScenarioRuns(records)
    made = (_goals(records), _downtime(runs), _lost(runs), _shape(runs), _one(runs), _job(runs), _images(runs),
            _limits(records), _tables(records))  # fmt: skip
    return [one for one in made if not one.empty]


def _goals(records: Sequence[Record]) -> Section:
    rows = report.goal_rows(one for one in verdicts(records) if one.measured is not None)
    return Section("Goals", "", tables=_there(rows))


def _downtime(runs: ScenarioRuns) -> Section:
    figures = [
        *_curve(runs, MEMORY, "downtime-memory", "Downtime by memory", "memory, MiB", "ms", "downtime_ms", log_x=True),
        *_curve(runs, DIRTY, "downtime-dirty", "Downtime by dirty rate, 512 MiB", "MB/s written", "ms", "downtime_ms"),
        *_curve(runs, LINKS, "downtime-link", "Downtime by link, 256 MiB", "Gbit/s", "ms", "downtime_ms", log_x=True),
        *_bars(runs, "downtime", "downtime-methods", "Downtime by method, 1 GiB", "ms", "downtime_ms", log=True),
        *_bars(runs, "quick", "downtime-quick", "Downtime by method, 64 MiB", "ms", "downtime_ms"),
    ]
    return Section(
        "Downtime", "As the job sees it: the gap between two of its looks at the clock. A stroke is a run.", figures
    )


def _lost(runs: ScenarioRuns) -> Section:
    figures = [
        *_curve(runs, MEMORY, "lost-memory", "Lost work by memory", "memory, MiB", "ms", lost_ms, log_x=True),
        *_curve(runs, DIRTY, "lost-dirty", "Lost work by dirty rate, 512 MiB", "MB/s written", "ms", lost_ms),
        *_curve(runs, LINKS, "lost-link", "Lost work by link, 256 MiB", "Gbit/s", "ms", lost_ms, log_x=True),
    ]
    for name in ("downtime", "quick"):
        figures += _bars(runs, name, f"lost-{name}", f"Lost work by method ({name})", "ms", lost_or_restart, log=True)
    for name, work in (*list(WORKS.items())[1:], ("quick-cpu", "computes")):
        figures += _bars(runs, name, f"lost-{name}", f"Lost work of a job that {work}", "ms", lost_ms)
    text = (
        "How much later the job ends than without the move, by its own count. `unmoved` is a twin that nobody moves: what the "
        "count finds there is the machine's own. `restart` is the restart alone, without all that was computed before it."
    )
    return Section("Lost work", text, figures)


def lost_or_restart(record: Record) -> float | None:
    """Lost work that can be drawn on a logarithmic scale; of a restart without what was computed before it."""
    found = lost_ms(record, "stop_ms" if record["method"] == "restart" else "total_ms")
    return None if found is None else max(found, 1.0)


def _shape(runs: ScenarioRuns) -> Section:
    figures: list[Figure] = []
    for title, names, slug in (
        ("Processes and patterns, 512 MiB", KINDS, "kinds"), ("Files in the upper layer, 64 MiB", FILES, "files"),
        ("Private and shared memory, 256 MiB", SHARING, "sharing"),
    ):  # fmt: skip
        for take, what, scale in (("downtime_ms", "downtime, ms", 1.0), ("total_ms", "whole move, s", 1e3)):
            figures += _across(runs, names, f"{slug}-{take[:-3]}", f"{title}: {what}", what, take, scale)
    return Section("What the job is like", "Moved in mode `live`.", figures)


def _one(runs: ScenarioRuns) -> Section:
    """The run of `live` whose downtime is the median."""
    figures: list[Figure] = []
    for scenario in ("downtime", "quick"):
        done = [one for one in runs.of(scenario, "live") if one["facts"].get("spans") and one.get("downtime_ms")]
        if not done:
            continue
        one = sorted(done, key=lambda record: float(record["downtime_ms"]))[(len(done) - 1) // 2]
        spans = sorted(one["facts"]["spans"], key=lambda span: (span["start_ms"], span["end_ms"]))
        still = next(((span["start_ms"], span["end_ms"]) for span in spans if span["name"] == "downtime"), None)
        all_steps = [(span["name"], span["start_ms"], span["end_ms"], _tone(span, still)) for span in spans]
        figures.append(
            Figure(
                f"waterfall-{scenario}",
                "One migration, from the request on",
                Waterfall("One migration, from the request on", "ms", all_steps, still).svg(),
            )
        )
        if still:
            near = [step for step in all_steps if step[1] < still[1] + 50 and step[2] > still[0] - 50]
            zoomed = [
                (name, max(start, still[0] - 50) - still[0], min(end, still[1] + 50) - still[0], tone)
                for name, start, end, tone in near
            ]
            title = "The same around the stop, ms from the freeze on"
            figures.append(
                Figure(
                    f"waterfall-stop-{scenario}",
                    title,
                    Waterfall(title, "ms", zoomed, (0.0, still[1] - still[0])).svg(),
                )
            )
        break
    return Section(
        "One migration", "Of the runs in mode `live` the one whose downtime is the median; the stop is shaded.", figures
    )


def _tone(span: Mapping[str, Any], still: tuple[float, float] | None) -> int:
    return 1 if still and span["end_ms"] > still[0] and span["start_ms"] < still[1] else 0


def _job(runs: ScenarioRuns) -> Section:
    figures: list[Figure] = []
    cdf = []
    for scenario in ("downtime", "quick"):
        for tone, method in enumerate(("live", "postcopy", "criu-lazy", "stop")):
            stalls = sorted(stall for one in runs.of(scenario, method) for stall in one.get("stalls_ms") or [])
            if stalls:
                share = [(stall, place / len(stalls)) for place, stall in enumerate(stalls, 1)]
                cdf.append(Series(method, [(stalls[0], 0.0), *share], tone, stairs=True))
        if cdf:
            title = "Stalls of 3 ms and more after the resume"
            figures.append(Figure("stalls", title, Chart(title, "ms", "share", cdf, log_x=True).svg()))
            break
    for scenario, work in (*WORKS.items(), ("quick-cpu", "computes")):
        figures += _speed(runs, scenario, f"Speed over time: a job that {work}")
    return Section(
        "What the job sees",
        "Speed is units of work a second against those before the move; the stop is shaded.",
        figures,
    )


def _speed(runs: ScenarioRuns, scenario: str, title: str) -> Iterator[Figure]:
    lines, band = [], None
    for tone, method in ((5, "unmoved"), (1, "stop"), (0, "live")):
        one = next((one for one in reversed(runs.of(scenario, method)) if one.get("series")), None)
        before = ((one or {}).get("speed") or {}).get("before")
        if one is None or not before:
            continue
        points = [(at / 1e3, units / before["wall"]) for at, units, _ in one["series"]]
        lines.append(Series(method, points, tone, dashed=method == "unmoved"))
        if method == "live" and one.get("resumed_ms") is not None:
            band = ((one["resumed_ms"] - one["downtime_ms"]) / 1e3, one["resumed_ms"] / 1e3)
    if any(line.name == "live" for line in lines):
        yield Figure(
            f"speed-{scenario}",
            title,
            Chart(title, "s after the request", "of the speed before", lines, band=band).svg(),
        )


def _images(runs: ScenarioRuns) -> Section:
    figures: list[Figure] = []
    for take, what in IMAGE_FIGURES.items():
        found = {method: runs.values("images", method, take) for method in ("overlayfs", "erofs", "dir")}
        rows = [(method, [one / 1e3 for one in values]) for method, values in found.items() if values]
        figures += _figure_of(f"images-{take[:-3]}", f"{what}, s", "s", rows, frozenset({"erofs", "dir"}))
    text = "An image of 500 MB from a registry; `overlayfs` is containerd's own snapshotter."
    return Section("Image starts", text, figures)


def _limits(records: Sequence[Record]) -> Section:
    return Section("Against the physical limit", LIMITS_TEXT, tables=_there(limit_rows(records)))


def _tables(records: Sequence[Record]) -> Section:
    rows = (report.run_rows(records), report.lost_rows(records), report.span_rows(records), report.error_rows(records))
    return Section(
        "All runs", "Medians, with the range in brackets.", tables=[one for each in rows for one in _there(each)]
    )


def _there(rows: Table) -> list[Table]:
    return [rows] if len(rows) > 1 else []


def _curve(
    runs: ScenarioRuns,
    axis: Mapping[str, float],
    slug: str,
    title: str,
    x: str,
    y: str,
    take: Take,
    *,
    log_x: bool = False,
) -> Iterator[Figure]:
    """Medians over an axis, joined, and every run; nothing where fewer than two places have runs."""
    found = {place: values for name, place in axis.items() if (values := runs.values(name, "live", take))}
    if len(found) < 2:
        return
    every = [(place, value) for place, values in found.items() for value in values]
    middle = [(place, median(values)) for place, values in found.items()]
    marks = [(place, f"{place:g}") for place in found]
    lines = [Series("", every, 0, line=False), Series("live", middle, 0)]
    floors = [value for name in axis for value in runs.values(name, "floor", take)]
    if floors:
        lines.append(Series("floor", [(min(found), median(floors)), (max(found), median(floors))], 5, dashed=True))
    yield Figure(slug, title, Chart(title, x, y, lines, log_x=log_x, marks=marks).svg())


def _bars(
    runs: ScenarioRuns, scenario: str, slug: str, title: str, x: str, take: Take, *, log: bool = False
) -> Iterator[Figure]:
    """A row for each method of a scenario."""
    rows = [(method, found) for method in METHODS if (found := runs.values(scenario, method, take))]
    yield from _figure_of(slug, title, x, rows, OURS, log=log)


def _across(
    runs: ScenarioRuns, names: Mapping[str, str], slug: str, title: str, x: str, take: str, scale: float
) -> Iterator[Figure]:
    """A row for each scenario; nothing where fewer than two have runs."""
    rows = [
        (label, [one / scale for one in found])
        for name, label in names.items()
        if (found := runs.values(name, "live", take))
    ]
    if len(rows) > 1:
        yield from _figure_of(slug, title, x, rows, frozenset(names.values()))


def _figure_of(
    slug: str,
    title: str,
    x: str,
    rows: Sequence[tuple[str, Sequence[float]]],
    strong: frozenset[str],
    *,
    log: bool = False,
) -> Iterator[Figure]:
    if rows:
        drawn = [(label, median(values), values) for label, values in rows]
        yield Figure(slug, title, Bars(title, x, drawn, log=log, emphasised=strong).svg())
