"""What the records say, as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from podferry.bench.goals import COMPLETED, IMAGE_SCENARIOS, MIB, GoalVerdict, verdicts

Record = dict[str, Any]
Table = list[list[str]]

SPANS = (
    "freeze",
    "final scan",
    "last pages",
    "dump",
    "send images",
    "upper layer, last pass",
    "check what arrived",
    "restore",
)
"""The steps of a migration that are downtime."""
RENAMED = {"last look": "final scan"}
"""What records of 0.1 call them, and since."""


def markdown(records: Sequence[Record], command: str) -> str:
    """The whole report. `command` is what made the records."""
    found = list(verdicts(records))
    parts = [
        "# Benchmarks",
        f"Made by `{command}`. Medians, with the range in brackets; each run is one line of the results file.",
        _machines(records),
        "## Goals",
        table(goal_rows(one for one in found if one.measured is not None)),
        *_unmeasured(found),
    ]
    if len(rows := run_rows([one for one in records if one["scenario"] not in IMAGE_SCENARIOS])) > 1:
        parts += ["## Runs", table(rows)]
    if len(rows := lost_rows(records)) > 1:
        parts += ["## Lost work", _LOST, table(rows)]
    if len(rows := image_rows(records)) > 1:
        parts += ["## Images", _IMAGES, table(rows)]
    if spans := span_rows(records):
        parts += ["## Where podferry's downtime goes", _WHERE, table(spans)]
    if errors := error_rows(records):
        parts += ["## Runs that did not complete", table(errors)]
    return "\n\n".join(parts) + "\n"


def goal_rows(all_verdicts: Iterable[GoalVerdict]) -> Table:
    """A row for each goal: limit, measured, kept or missed and by how much."""
    rows = [["goal", "limit", "measured", "runs", ""]]
    for one in all_verdicts:
        limit = f"{'at least' if one.at_least else 'at most'} {one.limit:g} {one.unit}".strip()
        measured = "-" if one.measured is None else f"{one.measured:.4g} {one.unit}".strip()
        detail = f" ({one.detail})" if one.detail else ""
        rows.append([one.goal, limit, measured + detail, str(one.runs), _word(one)])
    return rows


def run_rows(records: Sequence[Record]) -> Table:
    """A row for each scenario and method: what the job and the link saw."""
    rows = [
        [
            "scenario",
            "method",
            "runs",
            "downtime ms",
            "agents' ms",
            "longest stall ms",
            "all stalls ms",
            "home s",
            "total s",
            "wire MiB",
            "rounds",
        ]
    ]
    for (scenario, method), group in grouped(records).items():
        done = [one for one in group if one["outcome"] == COMPLETED]
        counted = f"{len(done)}" if len(done) == len(group) else f"{len(done)} of {len(group)}"
        columns = (
            ("downtime_ms", 1.0, ".0f"),
            ("agents_downtime_ms", 1.0, ".0f"),
            ("stall_ms", 1.0, ".0f"),
            ("stalled_ms", 1.0, ".0f"),
            ("home_ms", 1e3, ".1f"),
            ("total_ms", 1e3, ".1f"),
            ("wire_bytes", float(1 << 20), ".0f"),
            ("rounds", 1.0, ".0f"),
        )
        rows.append([scenario, method, counted, *(_range(done, *column) for column in columns)])
    return rows


def lost_rows(records: Sequence[Record]) -> Table:
    """A row for each scenario and method whose job tells what it lost."""
    parts = ("precopy_ms", "stop_ms", "after_ms", "total_ms")
    rows = [
        [
            "scenario",
            "method",
            "runs",
            "slower before the stop ms",
            "stop ms",
            "slower afterwards ms",
            "in all ms",
            "% of the time",
        ]
    ]
    for (scenario, method), group in grouped(records).items():
        done = [one for one in group if one["outcome"] == COMPLETED and one.get("lost")]
        if done:
            figures = (_range([one["lost"] for one in done], part, 1.0, ".0f") for part in parts)
            share = median(one["lost"]["total_ms"] / one["lost"]["window_ms"] for one in done)
            rows.append([scenario, method, str(len(done)), *figures, f"{share:.1%}"])
    return rows


def image_rows(records: Sequence[Record]) -> Table:
    """A row for each scenario and method of shared images."""
    columns = (
        ("first pull s", "first_pull_ms", 1e3, ".1f"),
        ("published s later", "published_ms", 1e3, ".1f"),
        ("second start s", "second_start_ms", 1e3, ".2f"),
        ("second received MiB", "second_link_bytes", float(MIB), ".1f"),
        ("first import cold ms", "import_first_ms", 1.0, ".0f"),
        ("received for it MiB", "import_first_link_bytes", float(MIB), ".1f"),
        ("import cold ms", "import_cold_ms", 1.0, ".0f"),
        ("import warm ms", "import_warm_ms", 1.0, ".0f"),
        ("all have it s", "all_have_it_ms", 1e3, ".1f"),
        ("on the share MiB", "share_bytes", float(MIB), ".0f"),
    )
    rows = [["scenario", "method", "runs", "image MiB", *(title for title, *_ in columns)]]
    for (scenario, method), group in grouped(records).items():
        if scenario in IMAGE_SCENARIOS:
            done = [one for one in group if one["outcome"] == COMPLETED]
            sizes = {
                f"{one['facts']['image_bytes'] / MIB:.0f} ({one['facts']['packed_bytes'] / MIB:.0f} packed)"
                for one in done
            }
            figures = (_range(done, field, scale, digits) for _, field, scale, digits in columns)
            rows.append([scenario, method, str(len(done)), " / ".join(sorted(sizes)) or "-", *figures])
    return rows


def span_rows(records: Sequence[Record]) -> Table:
    """A row for each of podferry's methods: how long the steps of the downtime took."""
    rows = [["scenario", "method", *SPANS]]
    for (scenario, method), group in grouped(records).items():
        timed = [
            {
                RENAMED.get(span["name"], span["name"]): span["end_ms"] - span["start_ms"]
                for span in one["facts"]["spans"]
            }
            for one in group
            if one["outcome"] == COMPLETED and "spans" in one["facts"]
        ]
        if timed:
            found = [[one[name] for one in timed if name in one] for name in SPANS]
            rows.append([scenario, method, *(f"{median(values):.0f}" if values else "-" for values in found)])
    return rows if len(rows) > 1 else []


