"""What `podferry lab logs` prints, read from the files of machines that are only directories here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from podferry.lab import containers

pytestmark = pytest.mark.unit


class Machines:
    """A lab of one node that has the container `job`, whose task runs until `ended` says otherwise."""

    name = "paper"
    ended = False

    def __init__(self, root: Path) -> None:
        self._root = root
        self.log = root / str(containers.LOGS / "job.log").lstrip("/")
        self.log.parent.mkdir(parents=True)

    def status(self) -> SimpleNamespace:
        return SimpleNamespace(nodes=(SimpleNamespace(name="node-a", alive=True),))

    def root(self, _node: str) -> Path:
        return self._root

    def exec(self, _node: str, argv: Sequence[str]) -> SimpleNamespace:
        state = "STOPPED" if self.ended else "RUNNING"
        return SimpleNamespace(stdout=f"TASK PID STATUS\njob 7 {state}\n" if "tasks" in argv else "job\n")


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    monkeypatch.setattr(containers, "CHUNK", 4)
    monkeypatch.setattr(containers, "FOLLOW_SECONDS", 0)
    return Machines(tmp_path)


def test_a_log_ends_where_it_was_although_the_job_goes_on_writing(lab: Machines) -> None:
    lab.log.write_bytes(b"0123456789")
    read = b""
    for chunk in containers.output(lab, "job"):  # type: ignore[arg-type]
        read += chunk
        with lab.log.open("ab") as log:
            log.write(b"more than was read")
        assert len(read) < 100, "it reads what is written meanwhile, for ever"
    assert read == b"0123456789"


def test_a_log_that_is_followed_goes_on_until_the_container_ends(lab: Machines) -> None:
    lab.log.write_bytes(b"01234")
    read = b""
    for chunk in containers.output(lab, "job", follow=True):  # type: ignore[arg-type]
        read += chunk
        if len(read) == 5:
            with lab.log.open("ab") as log:
                log.write(b"567")
            lab.ended = True
    assert read == b"01234567"


def test_a_container_that_has_written_nothing_has_an_empty_log(lab: Machines) -> None:
    assert list(containers.output(lab, "job")) == []  # type: ignore[arg-type]
