"""What the records say, as PNG figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from podferry.bench.goals import MIB, ScenarioRuns
from podferry.errors import UsageError

Record = dict[str, Any]

METHODS = ("floor", "live", "postcopy", "criu-lazy", "criu", "stop")
SIZES = {"small": 64, "downtime": 1024, "large": 4096}
SIZE_INCHES, DOTS_PER_INCH = (7.0, 3.6), 150


def draw(records: Sequence[Record], into: Path) -> list[Path]:
    """Draw what the records have data for; returns the files. Raises `UsageError` without matplotlib."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise UsageError("figures need matplotlib", remedy="install podferry[bench]") from missing
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    runs, made = ScenarioRuns(records), []
    for name, paint in (("downtime", _methods), ("sizes", _sizes), ("drain", _drain)):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        if paint(figure.subplots(), runs):
            made.append(into / f"{name}.png")
            figure.savefig(made[-1], dpi=DOTS_PER_INCH)
    return made


def _methods(axes: Any, runs: ScenarioRuns) -> bool:
    """Downtime seen by the job, by method: every run and the median."""
    found = {name: values for name in METHODS if (values := runs.values("downtime", name, "downtime_ms"))}
    for row, (name, values) in enumerate(found.items()):
        axes.barh(row, median(values), color="#4878a8" if name in ("live", "postcopy") else "#b0b0b0")
        axes.plot(values, [row] * len(values), "|", color="black")
        axes.annotate(f" {median(values):.0f} ms", (max(values), row), va="center")
    axes.set(xscale="log", xlabel="downtime seen by the job, ms", title="1 GiB, 50 MB/s written, 1 Gbit/s")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    return bool(found)


def _sizes(axes: Any, runs: ScenarioRuns) -> bool:
    """Downtime by memory size."""
    found = {size: values for name, size in SIZES.items() if (values := runs.values(name, "live", "downtime_ms"))}
    for size, values in found.items():
        axes.plot([size] * len(values), values, "_", color="#4878a8", alpha=0.6)
    axes.plot(list(found), [median(values) for values in found.values()], "o-", color="#4878a8", label="live")
    floors = [value for name in SIZES for value in runs.values(name, "floor", "downtime_ms")]
    if floors:
        axes.axhline(median(floors), color="#b0b0b0", label="floor")
    axes.set(xscale="log", ylim=(0, None), xlabel="memory, MiB", ylabel="downtime, ms")
    axes.set_xticks(list(found), [str(size) for size in found], minor=False)
    axes.set_title("Downtime by memory size")
    axes.legend(frameon=False)
    return len(found) > 1


def _drain(axes: Any, runs: ScenarioRuns) -> bool:
    """The last run's page store, job and lazy-pages daemon while the job's memory is put in place."""
    samples: list[list[int]] = next(
        (one["facts"]["samples"] for one in reversed(runs.of("drain", "live")) if one["facts"]["samples"]), []
    )
    if not any(job for *_, job in samples):
        return False
    resumed = next(at for at, *_, job in samples if job)
    near = [sample for sample in samples if abs(sample[0] - resumed) < 3e9]
    times = [(at - resumed) / 1e9 for at, *_ in near]
    for column, label in ((1, "page store"), (2, "lazy-pages daemon"), (3, "job on the target")):
        axes.plot(times, [sample[column] / MIB for sample in near], label=label)
    axes.set(
        xlabel="seconds after the resume", ylabel="MiB", title="The page store shrinks as the job's memory is filled"
    )
    axes.legend(frameon=False)
    return True