def error_rows(records: Sequence[Record]) -> Table:
    """A row for each run that ended otherwise than completed."""
    rows = [["scenario", "method", "run", "outcome", "reason"]]
    for one in records:
        if one["outcome"] != COMPLETED:
            error = one.get("error") or one["facts"].get("error") or {}
            why = f"{error.get('what', '')}: {error.get('why', '')}".strip(": ").replace("|", "/")
            rows.append([one["scenario"], one["method"], str(one["run"]), one["outcome"], why])
    return rows if len(rows) > 1 else []


def table(rows: Table) -> str:
    """Rows as Markdown; the first holds the titles."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


_LOST = (
    "How much later the job ends, by its own count of units of work against its speed before. `unmoved` is the control: what "
    "the same count finds where nothing is moved. `restart` loses all that was computed before, too: here the two seconds "
    "for which the job is watched before."
)
_IMAGES = (
    "Over the lab's links, from a registry that serves packed layers; the page cache of the whole machine is emptied before a cold "
    "import, and what was published is on the storage node's disk then."
)
_WHERE = "Medians in ms. Dump, images, last pages and the upper layer run side by side; the job is back before `restore` ends."


def grouped(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """The records of each scenario and method, in their order."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for one in records:
        groups.setdefault((one["scenario"], one["method"]), []).append(one)
    return groups


def _range(group: Sequence[Record], field: str, scale: float, digits: str) -> str:
    values = [one[field] / scale for one in group if one.get(field) is not None]
    if not values:
        return "-"
    middle = format(median(values), digits)
    return middle if len(values) == 1 else f"{middle} ({min(values):{digits}}-{max(values):{digits}})"


def _word(one: GoalVerdict) -> str:
    if one.kept is None or one.margin is None:
        return "not measured"
    by = f" by {abs(one.margin):.0%}" if one.margin else ""
    return ("kept" if one.kept else "**missed**") + by


def _unmeasured(found: Sequence[GoalVerdict]) -> list[str]:
    """The goals that the runs say nothing about; nothing where they were about none."""
    without = [one.goal for one in found if one.measured is None]
    return [f"Not measured: {'; '.join(without)}."] if 0 < len(without) < len(found) - 1 else []


def minutes(records: Sequence[Record]) -> str:
    """How long the runs took in all."""
    return f"{sum(one.get('seconds', 0.0) for one in records) / 60:.0f}"


def machine_lines(records: Sequence[Record]) -> list[str]:
    """The machines and versions behind the records, and how busy they were: paragraphs."""
    return _machines(records).split("\n\n")


def _machines(records: Sequence[Record]) -> str:
    """The machines and versions behind the records, a line each."""
    lines = {
        f"{one['cpu']} x {one['cpus']}, {one['memory_bytes'] / 2**30:.0f} GiB, kernel {one['kernel']}, CRIU {one['criu']}, "
        f"runc {one['runc']}, containerd {one['containerd']}, podferry {one['podferry']} {one['commit']}".strip()
        for one in (record["machine"] for record in records if "machine" in record)
    }
    loads = [record["load"] for record in records]
    busy = (
        f"\n\nLoad of the machine before each run: median {median(loads):.1f}, at most {max(loads):.1f}."
        if loads
        else ""
    )
    return "\n".join(f"- {line}" for line in sorted(lines)) + busy
