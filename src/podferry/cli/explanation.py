"""One migration told in words."""

from __future__ import annotations

from podferry.cli import units
from podferry.cli.record import Record, RoundRecord
from podferry.cli.timeline import downtime, during, steps
from podferry.core.phases import SourcePhase
from podferry.model import Dump, Outcome

_DUMPS = {
    Dump.MEMORY_SKIPPING: " CRIU's dump was prepared before, and left private memory where it was.",
    Dump.PREPARED: " CRIU's dump was prepared before; it handed private memory to pipes.",
    Dump.ORDINARY: " CRIU's dump was begun after the freeze, and handed private memory to pipes.",
}


def headline(record: Record) -> str:
    """What happened, in one sentence."""
    way = f"from {record.source} to {record.target}"
    told = {
        None: f"{record.name} is being moved {way}: {record.phase}.",
        Outcome.COMPLETED: f"{record.name} moved {way} and stood still for {units.duration(record.downtime_ms)}.",
        Outcome.REFUSED: f"{record.name} could not be moved {way}; nothing was touched.",
        Outcome.ROLLED_BACK: f"{record.name} was not moved {way}; it keeps running on {record.source}.",
        Outcome.CANCELLED: f"The move of {record.name} {way} was cancelled; it keeps running on {record.source}.",
        Outcome.FAILED: f"The move of {record.name} {way} failed.",
        Outcome.REHEARSED: f"The move of {record.name} {way} was rehearsed: it can move, and keeps running on {record.source}.",
    }
    return told[record.outcome]


def paragraphs(record: Record) -> list[str]:
    """What explains the headline, a paragraph a piece; what the record does not know is left out."""
    told = [_reason(record), _precopy(record), _stop(record), _after(record), _way_out(record)]
    return [paragraph for paragraph in told if paragraph]


def _reason(record: Record) -> str:
    if record.outcome in (None, Outcome.COMPLETED, Outcome.REHEARSED) or not record.reason:
        return ""
    return f"The reason: {_sentence(record.reason)}"


def _precopy(record: Record) -> str:
    rounds = record.rounds_detail
    if not rounds:
        return ""
    first, last = rounds[0], rounds[-1]
    text = (
        f"Its memory was copied while it ran, {units.size(record.memory_bytes)} in all. "
        f"The first round sent {units.size(first.bytes)} in {units.duration(first.ms)}"
    )
    if len(rounds) > 1:
        text += (
            f"; {_count(len(rounds) - 1, 'later round')} sent only what the job had written since, "
            f"down to {units.size(last.bytes)} in the last"
        )
    text += f".{_writes(rounds)}"
    if record.tracker:
        why = record.raw.get("tracker_reason")
        text += f" Written pages were found by {record.tracker}{f' ({why})' if why else ''}."
    return text


def _writes(rounds: list[RoundRecord]) -> str:
    known = [(one.dirty_rate, one.ms) for one in rounds if one.dirty_rate is not None and one.ms > 0]
    took = sum(ms for _, ms in known)
    return f" Meanwhile the job wrote {units.rate(sum(rate * ms for rate, ms in known) / took)}." if took else ""


def _stop(record: Record) -> str:
    still = downtime(record)
    if still is None or record.downtime_ms is None:
        return ""
    shares = sorted(during(steps(record), still), key=lambda one: -one[1])
    parts = [f"{span.name} on the {span.where} {units.duration(ms)}" for span, ms in shares[:4]]
    text = f"It stopped {units.duration(still.start_ms)} after the start, for {units.duration(record.downtime_ms)}"
    if parts:
        text += f"; {'most of it' if len(shares) > len(parts) else 'that was'}: {', '.join(parts)}"
    return f"{text}.{_dump(record)}"


def _dump(record: Record) -> str:
    said = record.raw.get("dump")
    said = Dump.MEMORY_SKIPPING if said == "thin" else said
    return _DUMPS[Dump(said)] if said in list(Dump) else ""


def _after(record: Record) -> str:
    if record.outcome is not Outcome.COMPLETED:
        return ""
    text = f"All of it took {units.duration(record.total_ms)} and put {units.size(record.wire_bytes)} on the wire"
    if record.upper_bytes:
        text += f", {units.size(record.upper_bytes)} of it files that the container had changed"
    text += "."
    if record.postcopy_dependency:
        text += f" The job ran before all its pages were home: until they were, it depended on {record.source}."
    return text


def _way_out(record: Record) -> str:
    if record.outcome is None and record.phase == SourcePhase.LOST:
        return (
            f"The right to run has passed to {record.target}, which does not answer; the source is frozen, not lost. "
            f"They settle it when they meet again. If that cannot be, decide: podferry resolve {record.id} --run-on NODE."
        )
    if record.error is not None and record.error.remedy:
        return f"What to do: {_sentence(record.error.remedy)}"
    return ""


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
