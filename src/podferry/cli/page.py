"""`podferry explain --html`: one migration as one page that needs nothing else."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from importlib.resources import files
from xml.etree.ElementTree import Element

from podferry import __version__
from podferry.cli import explanation, timeline, units
from podferry.cli.markup import Child, el, render
from podferry.cli.pictures import rounds_picture, timeline_picture
from podferry.cli.record import Record
from podferry.model import Outcome

MANY_ROUNDS = 12
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(record: Record) -> str:
    """The whole document, as text."""
    style = files("podferry.cli").joinpath("page.css").read_text(encoding="utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("title", f"podferry: {record.name} from {record.source} to {record.target}"),
        el("style", style),
    )
    body = el(
        "body",
        el(
            "main",
            _header(record),
            _figures(record),
            _error(record),
            el("section", *[el("p", text) for text in explanation.paragraphs(record)], class_="explanation"),
            _timeline(record),
            _rounds(record),
            _phases(record),
            _raw(record),
            el("footer", f"podferry {__version__}"),
        ),
    )
    return render(el("html", head, body, lang="en"))


def _header(record: Record) -> Element:
    badge = str(record.outcome or record.phase or "in progress")
    kind = {Outcome.COMPLETED: "good", Outcome.FAILED: "bad", None: "going"}.get(record.outcome, "warn")
    facts = [f"migration {record.id}", f"mode {record.mode}"]
    if record.started_at:
        facts.append(datetime.fromtimestamp(record.started_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))
    return el(
        "header",
        el("span", badge, class_=f"badge {kind}"),
        el("h1", *_unbroken(explanation.headline(record))),
        el("p", " · ".join(facts), class_="sub"),
    )


def _unbroken(text: str) -> list[Child]:
    """The words, so marked that a node's name is not broken at its dash."""
    pieces: list[Child] = []
    for word in text.split(" "):
        pieces += [el("span", word, class_="unbroken") if "-" in word else word, " "]
    return pieces[:-1]


def _figures(record: Record) -> Element:
    tiles = [
        ("downtime", units.duration(record.downtime_ms) if record.downtime_ms is not None else "none"),
        ("in all", units.duration(record.total_ms)),
        ("memory", units.size(record.memory_bytes)),
        ("changed files", units.size(record.upper_bytes)),
        ("on the wire", units.size(record.wire_bytes)),
        ("rounds", str(record.rounds)),
    ]
    return el(
        "dl",
        *[
            el(
                "div",
                el("dt", name),
                el("dd", value),
                class_="tile main" if place == 0 and record.downtime_ms else "tile",
            )
            for place, (name, value) in enumerate(tiles)
        ],
        class_="tiles",
    )


def _error(record: Record) -> Child:
    error = record.error
    if error is None:
        return None
    return el(
        "section",
        el("p", f"{error} [{error.code}]", class_="what"),
        el("pre", "\n".join(error.evidence)) if error.evidence else None,
        el("p", f"What to do: {error.remedy}") if error.remedy else None,
        class_="error",
    )


def _timeline(record: Record) -> Child:
    if not record.spans:
        return None
    still, close = timeline.downtime(record), timeline.closeup(record)
    parts: list[Child] = [el("h2", "Timeline")]
    parts.append(
        _scrolling(timeline_picture(record, timeline.overview(record), timeline.whole(record), "the whole migration"))
    )
    if still is not None and close is not None:
        parts.append(el("h3", f"The downtime, enlarged: {units.duration(still.ms)}"))
        parts.append(_scrolling(timeline_picture(record, timeline.steps(record), close, "the downtime, enlarged")))
        rows = [
            [span.name, span.where, units.duration(ms), f"{100 * ms / still.ms:.0f} %", span.detail]
            for span, ms in timeline.during(timeline.steps(record), still)
        ]
        if rows:
            titles = ["step", "node", "in the downtime", "share", ""]
            parts.append(_table(titles, rows, numbers={2, 3}))
            parts.append(
                el("p", "Steps on the two nodes overlap, so the shares may add up to more than all.", class_="sub")
            )
    return el("section", *parts)


def _rounds(record: Record) -> Child:
    if not record.rounds_detail:
        return None
    rows = [
        [
            str(one.number),
            f"{one.pages:,}",
            units.size(one.bytes),
            units.duration(one.ms),
            units.rate(one.bytes * 1000 / one.ms) if one.ms > 0 else "",
            units.rate(one.dirty_rate) if one.dirty_rate is not None else "",
        ]
        for one in record.rounds_detail
    ]
    table = _table(["round", "pages", "sent", "took", "rate", "job wrote"], rows, numbers=set(range(6)))
    return el(
        "section",
        el("h2", "Rounds"),
        el("p", "What each pre-copy round sent; a fifth of the height is a factor of ten.", class_="sub"),
        _scrolling(rounds_picture(record.rounds_detail)),
        table if len(rows) <= MANY_ROUNDS else el("details", el("summary", f"All {len(rows)} rounds"), table),
    )


def _phases(record: Record) -> Child:
    if not record.phases:
        return None
    total = sum(record.phases.values()) or 1.0
    rows = [[name, units.duration(ms), f"{100 * ms / total:.1f} %"] for name, ms in record.phases.items()]
    return el("section", el("h2", "Phases"), _table(["phase", "took", "share"], rows, numbers={1, 2}))


def _raw(record: Record) -> Element:
    text = json.dumps(record.raw, indent=2, ensure_ascii=False)
    return el("details", el("summary", "The record, as JSON"), el("pre", text))


def _table(titles: list[str], rows: list[list[str]], *, numbers: set[int]) -> Element:
    def row(tag: str, cells: list[str]) -> Element:
        marks = ["number" if place in numbers else None for place in range(len(cells))]
        return el("tr", *[el(tag, cell, class_=mark) for cell, mark in zip(cells, marks, strict=True)])

    return _scrolling(el("table", el("thead", row("th", titles)), el("tbody", *[row("td", cells) for cells in rows])))


def _scrolling(content: Element) -> Element:
    return el("div", content, class_="scroll")
