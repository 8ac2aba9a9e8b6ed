"""Charts as SVG whose colours and letters come from a style sheet: the page's, or their own where they stand alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

Point = tuple[float, float]

WIDTH, HEIGHT = 480.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 14.0, 26.0, 40.0
ROW = 24.0
LABEL = 150.0
LETTER = 6.3
TICKS = 5
TONES = 6
"""How many colours the style sheet has."""


@dataclass(frozen=True)
class Series:
    """Points of one thing: joined where `line`, as a staircase where `stairs`, else each alone. `tone` numbers its colour."""

    name: str
    points: Sequence[Point]
    tone: int = 0
    line: bool = True
    stairs: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Scale:
    """From values to places on the page."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where `value` is."""
        low, high, here = (math.log10(max(one, 1e-9)) if self.log else one for one in (self.low, self.high, value))
        share = (here - low) / (high - low) if high > low else 0.5
        return self.start + (self.end - self.start) * min(1.0, max(0.0, share))


def ticks(low: float, high: float, *, log: bool = False) -> list[float]:
    """Round values from `low` to `high`; with `log` powers of ten and, where these are few, 2 and 5 times as much."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1,) if len(powers) > 3 else (1, 2, 5)
        return [
            value for power in powers for step in steps if low <= (value := step * 10.0**power) <= high * (1 + 1e-9)
        ]
    if high <= low:
        return [low]
    rough = (high - low) / TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's label."""
    if value and abs(value) < 0.01:
        return f"{value:.0e}"
    return f"{value:,.10g}" if abs(value) >= 1 or value == 0 else f"{value:g}"


@dataclass(frozen=True)
class Chart:
    """An x-y chart. `marks` are labelled places on the x axis in place of round values; `band` is a span of x that is shaded."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    marks: Sequence[tuple[float, str]] = ()
    band: tuple[float, float] | None = None
    from_zero: bool = field(default=True)

    def svg(self) -> str:
        """The picture."""
        across, up = self._scales()
        parts = [_text(LEFT, HEIGHT - 6, self.x, "label"), _text(2, 12, self.y, "label")]
        if self.band:
            start, end = sorted(across(value) for value in self.band)
            parts.append(f'<rect class="band" x="{start:.1f}" y="{TOP}" width="{max(2.0, end - start):.1f}" '
                         f'height="{HEIGHT - TOP - BOTTOM}"/>')  # fmt: skip
        for value in ticks(up.low, up.high, log=self.log_y):
            parts.append(_line((LEFT, up(value)), (WIDTH - RIGHT, up(value)), "grid"))
            parts.append(_text(LEFT - 6, up(value) + 4, number(value), "tick", "end"))
        for value, label in self.marks or [
            (one, number(one)) for one in ticks(across.low, across.high, log=self.log_x)
        ]:
            parts.append(_line((across(value), HEIGHT - BOTTOM), (across(value), HEIGHT - BOTTOM + 4), "grid"))
            parts.append(_text(across(value), HEIGHT - BOTTOM + 16, label, "tick", "middle"))
        for one in self.series:
            parts += _drawn(one, across, up)
        parts += _legend(self.series)
        return _svg(self.title, HEIGHT, parts)

    def _scales(self) -> tuple[Scale, Scale]:
        points = [point for one in self.series for point in one.points]
        xs, ys = [x for x, _ in points] + [mark for mark, _ in self.marks], [y for _, y in points]
        low = min(ys) if self.log_y else min([0.0] * self.from_zero + ys)
        high = max(ys) * (1.3 if self.log_y else 1.08) or 1.0
        return (
            Scale(min(xs), max(xs), LEFT + 8, WIDTH - RIGHT - 8, self.log_x),
            Scale(low / 1.3 if self.log_y else low, high, HEIGHT - BOTTOM, TOP + 6, self.log_y),
        )


@dataclass(frozen=True)
class Bars:
    """Lying bars: each row's median, and every one of its values as a stroke."""

    title: str
    x: str
    rows: Sequence[tuple[str, float, Sequence[float]]]
    log: bool = False
    emphasised: frozenset[str] = frozenset()

    def svg(self) -> str:
        """The picture."""
        height = TOP + len(self.rows) * ROW + BOTTOM
        values = [value for _, middle, every in self.rows for value in (middle, *every)]
        low = min(value for value in values if value > 0) / 2 if self.log and max(values) > 0 else min(0.0, *values)
        across = Scale(low, max(values) * (2.2 if self.log else 1.18) or 1.0, LABEL, WIDTH - RIGHT, self.log)
        parts = [_text(LABEL, height - 6, self.x, "label")]
        for value in ticks(across.low, across.high, log=self.log):
            parts.append(_line((across(value), TOP), (across(value), height - BOTTOM), "grid"))
            parts.append(_text(across(value), height - BOTTOM + 14, number(value), "tick", "middle"))
        for place, (label, middle, every) in enumerate(self.rows):
            top = TOP + place * ROW
            start, end = sorted((across(0.0 if not self.log else across.low), across(middle)))
            kind = "bar strong" if label in self.emphasised else "bar"
            parts.append(f'<rect class="{kind}" x="{start:.1f}" y="{top + 4:.1f}" width="{max(1.0, end - start):.1f}" '
                         f'height="{ROW - 9}"><title>{escape(label)}: {middle:.4g}</title></rect>')  # fmt: skip
            parts += [_line((across(value), top + 3), (across(value), top + ROW - 4), "stroke") for value in every]
            parts.append(_text(LABEL - 6, top + ROW / 2 + 4, label, "name", "end"))
            right = max(across(value) for value in (across.low if self.log else 0.0, middle, *every)) + 5
            parts.append(_text(min(right, WIDTH - RIGHT - 34), top + ROW / 2 + 4, f"{middle:,.4g}", "value"))
        return _svg(self.title, height, parts)


