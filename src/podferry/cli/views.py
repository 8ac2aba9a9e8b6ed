"""How a migration is shown while it runs: live in a terminal, as lines in a log, as JSON for programs."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Protocol, Self

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from podferry.cli import units
from podferry.cli.record import ProgressRecord as Event
from podferry.cli.terminal import plain, print_json, stderr, words
from podferry.cli.timeline import ROUND
from podferry.core.phases import SOURCE_ENDS, SourcePhase

NOTHING_TO_SEND = frozenset({SourcePhase.CHECK, SourcePhase.UNDO, *SOURCE_ENDS})


class EventView(Protocol):
    """Something that follows a migration's events; a context manager, so that the terminal is always given back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def event(self, raw: dict[str, Any], event: Event) -> None:
        """Show where the migration is."""
        ...

    def note(self, text: str) -> None:
        """Say something beside the progress, from any thread."""
        ...


class _Quiet:
    """A view that holds nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def note(self, text: str) -> None:
        """A line on stderr."""
        stderr().print(words(text))


class JsonView(_Quiet):
    """Every event as a JSON line on stdout."""

    def event(self, raw: dict[str, Any], event: Event) -> None:
        """Pass it on as it came."""
        print_json({"type": "progress", **raw}, indent=None)


class PlainView(_Quiet):
    """A line on stderr whenever the phase changes or the agent has something to say."""

    def __init__(self) -> None:
        self._phase = ""

    def event(self, raw: dict[str, Any], event: Event) -> None:
        """Print a line if there is news."""
        if event.phase and (event.phase != self._phase or worth_saying(event)):
            stderr().print(words(line(event)))
        self._phase = event.phase


class LiveView:
    """Phase, bytes, rate and time left in place; a line above it for each phase that is over."""

    def __init__(self) -> None:
        self._console = stderr()
        self._progress = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[facts]}", markup=False),
            console=self._console,
            refresh_per_second=8,
            transient=True,
        )
        self._task = self._progress.add_task("asking the agent", total=None, facts="")
        self._phase: tuple[str, float] | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def event(self, raw: dict[str, Any], event: Event) -> None:
        """Show the newest state."""
        if self._phase is None or self._phase[0] != event.phase:
            self._close(event.t_ms)
            self._phase = (event.phase, event.t_ms) if event.phase else None
        if worth_saying(event):
            self._console.print(words(f"  {event.note}", "dim"))
        self._progress.update(
            self._task,
            description=plain(event.phase),
            completed=event.bytes,
            total=event.total_bytes or None,
            facts=facts(event),
        )

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(words(f"  {text}", "yellow"))

    def _close(self, now_ms: float) -> None:
        if self._phase is not None:
            name, since = self._phase
            self._console.print(words(f"✓ {name:<14} {units.duration(now_ms - since)}", "green"))


def worth_saying(event: Event) -> bool:
    """Whether the event's note is news: the rounds that bridge the wait for the target are many and all alike."""
    return bool(event.note) and not (event.phase == SourcePhase.PREPARE_TARGET and event.note.startswith(ROUND))


def facts(event: Event) -> str:
    """Bytes, rate, time left and round, as far as they are known and still mean something."""
    known: list[str] = []
    if event.phase in NOTHING_TO_SEND:
        return ""
    if event.total_bytes:
        known.append(f"{units.size(event.bytes)} of {units.size(event.total_bytes)}")
    elif event.bytes:
        known.append(units.size(event.bytes))
    if event.rate:
        known.append(units.rate(event.rate))
    if event.round and event.phase == SourcePhase.PRECOPY:
        known.append(f"round {event.round}")
    if event.eta_s is not None:
        known.append(f"{units.duration(event.eta_s * 1000)} left")
    return " · ".join(known)


def line(event: Event) -> str:
    """An event as one line of a log."""
    return f"{event.t_ms / 1000:9.3f} s  {event.phase:<14} {event.note or facts(event)}".rstrip()


def choose(json: bool) -> EventView:
    """The view that fits where the output goes."""
    if json:
        return JsonView()
    return LiveView() if sys.stderr.isatty() else PlainView()
