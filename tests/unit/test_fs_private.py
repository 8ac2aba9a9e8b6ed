"""Directories of podferry's own: private from the first one on, and checked where somebody else was first."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from podferry.errors import Failed, PodferryError, Refused
from podferry.fs.private import private_directory

pytestmark = pytest.mark.unit


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def open_umask() -> object:
    old = os.umask(0)
    yield
    os.umask(old)


def test_everything_that_is_made_is_private(tmp_path: Path) -> None:
    below = tmp_path / "var" / "state"
    made = private_directory(below / "staging" / "id" / "0", below=below)
    assert made == below / "staging/id/0"
    for one in (made, *made.parents):
        if one == tmp_path:
            return
        assert mode(one) == 0o700, one


def test_what_an_older_version_left_open_is_closed_and_the_state_directory_stays(tmp_path: Path) -> None:
    (tmp_path / "staging" / "id").mkdir(parents=True)
    for path, given in ((tmp_path, 0o755), (tmp_path / "staging", 0o755), (tmp_path / "staging/id", 0o777)):
        path.chmod(given)
    private_directory(tmp_path / "staging" / "id", below=tmp_path)
    assert (mode(tmp_path), mode(tmp_path / "staging"), mode(tmp_path / "staging/id")) == (0o755, 0o700, 0o700)


@pytest.mark.parametrize("at", ["staging", "staging/id"])
def test_a_link_on_the_way_is_refused(tmp_path: Path, at: str) -> None:
    state, elsewhere = tmp_path / "state", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    (state / at).parent.mkdir(parents=True)
    (state / at).symlink_to(elsewhere)
    with pytest.raises(Refused, match="cannot hold"):
        private_directory(state / "staging" / "id", below=state)
    assert mode(elsewhere) == 0o755
    assert list(elsewhere.iterdir()) == []


def test_a_file_on_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "staging").touch()
    with pytest.raises(Refused, match="no directory"):
        private_directory(tmp_path / "staging" / "id", below=tmp_path)


def test_a_directory_into_which_others_write_is_closed_to_them(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    private_directory(tmp_path / "staging", below=tmp_path)
    assert mode(tmp_path) == 0o1777  # /tmp: nobody removes what is ours
    tmp_path.chmod(0o777)
    private_directory(tmp_path / "staging", below=tmp_path)
    assert mode(tmp_path) == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: somebody else's directory")
@pytest.mark.parametrize("at", ["", "staging", "staging/id"])
def test_somebody_elses_directory_is_refused(tmp_path: Path, at: str) -> None:
    (tmp_path / "staging" / "id").mkdir(parents=True)
    os.chown(tmp_path / at, 65534, 65534)
    with pytest.raises(Refused, match="belongs to user 65534"):
        private_directory(tmp_path / "staging" / "id", below=tmp_path)


def test_one_that_must_be_new_is(tmp_path: Path) -> None:
    private_directory(tmp_path / "a", below=tmp_path, new=True)
    with pytest.raises(Failed):
        private_directory(tmp_path / "a", below=tmp_path, new=True)


def test_nothing_is_made_outside(tmp_path: Path) -> None:
    with pytest.raises((PodferryError, ValueError)):
        private_directory(tmp_path / "a" / ".." / ".." / "b", below=tmp_path / "a")
