"""A migration's journal: what an agent needs to finish or undo it after it was killed.

One directory a migration, one file of JSON lines in it, only ever appended to. A line is whole with its newline; one that is not
was torn by a crash or a full disk and is dropped: what it would have recorded had not begun, since every line is written before the
act it announces. A write that is cut short is an error, and what it left is cut off before anything else is written: nothing that
was written later may be hidden behind half a line. The first line names the format; journals without it are of format 1, which
differs from format 2 in nothing else. From format 3 on what a container alone holds and knows is written under its number, 0, as in
a pod's journal. Format 4 calls some phases and kinds by other names; those of earlier journals are read as these.

A killed agent loses nothing that it wrote; only a node that dies could, and its containers die with it. So a line is synced to
disk only where it passes the right to run.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from podferry.core.phases import SOURCE_ENDS, TARGET_ENDS
from podferry.core.undo import Acquired, Ledger
from podferry.errors import Failed, PodferryError
from podferry.fs.private import private_directory
from podferry.fs.replacing import replace_file

JOURNAL = "journal.jsonl"
RECORD = "record.json"
FORMAT = 4
FORMATS = (1, 2, 3, 4)
NUMBERED = 3
"""The format from which on a container alone is written down as a pod of one is."""
KEEP_SECONDS = 90 * 86400.0
PHASES_BEFORE = {"poise": "prepare-target", "poised": "prepared"}
KINDS_BEFORE = {"hold": "held-dump", "door": "exec-lock", "feeder": "lazy-pages-daemon"}
"""What phases and kinds are called up to format 3, and since."""
_BEGINS = b'{"t":'


class Facts(TypedDict, total=False):
    """Facts of a migration as a whole that outlive a killed agent."""

    role: str
    """`source` or `target`."""
    record: dict[str, Any]
    """`podferry.engine.migration_record.MigrationRecord.to_dict`, as it was at the beginning."""
    offered: dict[str, Any]
    """The source's offer in its wire format."""
    pod: dict[str, str]
    """On the source of a pod: its name."""
    promise: dict[str, int]
    """On the target: what was promised of memory and disk."""
    postcopy: bool
    """Whether memory comes after the resume, once that is decided."""
    frozen_at: float
    """On the source: when the job was frozen, in seconds of this node's monotonic clock."""
    rehearsal: bool
    """The target judges images, and nothing is to run there."""
    go: bool
    """On the target: the right to run has come. On the source: it has passed."""
    keeps_name: bool
    """On the target of a pod: it has the source's name, and is made after GO."""
    target_pod: str
    """On the target of a pod: the uid of the pod that was made."""


class PartFacts(Facts, total=False):
    """Facts of one container, beside those of the whole migration."""

    uid: str
    """Of the pod that was made, once podferry-runc may ask by it; of one that keeps its name, the migration's id in its place."""
    made_as: str
    """Of a pod that keeps its name: its uid."""
    container: str
    """Its id, once the kubelet has made it."""
    released: bool
    """podferry-runc was told to restore it."""
    wrapper: list[int] | None
    """podferry-runc at that time: its pid, and when it started."""
    filled: dict[str, Any]
    """The lazy-pages daemon's figures, once every page was in its place."""


