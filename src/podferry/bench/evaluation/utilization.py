"""How near a move comes to what the link and the memory allow."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from podferry.bench.goals import COMPLETED, MIB
from podferry.bench.report import Table, grouped
from podferry.lab.network import bits_per_second

Record = dict[str, Any]

LIMITS_TEXT = (
    "The link's limit is the time that the bytes on the wire take at its rate, against the time from the request until all memory "
    "is on the target. The memory's limit is one thread's copy into new memory on this machine, against the rate at which the "
    "job's memory is put in place after the resume."
)


def link_share(record: Record) -> float | None:
    """The link's limit as a part of the time until all memory is home; `None` where the link has no limit."""
    rate = bits_per_second(record["link"])
    if rate is None or not record.get("wire_bytes") or not record.get("home_ms"):
        return None
    return float(record["wire_bytes"] * 8 / rate / (record["home_ms"] / 1e3))


def fill_rate(record: Record) -> float | None:
    """Bytes a second at which memory was put in place from the resume on; `None` where it came otherwise."""
    job = record.get("workload") or {}
    if job.get("processes", 1) > 1 or job.get("shared"):
        return None  # what is known of its memory is the first process's private memory
    if record["method"] != "live" or not record.get("nonzero_bytes") or record.get("resumed_ms") is None:
        return None
    ms = record["home_ms"] - record["resumed_ms"]
    return float(record["nonzero_bytes"] / ms * 1e3) if ms > 0 else None


def limit_rows(records: Sequence[Record]) -> Table:
    """A row for each scenario and method that carried memory over the link."""
    rows = [["scenario", "method", "link", "wire MiB", "home s", "of the link's limit", "filled GiB/s", "of memcpy"]]
    for (scenario, method), group in grouped(records).items():
        done = [one for one in group if one["outcome"] == COMPLETED and one.get("wire_bytes") and one.get("home_ms")]
        if not done:
            continue
        shares, rates = (
            [one for record in done if (one := link_share(record))],
            [one for record in done if (one := fill_rate(record))],
        )
        copies = [rate for one in done if (rate := one.get("machine", {}).get("memcpy_bytes_per_second"))]
        rows.append(
            [
                scenario,
                method,
                done[0]["link"],
                f"{median(one['wire_bytes'] for one in done) / MIB:.0f}",
                f"{median(one['home_ms'] for one in done) / 1e3:.1f}",
                f"{median(shares):.0%}" if shares else "-",
                f"{median(rates) / 2**30:.2f}" if rates else "-",
                f"{median(rates) / median(copies):.0%}" if rates and copies else "-",
            ]
        )
    return rows
