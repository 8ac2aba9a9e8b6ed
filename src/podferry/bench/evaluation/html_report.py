"""The report itself: one HTML file that needs nothing else, and the same as Markdown with the figures beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from podferry.bench import report
from podferry.bench.evaluation.sections import Figure, Section, sections
from podferry.bench.report import Table

Record = dict[str, Any]

TITLE = "Evaluation of podferry"
FIGURES = "figures"
_CODE = re.compile(r"`([^`]+)`")


def write(records: Sequence[Record], into: Path, command: str, left_out: Sequence[str] = ()) -> Path:
    """Write `index.html`, `README.md` and the figures into a directory; returns the page. `left_out`: what was not run, and why."""
    made = sections(records)
    about = introduction(records, command, left_out)
    (into / FIGURES).mkdir(parents=True, exist_ok=True)
    there = {f"{figure.name}.svg" for section in made for figure in section.figures}
    for old in (into / FIGURES).glob("*.svg"):
        if old.name not in there:
            old.unlink()
    for section in made:
        for figure in section.figures:
            (into / FIGURES / f"{figure.name}.svg").write_text(alone(figure))
    (into / "README.md").write_text(markdown(made, about))
    (page := into / "index.html").write_text(html(made, about))
    return page


def introduction(records: Sequence[Record], command: str, left_out: Sequence[str]) -> list[str]:
    """What was run, where, and how often; as lines of Markdown."""
    trackers = sorted({tracker for one in records if (tracker := one.get("facts", {}).get("tracker"))})
    lines = [
        f"Made by `{command}` in {report.minutes(records)} minutes, {len(records)} runs.",
        *report.machine_lines(records),
    ]
    if trackers:
        lines.append(f"Written pages were found by: {', '.join(trackers)}.")
    return lines + [f"Left out: {one}." for one in left_out]


def markdown(made: Sequence[Section], about: Sequence[str]) -> str:
    """The report as Markdown."""
    parts = [f"# {TITLE}", *about]
    for section in made:
        parts += [f"## {section.title}", *([section.text] if section.text else [])]
        parts += [f"![{figure.caption}]({FIGURES}/{figure.name}.svg)" for figure in section.figures]
        parts += [report.table(rows) for rows in section.tables]
    return "\n\n".join(parts) + "\n"


def html(made: Sequence[Section], about: Sequence[str]) -> str:
    """The report as a page that loads nothing."""
    body = [f"<h1>{TITLE}</h1>", *(f"<p>{_inline(line.removeprefix('- '))}</p>" for line in about)]
    for section in made:
        body.append(f"<h2>{escape(section.title)}</h2>")
        if section.text:
            body.append(f"<p>{_inline(section.text)}</p>")
        if section.figures:
            body.append('<div class="figures">' + "".join(map(_figure, section.figures)) + "</div>")
        body += [f'<div class="scroll">{_table(rows)}</div>' for rows in section.tables]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{TITLE}</title>\n<style>\n{_read('style.css')}{_read('page.css')}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def alone(figure: Figure) -> str:
    """A figure that carries its own style, and is of the reader's colours wherever it is shown."""
    style = f"<style>{_read('style.css')}</style>"
    head, rest = figure.svg.split(">", 1)
    return f"{head}>{style}{rest}\n"


def _figure(figure: Figure) -> str:
    return f'<figure id="{figure.name}"><figcaption>{escape(figure.caption)}</figcaption>{figure.svg}</figure>'


def _table(rows: Table) -> str:
    titles, *others = rows
    head = "".join(f"<th>{escape(cell)}</th>" for cell in titles)
    body = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in others)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _inline(text: str) -> str:
    """Markdown's code and bold in a line, as HTML."""
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", _CODE.sub(r"<code>\1</code>", escape(text)))


def _read(name: str) -> str:
    return files("podferry.bench.evaluation").joinpath(name).read_text(encoding="utf-8")
