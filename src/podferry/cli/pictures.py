"""The pictures of the page: inline SVG whose colours come from the page's style sheet."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from podferry.cli import timeline, units
from podferry.cli.markup import add, el
from podferry.cli.record import Record, RoundRecord, Span
from podferry.cli.timeline import Window

WIDTH = 920.0
LEFT = 92.0
RIGHT = 16.0
ROW = 26.0
BAR = 16.0
TOP = 30.0
LANE_GAP = 14.0
LETTER = 6.6
CAPTION = 14.0
LEAST_LANE = 36.0
ROUND_HEIGHT = 150.0
LABELLED_SLOT = 56.0


def timeline_picture(record: Record, spans: list[Span], window: Window, label: str) -> Element:
    """Those of `spans` that lie in `window`, on a lane for each node, the downtime behind them as a band."""
    names = {"source": record.source, "target": record.target}
    still = timeline.downtime(record)
    lanes = [
        (where, _rows([span for span in lane if window.shares(span)], window)) for where, lane in timeline.lanes(spans)
    ]
    height = TOP + sum(_lane_height(rows) + LANE_GAP for _, rows in lanes) + (CAPTION if still else 0)
    svg = el("svg", viewBox=f"0 0 {WIDTH:.0f} {height:.0f}", role="img", aria_label=label)
    if still is not None:
        left, right = _x(still.start_ms, window), _x(still.end_ms, window)
        band = el(
            "rect", x=left, y=TOP - 6, width=max(1.5, right - left), height=height - TOP - CAPTION, class_="still"
        )
        text = f"downtime {units.duration(still.ms)}"
        edge = len(text) * LETTER / 2
        x = min(WIDTH - edge, max(LEFT + edge, (left + right) / 2))
        caption = el("text", text, x=x, y=height - 4, text_anchor="middle", class_="caption")
        add(svg, _titled(band, text), caption)
    _axis(svg, window, height - (CAPTION if still else 0))
    top = TOP
    for where, rows in lanes:
        lane_height = _lane_height(rows)
        add(svg, el("rect", x=0, y=top - 2, width=WIDTH, height=lane_height + 4, rx=6, class_=f"lane {where}"))
        add(svg, el("text", where, x=10, y=top + 16, class_="where"))
        add(
            svg,
            el("text", _shorten(names[where], LEFT - 14), x=10, y=top + 29, class_="node"),
        )
        for number, row in enumerate(rows):
            for span in row:
                add(svg, *_bar(span, window, top + number * ROW + (ROW - BAR) / 2, where))
        top += lane_height + LANE_GAP
    return svg


def rounds_picture(rounds: list[RoundRecord]) -> Element:
    """Bytes of each round as columns on a logarithmic scale: a migration that converges falls from left to right."""
    svg = el("svg", viewBox=f"0 0 {WIDTH:.0f} {ROUND_HEIGHT + 44:.0f}", role="img", aria_label="bytes of each round")
    slot = min(120.0, WIDTH / max(1, len(rounds)))
    most = max(one.bytes for one in rounds)
    for place, one in enumerate(rounds):
        height = max(2.0, ROUND_HEIGHT * _share(one.bytes, most))
        left, top = place * slot + slot * 0.16, 20 + ROUND_HEIGHT - height
        column = el("rect", x=left, y=top, width=slot * 0.68, height=height, rx=3, class_="column")
        add(svg, _titled(column, f"round {one.number}: {one.pages:,} pages in {units.duration(one.ms)}"))
        if slot >= LABELLED_SLOT:
            x, anchor = left + slot * 0.34, "middle"
        elif place == 0:
            x, anchor = left, "start"
        elif place == len(rounds) - 1:
            x, anchor = left + slot * 0.68, "end"
        else:
            continue
        add(svg, el("text", units.size(one.bytes), x=x, y=top - 6, text_anchor=anchor, class_="value"))
        add(svg, el("text", str(one.number), x=x, y=ROUND_HEIGHT + 36, text_anchor=anchor, class_="tick"))
    return svg


def _share(count: int, most: int) -> float:
    """How high a column is, 0 to 1: full for the most, one fifth less for each factor of ten below it."""
    if count <= 0 or most <= 0:
        return 0.0
    tens, ratio = 0.0, most / count
    while ratio >= 10:
        tens, ratio = tens + 1, ratio / 10
    return max(0.02, 1 - 0.2 * (tens + (ratio - 1) / 9))


def _lane_height(rows: list[list[Span]]) -> float:
    return max(LEAST_LANE, len(rows) * ROW)


def _rows(spans: list[Span], window: Window) -> list[list[Span]]:
    """Spans packed into as few rows as keep the bars and the labels beside them apart."""
    rows: list[tuple[float, list[Span]]] = []
    for span in spans:
        start, end = _extent(span, window)
        for place, (taken, row) in enumerate(rows):
            if start >= taken:
                row.append(span)
                rows[place] = (end, row)
                break
        else:
            rows.append((end, [span]))
    return [row for _, row in rows]


def _extent(span: Span, window: Window) -> tuple[float, float]:
    """From where to where a bar and its label reach, in picture units."""
    left, right = _x(span.start_ms, window), _x(span.end_ms, window)
    label = len(_label(span)) * LETTER + 10
    if label <= right - left:
        return left, right
    return (left, right + label) if right + label <= WIDTH - RIGHT else (left - label, right)


def _bar(span: Span, window: Window, top: float, where: str) -> list[Element]:
    left, right = _x(span.start_ms, window), _x(span.end_ms, window)
    bar = el("rect", x=left, y=top, width=max(2.0, right - left), height=BAR, rx=3, class_=f"bar {where}")
    label, width = _label(span), len(_label(span)) * LETTER + 10
    if width <= right - left:
        x, anchor, kind = left + 6, "start", "inside"
    elif right + width <= WIDTH - RIGHT:
        x, anchor, kind = right + 5, "start", "beside"
    else:
        x, anchor, kind = left - 5, "end", "beside"
    text = el("text", label, x=x, y=top + 12, text_anchor=anchor, class_=kind)
    detail = f"{label}, from {units.duration(span.start_ms)}{f': {span.detail}' if span.detail else ''}"
    return [_titled(bar, detail), text]


def _label(span: Span) -> str:
    return f"{span.name} {units.duration(span.ms)}"


def _axis(svg: Element, window: Window, height: float) -> None:
    moments = timeline.ticks(window, 8)
    for moment in moments:
        x = _x(moment, window)
        add(svg, el("line", x1=x, x2=x, y1=TOP - 8, y2=height - LANE_GAP + 2, class_="grid"))
        add(svg, el("text", _moment(moment, moments), x=x, y=14, text_anchor="middle", class_="tick"))


def _moment(ms: float, moments: list[float]) -> str:
    """A tick's label, with as many digits as the ticks need to differ."""
    step = moments[1] - moments[0] if len(moments) > 1 else 1000.0
    if step >= 60_000:
        return f"{ms / 60_000:.0f} min" if step % 60_000 == 0 else f"{ms / 60_000:.1f} min"
    digits = 0 if step >= 1000 else 1 if step >= 100 else 2 if step >= 10 else 3
    return f"{ms / 1000:.{digits}f} s"


def _x(ms: float, window: Window) -> float:
    return LEFT + window.place(ms) * (WIDTH - LEFT - RIGHT)


def _shorten(text: str, width: float) -> str:
    most = int(width / LETTER)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _titled(node: Element, title: str) -> Element:
    add(node, el("title", title))
    return node