@dataclass(frozen=True)
class Waterfall:
    """Steps one below the other, each from its start to its end; `band` is shaded behind them."""

    title: str
    x: str
    steps: Sequence[tuple[str, float, float, int]]
    band: tuple[float, float] | None = None

    def svg(self) -> str:
        """The picture."""
        height = TOP + len(self.steps) * ROW + BOTTOM
        low, high = min(start for _, start, _, _ in self.steps), max(end for _, _, end, _ in self.steps)
        across = Scale(low, high, LABEL, WIDTH - RIGHT - 44)
        parts = [_text(LABEL, height - 6, self.x, "label")]
        if self.band:
            start, end = (across(value) for value in self.band)
            parts.append(f'<rect class="band" x="{start:.1f}" y="{TOP}" width="{max(2.0, end - start):.1f}" '
                         f'height="{height - TOP - BOTTOM}"/>')  # fmt: skip
        for value in ticks(low, high):
            parts.append(_line((across(value), TOP), (across(value), height - BOTTOM), "grid"))
            parts.append(_text(across(value), height - BOTTOM + 14, number(value), "tick", "middle"))
        for place, (label, start, end, tone) in enumerate(self.steps):
            top, left = TOP + place * ROW, across(start)
            width = max(1.5, across(end) - left)
            parts.append(f'<rect class="tone{tone % TONES} step" x="{left:.1f}" y="{top + 5:.1f}" width="{width:.1f}" '
                         f'height="{ROW - 10}"><title>{escape(label)}: {start:.1f} to {end:.1f}</title></rect>')  # fmt: skip
            parts.append(_text(LABEL - 6, top + ROW / 2 + 4, label, "name", "end"))
            parts.append(_text(left + width + 4, top + ROW / 2 + 4, f"{end - start:,.0f}", "value"))
        return _svg(self.title, height, parts)


def _drawn(one: Series, across: Scale, up: Scale) -> list[str]:
    places = [(across(x), up(y)) for x, y in one.points]
    tone = f"tone{one.tone % TONES}"
    if not one.line:
        return [f'<circle class="{tone} dot" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places]
    if one.stairs:
        places = places[:1] + [
            corner for before, after in pairwise(places) for corner in ((after[0], before[1]), after)
        ]
    path = " ".join(f"{'L' if place else 'M'}{x:.1f} {y:.1f}" for place, (x, y) in enumerate(places))
    return [f'<path class="{tone} line{" dashed" * one.dashed}" d="{path}"/>']


def _legend(series: Sequence[Series]) -> list[str]:
    parts, right = [], WIDTH - RIGHT
    for one in reversed([one for one in series if one.name]):
        right -= len(one.name) * LETTER + 4
        parts.append(_text(right, 12, one.name, "name"))
        parts.append(f'<circle class="tone{one.tone % TONES} dot" cx="{right - 7:.1f}" cy="8" r="4"/>')
        right -= 22
    return parts


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    inside = "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{inside}</svg>'
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(start: Point, end: Point, kind: str) -> str:
    return f'<line class="{kind}" x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'
