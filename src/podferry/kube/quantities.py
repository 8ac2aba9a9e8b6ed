"""Times, durations and quantities, as Kubernetes writes them."""

from __future__ import annotations

import datetime
import re

from podferry.kube.objects import DURATION


def timestamp(when: datetime.datetime | None = None) -> str:
    """A time, or now, as metav1.Time."""
    return (when or datetime.datetime.now(datetime.UTC)).astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


_SIZES = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 1 << 10,
    "Mi": 1 << 20,
    "Gi": 1 << 30,
    "Ti": 1 << 40,
}
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(duration: str) -> float:
    """A duration such as 1h30m or 250ms, in seconds. What does not fit the schema's pattern is a ValueError."""
    if not re.fullmatch(DURATION, duration):
        raise ValueError(f"{duration!r} is not a duration such as 1h30m or 250ms")
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([0-9.]+)(ms|s|m|h)", duration))


def quantity(text: str) -> float:
    """A quantity such as 50Mi, as a number."""
    number = text.rstrip("kMGTi")
    return float(number) * _SIZES[text[len(number) :]]


def duration(seconds: float) -> str:
    """A duration as people read it and `seconds` takes it: 412ms, 1.5s, 3m."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f}ms"
    if seconds < 120:
        return f"{seconds:.3g}s"
    return f"{seconds / 60:.0f}m"
