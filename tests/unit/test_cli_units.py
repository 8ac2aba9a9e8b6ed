"""Rates, sizes, times and timelines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.cli.timeline import Window, ticks
from podferry.cli.units import duration, parse_rate, size
from podferry.errors import UsageError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1gbit", 125_000_000),
        ("100mbit", 12_500_000),
        ("100Mbps", None),
        ("100mb", None),
        ("100mbit/s", 12_500_000),
        ("50MiB", 50 << 20),
        ("50 MB/s", 50_000_000),
        ("1.5kB", 1500),
        ("4096", 4096),
        ("0", None),
        ("-5", None),
        ("fast", None),
        ("", None),
        ("1e9", None),
    ],
)
def test_rates(text: str, rate: int | None) -> None:
    if rate is None:
        with pytest.raises(UsageError):
            parse_rate(text)
    else:
        assert parse_rate(text) == rate


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0.04, "0.0 ms"),
        (9.96, "10.0 ms"),
        (312, "312 ms"),
        (4210, "4.2 s"),
        (59_400, "59 s"),
        (185_000, "3 min 05 s"),
        (7_800_000, "2 h 10 min"),
        (None, "?"),
    ],
)
def test_durations(ms: float | None, text: str) -> None:
    assert duration(ms) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1536, "1.5 KiB"), (512 << 20, "512 MiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


@given(st.floats(0, 1e9), st.floats(1e-3, 1e9), st.integers(1, 12))
def test_ticks_lie_in_the_window_and_are_few(start: float, length: float, count: int) -> None:
    window = Window(start, start + length)
    moments = ticks(window, count)
    assert len(moments) <= count + 1
    assert all(window.start_ms <= moment <= window.end_ms for moment in moments)
