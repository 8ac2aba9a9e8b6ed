"""Sizes, rates and times as people write and read them."""

from __future__ import annotations

import re

from podferry.errors import UsageError

BITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
BYTES = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)(?:/s)?")


def parse_rate(text: str) -> int:
    """Bytes a second from `100mbit` (bits, as tc writes it), `50MiB`, `50MB/s` or a bare number of bytes.

    Raises `UsageError` for anything else (`100mb` and `100Mbps` too: bits or bytes?) and for less than one byte a second.
    """
    match = RATE.fullmatch(text.strip())
    number, unit = (float(match[1]), match[2]) if match else (0.0, "?")
    if unit.lower() in BITS:
        rate = int(number * BITS[unit.lower()] / 8)
    elif unit in BYTES:
        rate = int(number * BYTES[unit])
    else:
        rate = 0
    if rate < 1:
        raise UsageError(f"not a rate: {text!r}", remedy="write it like 100mbit, 1gbit, 50MiB or 50MB/s")
    return rate


def size(count: float | None) -> str:
    """Bytes as a person reads them: `1.2 GiB`."""
    if count is None:
        return "?"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def rate(count: float | None) -> str:
    """Bytes a second as a person reads them."""
    return "?" if count is None else f"{size(count)}/s"


def duration(ms: float | None) -> str:
    """Milliseconds as a person reads them: `312 ms`, `4.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if ms is None:
        return "?"
    if ms < 10:
        return f"{ms:.1f} ms"
    if ms < 1000:
        return f"{ms:.0f} ms"
    if ms < 60_000:
        return f"{ms / 1000:.1f} s" if ms < 20_000 else f"{ms / 1000:.0f} s"
    minutes, seconds = divmod(round(ms / 1000), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min"
