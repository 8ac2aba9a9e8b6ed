"""Where the time of a migration went: the same facts for the text, the terminal's picture and the page's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from podferry.cli.record import SOURCE, TARGET, Record, Span

DOWNTIME = "downtime"
FREEZE = "freeze"
ROUND = "round "
FEW_ROUNDS = 5
MARGIN = 0.12


@dataclass(frozen=True)
class Window:
    """A stretch of time, ms since the migration's start."""

    start_ms: float
    end_ms: float

    @property
    def ms(self) -> float:
        """How long it is."""
        return self.end_ms - self.start_ms

    def place(self, ms: float) -> float:
        """Where a moment lies in the window, 0 at its start, 1 at its end; moments outside it stick to the edge."""
        return min(1.0, max(0.0, (ms - self.start_ms) / self.ms)) if self.ms > 0 else 0.0

    def shares(self, span: Span) -> bool:
        """Whether `span` has a part in the window."""
        return span.start_ms < self.end_ms and span.end_ms > self.start_ms

    def widened(self, share: float, whole: Window) -> Window:
        """The window and `share` of its length on either side, kept within `whole`."""
        edge = self.ms * share
        return Window(max(whole.start_ms, self.start_ms - edge), min(whole.end_ms, self.end_ms + edge))


def steps(record: Record) -> list[Span]:
    """What was done, without the span that only names the downtime."""
    return [span for span in record.spans if span.name != DOWNTIME]


def overview(record: Record) -> list[Span]:
    """The steps to show on the whole: those of the cut-over are too short for it, and the close-up has them."""
    close, spans = closeup(record), _folded(steps(record))
    if close is None:
        return spans
    return [span for span in spans if not (span.start_ms >= close.start_ms and span.end_ms <= close.end_ms)]


def _folded(spans: list[Span]) -> list[Span]:
    """The same with one span for all rounds after the first few, so that a long pre-copy does not fill the screen."""
    rounds = [span for span in spans if span.name.startswith(ROUND)]
    late = rounds[FEW_ROUNDS:]
    if len(late) < 2:
        return spans
    name = f"rounds {late[0].name.removeprefix(ROUND)} to {late[-1].name.removeprefix(ROUND)}"
    one = Span(name, late[0].where, late[0].start_ms, max(span.end_ms for span in late))
    return [one if span is late[0] else span for span in spans if span not in late[1:]]


def lanes(spans: list[Span]) -> Iterator[tuple[str, list[Span]]]:
    """The spans of the source, then those of the target."""
    for where in (SOURCE, TARGET):
        yield where, [span for span in spans if span.where == where]


def whole(record: Record) -> Window:
    """From the start to the last thing that is known."""
    ends = [span.end_ms for span in record.spans]
    return Window(0.0, max([*ends, record.total_ms or 0.0, 1.0]))


def downtime(record: Record) -> Window | None:
    """The stretch in which the job stood still; None where it never did, or where the record does not say when."""
    for span in record.spans:
        if span.name == DOWNTIME:
            return Window(span.start_ms, span.end_ms)
    if not record.downtime_ms:
        return None
    start = next((span.start_ms for span in record.spans if span.name == FREEZE), None)
    return None if start is None else Window(start, start + record.downtime_ms)


def closeup(record: Record) -> Window | None:
    """The downtime and a little on either side: the part of the timeline that is too short to see on the whole."""
    still = downtime(record)
    if still is None or still.ms <= 0:
        return None
    return still.widened(MARGIN, whole(record))


def during(spans: list[Span], window: Window) -> list[tuple[Span, float]]:
    """The spans that share time with `window`, with the ms that each shares, in order of their start."""
    shared = [(span, min(span.end_ms, window.end_ms) - max(span.start_ms, window.start_ms)) for span in spans]
    return [(span, ms) for span, ms in shared if ms > 0]


def ticks(window: Window, count: int) -> list[float]:
    """About `count` round moments in the window, ms."""
    if window.ms <= 0 or count < 1:
        return []
    rough = window.ms / count
    power = 1.0
    while power * 10 <= rough:
        power *= 10
    while power > rough:
        power /= 10
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = -(-window.start_ms // step)
    moments: list[float] = []
    while (moment := (first + len(moments)) * step) <= window.end_ms:
        moments.append(moment)
    return moments
