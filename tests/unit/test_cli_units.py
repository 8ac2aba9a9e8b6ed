"""Rates, sizes, times and timelines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.cli.record import Record
from podferry.cli.timeline import Window, closeup, downtime, overview, ticks
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


def a_record(spans: list[tuple[str, float, float]], **fields: object) -> Record:
    contract = dict.fromkeys(("id", "name", "source", "target", "mode"), "x")
    made = [{"name": name, "where": "source", "start_ms": start, "end_ms": end} for name, start, end in spans]
    return Record.from_dict({**contract, "outcome": None, "spans": made, **fields})


def test_the_downtime_is_found_by_its_span_or_by_the_freeze() -> None:
    assert downtime(a_record([("freeze", 100, 110), ("downtime", 101, 300)], downtime_ms=199)) == Window(101, 300)
    assert downtime(a_record([("freeze", 100, 110)], downtime_ms=50)) == Window(100, 150)
    assert downtime(a_record([("freeze", 100, 110)])) is None
    assert downtime(a_record([], downtime_ms=50)) is None
    assert closeup(a_record([("downtime", 1000, 1100), ("fill", 1100, 9000)])) == Window(988, 1112)


def test_the_whole_leaves_out_what_the_closeup_shows_and_folds_late_rounds() -> None:
    rounds = [(f"round {number}", number * 10.0, number * 10.0 + 10) for number in range(1, 31)]
    record = a_record([*rounds, ("freeze", 400, 405), ("downtime", 400, 500), ("fill", 500, 900)])
    shown = [span.name for span in overview(record)]
    assert shown == ["round 1", "round 2", "round 3", "round 4", "round 5", "rounds 6 to 30", "fill"]