class Journal:
    """The lines of one migration on one node, and the ledger that they add up to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        private_directory(directory, below=directory.parent)
        self._lines, self._end = _read(directory / JOURNAL)
        self.format = int(self._lines[0].get("format", 1)) if self._lines else FORMAT
        self._file = os.open(directory / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.ledger = Ledger()
        self.facts: Facts = {}
        self.phase = ""
        try:
            for line in self._lines:
                self._apply(line)
        except (KeyError, TypeError, ValueError) as error:
            self.close()
            raise Failed.because(f"the journal {directory / JOURNAL} is damaged", error) from error

    def enter(self, phase: str, *, sync: bool = False) -> None:
        """Write down the phase that begins now. With `sync` it is on disk when this returns."""
        self._append({"phase": phase}, sync=sync)

    def note(self, **facts: Unpack[Facts]) -> None:
        """Write down facts of the whole migration: names, peers, what was agreed."""
        self.note_numbered(facts)

    def note_numbered(self, facts: Mapping[str, Any]) -> None:
        """Write down facts under names that `Part` has given a number."""
        self._append({"facts": dict(facts)})

    def acquire(self, kind: str, **facts: Any) -> None:
        """Write down what is about to be acquired, and how to recognise it."""
        self._append({"acquire": kind, "with": facts})

    def release(self, kind: str) -> None:
        """Strike out what was given back in the ordinary course."""
        self._append({"release": kind})

    @property
    def is_empty(self) -> bool:
        """Whether not one line was written: there was no room, or the agent was killed, before the migration had begun."""
        return not self._end

    @property
    def is_of_a_pod(self) -> bool:
        """Whether the migration is that of a pod, and not of a container alone."""
        return "pod" in self.facts or "pod" in self.facts.get("offered", {})

    def held(self, kind: str) -> Mapping[str, Any] | None:
        """The facts of what is held of that kind, or None."""
        return self.ledger.facts(kind)

    def save_record(self, record: Mapping[str, Any]) -> None:
        """Keep what `podferry status` shows of a migration, replacing what was kept before."""
        replace_file(self.directory / RECORD, json.dumps(record).encode())

    def load_record(self) -> dict[str, Any] | None:
        """The record that `save_record` wrote last, or None."""
        try:
            loaded = json.loads((self.directory / RECORD).read_text())
        except (OSError, ValueError):
            return None
        return _renamed(loaded) if isinstance(loaded, dict) else None

    def close(self) -> None:
        """Close the file; the journal stays."""
        os.close(self._file)

    def _append(self, line: dict[str, Any], *, sync: bool = False) -> None:
        line = {"t": round(time.time(), 6), **line}
        data = (b"" if self._end else _line({"format": FORMAT})) + _line(line)
        if os.fstat(self._file).st_size != self._end:
            os.ftruncate(self._file, self._end)
        written = os.write(self._file, data)
        if written != len(data):
            raise OSError(
                errno.ENOSPC, f"only {written} of {len(data)} bytes were written", str(self.directory / JOURNAL)
            )
        self._end += written
        if sync:
            os.fsync(self._file)
        self._apply(line)

    def _apply(self, line: dict[str, Any]) -> None:
        if "phase" in line:
            phase = _text(line["phase"])
            self.phase = PHASES_BEFORE.get(phase, phase)
        elif "facts" in line:
            self.facts.update(cast("Facts", line["facts"]))
        elif "acquire" in line:
            self.ledger.add(_kind(line["acquire"]), line["with"])
        elif "release" in line:
            self.ledger.remove(_kind(line["release"]))


class Part:
    """One container's share of the journal: what it holds and knows is written down under its number.

    It is used as a journal is; its `directory` does not exist, but gives the container's other places a name. Up to format 2 a
    container alone had no number in its journal.
    """

    def __init__(self, journal: Journal, number: int) -> None:
        self._journal, self.number = journal, number
        self._suffix = f".{number}" if journal.format >= NUMBERED or journal.is_of_a_pod else ""
        self.directory = journal.directory.with_name(journal.directory.name + self._suffix)

    @property
    def facts(self) -> PartFacts:
        """Those of the whole migration, and this container's."""
        facts = self._journal.facts
        if not self._suffix:
            return cast("PartFacts", facts)
        own = {name.removesuffix(self._suffix): value for name, value in facts.items() if name.endswith(self._suffix)}
        return cast("PartFacts", {**facts, **own})

    def note(self, **facts: Unpack[PartFacts]) -> None:
        """Write down facts of this container."""
        self._journal.note_numbered({name + self._suffix: value for name, value in facts.items()})

    def held(self, kind: str) -> Mapping[str, Any] | None:
        """The facts of what this container holds of that kind."""
        return self._journal.held(kind + self._suffix)

    def acquire(self, kind: str, **facts: Any) -> None:
        """Write down what is about to be acquired for this container."""
        self._journal.acquire(kind + self._suffix, **facts)

    def release(self, kind: str) -> None:
        """Strike out what was given back of this container's."""
        self._journal.release(kind + self._suffix)


def journals(root: Path) -> list[Path]:
    """The directories of all migrations that have a journal under `root`, oldest first."""
    found = [path.parent for path in root.glob(f"*/{JOURNAL}")]
    return sorted(found, key=lambda path: (path / JOURNAL).stat().st_mtime)


def forget_old(root: Path, keep: int, *, age: float = KEEP_SECONDS) -> None:
    """Remove journals of migrations that have ended and hold nothing any more: all but the latest `keep`, and those that were last
    written more than `age` seconds ago. What has not ended, or cannot be read, stays whatever its age."""
    over = [path for path in journals(root) if _is_over(path)]
    old = time.time() - age
    for number, path in enumerate(over):
        if number < len(over) - keep or (path / JOURNAL).stat().st_mtime < old:
            shutil.rmtree(path, ignore_errors=True)


def unfinished(root: Path) -> list[Path]:
    """The directories of migrations that have not ended, or still hold something, or cannot be read."""
    return [path for path in journals(root) if not _is_over(path)]


def _is_over(directory: Path) -> bool:
    try:
        journal = Journal(directory)
    except (OSError, PodferryError):
        return False
    journal.close()
    ends: frozenset[str] = SOURCE_ENDS if journal.facts.get("role") == "source" else TARGET_ENDS
    return journal.is_empty or (journal.phase in ends and not journal.ledger.entries)


def _kind(written: object) -> str:
    """The kind of thing that a line is about, by the name that it has now; a container's number may stand behind it."""
    kind, dot, number = _text(written).partition(".")
    return KINDS_BEFORE.get(kind, kind) + dot + number


def _text(value: object) -> str:
    """A word of a line. Raises `TypeError` where something else stands there: a damaged file may hold anything."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} stands where a text belongs")
    return value


def _renamed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the names that phases have now."""
    phases, phase = record.get("phases"), record.get("phase")
    if isinstance(phases, dict):
        record = {**record, "phases": {PHASES_BEFORE.get(name, name): ms for name, ms in phases.items()}}
    return {**record, "phase": PHASES_BEFORE.get(phase, phase)} if isinstance(phase, str) else record


def _line(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal, and where they end. Raises `Failed` where a later podferry has written it."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    end = raw.rfind(b"\n") + 1
    lines = [line for text in raw[:end].split(b"\n")[:-1] if (line := _parsed(text)) is not None]
    for line in lines:
        if (found := line.get("format", FORMAT)) not in FORMATS:
            raise Failed(
                f"the journal {path} is of format {found}",
                why=f"this podferry reads formats {min(FORMATS)} to {max(FORMATS)}",
                remedy="run the version of podferry-agent that wrote it until its migrations have ended",
            )
    return lines, end


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line. Agents before format 2 did not notice a write that was cut short: there half a line may stand before a whole one."""
    start = 0
    while start >= 0:
        try:
            line = json.loads(text[start:])
        except (ValueError, RecursionError):
            start = text.find(_BEGINS, start + 1)
        else:
            return line if isinstance(line, dict) else None
    return None


__all__ = ["Acquired", "Journal", "Part", "forget_old", "journals"]
