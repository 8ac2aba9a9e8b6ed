"""Records of an evaluation, made by hand: what a machine would have written, and small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from podferry.bench.evaluation import run_plan
from podferry.bench.evaluation.run_plan import PlannedRun

Record = dict[str, Any]
MACHINE = {
    "cpu": "a processor",
    "cpus": 2,
    "memory_bytes": 24 << 30,
    "memcpy_bytes_per_second": 1.6e9,
    "kernel": "6.18",
    "criu": "4.1.1",
    "runc": "1.1",
    "containerd": "1.7",
    "podferry": "0",
    "commit": "abc",
}
DOWNTIMES = {"live": 150.0, "postcopy": 160.0, "stop": 9000.0, "criu": 9500.0, "criu-lazy": 230.0}
SPANS = (
    ("request", 0, 40),
    ("upper layer, first pass", 40, 60),
    ("round 1", 40, 1800),
    ("downtime", 2000, 2150),
    ("freeze", 2000, 2002),
    ("dump", 2002, 2080),
    ("restore", 2090, 2150),
    ("fill", 2120, 2900),
)


def record_of(step: PlannedRun) -> Record:
    """What a run of this step could have said."""
    name, method, number = step.key
    base: Record = {
        "scenario": name,
        "method": method,
        "run": number,
        "outcome": "completed",
        "load": 0.4,
        "link": step.scenario.link,
        "machine": MACHINE,
        "facts": {},
        "seconds": 10.0,
    }
    if method == "floor":
        return base | {"downtime_ms": 140.0 + number, "facts": {"steps": {"pause": 5.0}}}
    if step.scenario.workload is None:
        facts = {"image_bytes": 500 << 20, "packed_bytes": 250 << 20}
        return base | {"first_pull_ms": 18_000.0, "second_start_ms": 900.0, "import_cold_ms": 700.0, "facts": facts}
    memory = step.scenario.workload.memory
    lost = {"precopy_ms": 40.0, "stop_ms": 150.0, "after_ms": 90.0, "total_ms": 280.0 + number, "window_ms": 9000.0}
    moved = base | {
        "damaged": 0,
        "damaged_files": 0,
        "lost": lost,
        "total_ms": memory * 9.0 + 2000,
        "speed": SPEED,
        "series": [[float(at), 1000.0 if at < 2000 or at > 2200 else 100.0, 50.0] for at in range(-1000, 5000, 100)],
    }
    if method in ("unmoved", "restart"):
        again = (
            {"again_ms": 2000.0, "stop_ms": 4000.0, "total_ms": 6000.0}
            if method == "restart"
            else {"stop_ms": 0.0, "total_ms": 3.0}
        )
        return moved | {"downtime_ms": None, "lost": {**lost, **again}}
    return moved | {
        "downtime_ms": DOWNTIMES[method] + memory / 100 + number,
        "home_ms": memory * 9.0 + 1000,
        "resumed_ms": memory * 8.5 + 500,
        "stall_ms": 30.0,
        "stalled_ms": 90.0,
        "stalls_ms": [30.0, 25.0, 8.0, 4.0],
        "wire_bytes": memory << 20,
        "nonzero_bytes": memory << 20,
        "written_bytes": 1 << 20,
        "rounds": 3,
        "facts": {
            "spans": [{"name": name, "start_ms": float(start), "end_ms": float(end)} for name, start, end in SPANS],
            "tracker": "write-protect",
            "rounds_detail": [],
        },
    }


SPEED = {window: {"wall": 1000.0, "cpu": 1000.0} for window in ("before", "during", "second_after")}


def whole(rounds: int = 2) -> list[Record]:
    """An evaluation of so many rounds of the full plan."""
    return [record_of(step) for step in run_plan.steps(run_plan.full(), rounds)]


def quick(rounds: int = 2) -> Iterator[Record]:
    """The same of the two-minute subset."""
    return (record_of(step) for step in run_plan.steps(run_plan.quick(), rounds))
