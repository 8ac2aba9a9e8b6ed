"""Journals: what is torn, what is of another format, and what may be forgotten."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from contracts.journal import JournalCase, JournalContract

from podferry.engine import journal as module
from podferry.engine.journal import JOURNAL, Journal, forget_old
from podferry.errors import Failed
from podferry.fs.replacing import replacement

pytestmark = pytest.mark.unit


class FullDisk:
    """One on which long writes are cut short, and then fail."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self._full, write = root, False, os.write

        def fitting(file: int, data: bytes) -> int:
            return write(file, data[:9] if self._full and len(data) > 4096 else data)

        def no_room(path: Path, content: bytes) -> None:
            with replacement(path) as file:
                full = self._full and len(content) > 4096
                file.write(content[:9] if full else content)
                if full:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(module.os, "write", fitting)
        monkeypatch.setattr(module, "replace_file", no_room)

    def fill(self) -> None:
        self._full = True

    def make_room(self) -> None:
        self._full = False


class TestJournalOnAFullDisk(JournalContract):
    @pytest.fixture
    def case(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JournalCase:
        return FullDisk(tmp_path, monkeypatch)


def written(directory: Path, phase: str = "resume") -> Journal:
    journal = Journal(directory)
    journal.note(role="source")
    journal.acquire("freeze", cgroup="c")
    journal.enter(phase, sync=True)
    return journal


def state(directory: Path) -> tuple[object, ...]:
    journal = Journal(directory)
    journal.close()
    return journal.phase, journal.facts, [entry.kind for entry in journal.ledger.entries]


def test_what_is_appended_behind_any_torn_prefix_is_read(tmp_path: Path) -> None:
    written(tmp_path / "whole", "cut-over").close()
    raw = (tmp_path / "whole" / JOURNAL).read_bytes()
    for length in range(len(raw) + 1):
        torn = tmp_path / f"torn-{length}"
        torn.mkdir()
        (torn / JOURNAL).write_bytes(raw[:length])
        before = state(torn)
        journal = Journal(torn)
        journal.enter("resume", sync=True)
        journal.close()
        assert state(torn) == ("resume", *before[1:]), length


def test_a_write_that_is_cut_short_is_an_error_and_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, write = written(tmp_path / "m", "cut-over"), os.write
    with monkeypatch.context() as full:
        full.setattr(module.os, "write", lambda file, data: write(file, data[:9]))
        with pytest.raises(OSError, match="only 9 of"):
            journal.note(postcopy=True)
    assert "postcopy" not in journal.facts
    journal.enter("resume", sync=True)
    assert state(tmp_path / "m")[0] == "resume"


def test_half_a_line_of_an_older_agent_does_not_hide_the_line_behind_it(tmp_path: Path) -> None:
    lines = [{"t": 1, "facts": {"role": "source"}}, {"t": 2, "phase": "resume"}]
    (tmp_path / JOURNAL).write_text(
        json.dumps(lines[0]) + '\n{"t": 1.5, "fac' + json.dumps(lines[1]).replace(" ", "") + "\n"
    )
    assert state(tmp_path)[:2] == ("resume", {"role": "source"})


def test_the_format_before_is_read_and_one_to_come_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "new").close()
    raw = (tmp_path / "new" / JOURNAL).read_bytes()
    assert json.loads(raw.split(b"\n")[0]) == {"format": 4}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / JOURNAL).write_bytes(raw.split(b"\n", 1)[1])
    assert state(tmp_path / "old") == state(tmp_path / "new")
    (tmp_path / "new" / JOURNAL).write_bytes(raw.replace(b'"format":4', b'"format":5'))
    with pytest.raises(Failed, match="format 5"):
        Journal(tmp_path / "new")


def test_a_journal_of_format_3_is_read_under_the_names_of_format_4(tmp_path: Path) -> None:
    """A migration that an agent of the version before has begun must be undone by this one."""
    lines = [
        {"format": 3},
        {"t": 1, "facts": {"role": "source", "promise": {}}},
        {"t": 2, "acquire": "door.0", "with": {"path": "/run/leaving/c0ffee"}},
        {"t": 3, "phase": "poise"},
        {"t": 4, "acquire": "hold.0", "with": {"work": "/w"}},
        {"t": 5, "acquire": "feeder.1", "with": {"pid": 7}},
        {"t": 6, "release": "feeder.1"},
    ]
    (tmp_path / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "record.json").write_text(json.dumps({"phase": "poise", "phases": {"check": 1.0, "poise": 2.0}}))
    journal = Journal(tmp_path)
    assert journal.phase == "prepare-target"
    assert [entry.kind for entry in journal.ledger.entries] == ["exec-lock.0", "held-dump.0"]
    assert module.Part(journal, 0).held("held-dump") == {"work": "/w"}
    assert journal.load_record() == {"phase": "prepare-target", "phases": {"check": 1.0, "prepare-target": 2.0}}
    journal.close()


def test_only_what_has_ended_and_holds_nothing_is_forgotten(tmp_path: Path) -> None:
    for number, (name, phase, held) in enumerate(
        [
            ("waits", "lost-contact", True),
            ("left", "failed", True),
            ("a", "completed", False),
            ("b", "completed", False),
        ]
    ):
        journal = written(tmp_path / name, phase)
        if not held:
            journal.release("freeze")
        journal.close()
        os.utime(tmp_path / name / JOURNAL, (number, number))
    forget_old(tmp_path, 1, age=1e12)
    assert {path.name for path in tmp_path.iterdir()} == {"waits", "left", "b"}
    forget_old(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"waits", "left"}
