"""The timeline and the other pictures that `podferry` draws in a terminal."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from podferry.cli import explanation, timeline, units
from podferry.cli.record import Record, Span
from podferry.cli.terminal import words
from podferry.cli.timeline import Window
from podferry.model import Outcome

FIRST_ROUNDS, LAST_ROUNDS = 6, 4
WIDTH, LEAST_WIDTH = 48, 16
STYLE = {
    Outcome.COMPLETED: "bold green",
    Outcome.REFUSED: "bold yellow",
    Outcome.ROLLED_BACK: "bold yellow",
    Outcome.CANCELLED: "bold yellow",
    Outcome.FAILED: "bold red",
    Outcome.REHEARSED: "bold green",
}


def summary(record: Record) -> RenderableType:
    """Headline, timeline and numbers: what `migrate` ends with."""
    style = STYLE[record.outcome] if record.outcome else "bold cyan"
    parts: list[RenderableType] = [words(explanation.headline(record), style)]
    if record.reason and record.outcome is not Outcome.COMPLETED:
        parts.append(words(f"  {record.reason}"))
    if record.spans:
        parts += [Text(), timeline_of(record)]
    parts += [Text(), numbers(record)]
    if record.id:
        parts.append(words(f"more: podferry explain {record.id}", "dim"))
    return Group(*parts)


def explained(record: Record) -> RenderableType:
    """All of it: what `explain` prints."""
    style = STYLE[record.outcome] if record.outcome else "bold cyan"
    parts: list[RenderableType] = [words(explanation.headline(record), style)]
    for paragraph in explanation.paragraphs(record):
        parts += [Text(), words(paragraph)]
    if record.spans:
        parts += [Text(), timeline_of(record)]
    if record.rounds_detail:
        parts += [Text(), rounds(record)]
    if record.error is not None:
        parts += [Text(), words(record.error.report(), "red")]
    parts += [Text(), numbers(record)]
    return Group(*parts)


def timeline_of(record: Record) -> RenderableType:
    """The whole as bars, and the downtime again enlarged."""
    whole, still, close = timeline.whole(record), timeline.downtime(record), timeline.closeup(record)
    title = f"the whole, {units.duration(whole.ms)}"
    parts: list[RenderableType] = [_bars(title, timeline.overview(record), whole, still)]
    if still is not None and close is not None:
        parts += [Text(), _bars(f"the downtime, {units.duration(still.ms)}", timeline.steps(record), close, still)]
    return Group(*parts)


def numbers(record: Record) -> RenderableType:
    """What was moved, in one line, and how long each phase took, in another."""
    times = (("downtime", record.downtime_ms), ("total", record.total_ms))
    facts = [
        *(f"{name} {units.duration(ms)}" for name, ms in times if ms is not None),
        f"memory {units.size(record.memory_bytes)}",
        f"files {units.size(record.upper_bytes)}",
        f"wire {units.size(record.wire_bytes)}",
        f"rounds {record.rounds}",
        f"mode {record.mode}",
    ]
    lines = [words(" · ".join(facts))]
    if record.phases:
        lines.append(words(" · ".join(f"{name} {units.duration(ms)}" for name, ms in record.phases.items()), "dim"))
    return Group(*lines)


def rounds(record: Record) -> RenderableType:
    """The pre-copy rounds as a table; of many the first and the last."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("round", "pages", "sent", "took", "job wrote"):
        table.add_column(title, justify="right")
    shown = record.rounds_detail
    hidden = len(shown) - FIRST_ROUNDS - LAST_ROUNDS
    for place, one in enumerate(shown):
        if hidden > 1 and place == FIRST_ROUNDS:
            table.add_row("...", "", f"{hidden} more", "", "", style="dim")
        if hidden > 1 and FIRST_ROUNDS <= place < len(shown) - LAST_ROUNDS:
            continue
        table.add_row(
            str(one.number),
            f"{one.pages:,}",
            units.size(one.bytes),
            units.duration(one.ms),
            units.rate(one.dirty_rate) if one.dirty_rate is not None else "",
        )
    return table


def _bars(title: str, spans: list[Span], window: Window, still: Window | None) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column(title)
    table.add_column("", justify="right", no_wrap=True)
    for where, lane in timeline.lanes(spans):
        label = where
        for span in lane:
            if window.shares(span):
                table.add_row(words(label, "dim"), words(span.name), Bar(span, window, still), units.duration(span.ms))
                label = ""
    if still is not None:
        bar = Bar(Span(timeline.DOWNTIME, "", still.start_ms, still.end_ms), window, still)
        table.add_row("", words(timeline.DOWNTIME, "red"), bar, words(units.duration(still.ms), "red"))
    return table


@dataclass(frozen=True)
class Bar:
    """A span as a bar on its window, as wide as there is room; the cells in which the job stood still are heavy and red."""

    span: Span
    window: Window
    still: Window | None

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(LEAST_WIDTH, options.max_width), min(WIDTH, options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(WIDTH, options.max_width)
        first = min(width - 1, int(self.window.place(self.span.start_ms) * width))
        last = max(first + 1, round(self.window.place(self.span.end_ms) * width))
        bar = Text("·" * first, "bright_black")
        for cell in range(first, last):
            stopped = self._stopped(self.window.start_ms + (cell + 0.5) / width * self.window.ms)
            bar.append("█" if stopped else "▬", "red" if stopped else "cyan")
        yield bar.append("·" * (width - last), "bright_black")

    def _stopped(self, moment: float) -> bool:
        """On a picture of the whole a cell is longer than the downtime: there only the downtime's own bar is heavy."""
        if self.span.name == timeline.DOWNTIME:
            return True
        if self.still is None or self.window.ms > 8 * self.still.ms:
            return False
        return self.still.start_ms <= moment < self.still.end_ms
