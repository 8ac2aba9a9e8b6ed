"""What the engine asks of a journal (`podferry.engine.journal`) on a disk that may have no room."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from podferry.engine.journal import Journal, forget_old, unfinished

from . import Contract

LONG = "x" * 8192
"""More than is left on a full disk."""


class JournalCase(Protocol):
    """A disk with room for a few journals."""

    root: Path

    def fill(self) -> None:
        """Nothing of this length fits any more."""
        ...

    def make_room(self) -> None:
        """It does again."""
        ...


@dataclass(frozen=True)
class State:
    """What another agent reads."""

    phase: str
    facts: dict[str, object]
    held: list[str]

    @classmethod
    def of(cls, directory: Path) -> State:
        journal = Journal(directory)
        journal.close()
        return cls(journal.phase, dict(journal.facts), [entry.kind for entry in journal.ledger.entries])


class JournalContract(Contract):
    """The fixture `case` is a `JournalCase`."""

    def begun(self, case: JournalCase) -> Journal:
        journal = Journal(case.root / "m1")
        journal.note(role="source", frozen_at=1.0)
        journal.acquire("freeze", cgroup="c")
        journal.enter("cut-over")
        return journal

    def test_what_does_not_fit_is_an_error_and_was_never_written(self, case: JournalCase) -> None:
        journal = self.begun(case)
        before = State.of(journal.directory)
        case.fill()
        with pytest.raises(OSError):
            journal.note(offered={"spec": LONG})
        with pytest.raises(OSError):
            journal.acquire("outgoing", directory=LONG)
        assert "offered" not in journal.facts
        assert journal.held("outgoing") is None
        journal.close()
        assert State.of(case.root / "m1") == before

    def test_what_is_written_once_there_is_room_is_read_behind_what_was_before(self, case: JournalCase) -> None:
        journal = self.begun(case)
        case.fill()
        with pytest.raises(OSError):
            journal.note(offered={"spec": LONG})
        case.make_room()
        journal.note(postcopy=True)
        journal.enter("resume", sync=True)
        journal.release("freeze")
        journal.close()
        found = State.of(case.root / "m1")
        assert (found.phase, found.facts, found.held) == (
            "resume",
            {"role": "source", "frozen_at": 1.0, "postcopy": True},
            [],
        )

    def test_a_record_that_does_not_fit_leaves_the_one_before(self, case: JournalCase) -> None:
        journal = self.begun(case)
        journal.save_record({"phase": "cut-over"})
        case.fill()
        with pytest.raises(OSError):
            journal.save_record({"phase": "resume", "reason": LONG})
        assert journal.load_record() == {"phase": "cut-over"}
        case.make_room()
        journal.save_record({"phase": "resume"})
        assert journal.load_record() == {"phase": "resume"}
        journal.close()

    def test_a_migration_of_which_nothing_could_be_written_has_not_begun(self, case: JournalCase) -> None:
        """Every line comes before what it announces: nobody waits for its end, and it is forgotten as others are."""
        case.fill()
        with pytest.raises(OSError):
            journal = Journal(case.root / "m1")
            try:
                journal.note(offered={"spec": LONG})
            finally:
                journal.close()
        case.make_room()
        assert unfinished(case.root) == []
        forget_old(case.root, 0)
        assert not (case.root / "m1" / "journal.jsonl").exists()
