"""Putting a file in the place of another, and what is left where that fails."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from podferry.engine.journal import RECORD, Journal
from podferry.fs.replacing import replace_file, replacement
from podferry.install.files import Root

pytestmark = pytest.mark.unit

BIG = b"x" * 100_000
ROOM = 50_000


@pytest.fixture
def no_room() -> Iterator[None]:
    """No file of ours may become longer than `ROOM` bytes: the write that would make it so stops short, and the next one fails, as
    on a full disk (EFBIG for ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def names(directory: Path) -> list[str]:
    return sorted(one.name for one in directory.iterdir())


def test_a_file_takes_the_others_place_with_its_mode(tmp_path: Path) -> None:
    place = tmp_path / "key"
    place.write_bytes(b"old")
    place.chmod(0o644)
    with place.open("rb") as held:
        replace_file(place, b"new", mode=0o640)
        assert held.read() == b"old"
    assert place.read_bytes() == b"new"
    assert stat.S_IMODE(place.stat().st_mode) == 0o640
    assert names(tmp_path) == ["key"]


def test_what_a_killed_writer_has_left_is_not_written_to(tmp_path: Path) -> None:
    """It may have been opened by somebody, or be a link to somewhere."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"not ours")
    (tmp_path / ".key.new").symlink_to(elsewhere)
    replace_file(tmp_path / "key", b"secret", mode=0o600)
    assert elsewhere.read_bytes() == b"not ours"
    assert (tmp_path / "key").read_bytes() == b"secret"
    assert not (tmp_path / "key").is_symlink()


def test_an_error_between_two_writes_leaves_the_old_one(tmp_path: Path) -> None:
    place = tmp_path / "pages"
    place.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacement(place) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert place.read_bytes() == b"old"
    assert names(tmp_path) == ["pages"]


def keep_record(directory: Path, content: bytes) -> None:
    journal = Journal(directory)
    try:
        journal.save_record({"phase": content.decode()})
    finally:
        journal.close()


WRITERS: dict[str, Callable[[Path, bytes], None]] = {
    "file": lambda directory, content: replace_file(directory / "file", content, mode=0o600),
    RECORD: keep_record,
    "binary": lambda directory, content: Root(directory).replace("/binary", content, 0o755),
}


@pytest.mark.usefixtures("no_room")
@pytest.mark.parametrize("name", WRITERS)
def test_a_write_for_which_there_is_no_room_leaves_the_old_one_alone(tmp_path: Path, name: str) -> None:
    place = tmp_path / "there"
    place.mkdir()
    WRITERS[name](place, b"old")
    before = {one: (place / one).read_bytes() for one in names(place)}
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        WRITERS[name](place, BIG)
    assert {one: (place / one).read_bytes() for one in names(place)} == before
    assert name in before
