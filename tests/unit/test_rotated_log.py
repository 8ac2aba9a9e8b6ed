"""A container's log that is rotated while it moves: no line is lost, and none comes twice."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_agent_source_container import leaving, made

from podferry.engine.journal import Journal
from podferry.node.rotated_log import RotatedLog
from podferry.workload.source_container import Output

pytestmark = pytest.mark.unit


class Kubelet:
    """Writes a log and rotates it as the kubelet does: renames, lets the writer open a new one, compresses the older."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "0.log"
        self.path.touch()
        self.writer = self.path.open("ab", buffering=0)
        self.written, self.rotations = b"", 0

    def write(self) -> None:
        line = b"line %d\n" % len(self.written)
        self.writer.write(line)
        self.written += line

    def rename(self) -> None:
        """The writer has the old file open still."""
        self.rotations += 1
        self.path.rename(self.path.with_name(f"0.log.20261130-{self.rotations:06d}"))

    def reopen(self) -> None:
        self.writer.close()
        self.writer = self.path.open("ab", buffering=0)

    def rotate(self) -> None:
        for old in self.path.parent.glob("0.log.*[0-9]"):
            old.with_name(f"{old.name}.gz").write_bytes(gzip.compress(old.read_bytes()))
            old.unlink()
        self.rename()
        self.reopen()


@given(st.lists(st.sampled_from(["write", "rotate", "read"]), max_size=40))
@settings(max_examples=200, deadline=None)
def test_every_line_comes_once_whenever_it_is_rotated(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    kubelet = Kubelet(tmp_path_factory.mktemp("pod"))
    log, came = RotatedLog(kubelet.path), b""
    acts: dict[str, Callable[[], None]] = {"write": kubelet.write, "rotate": kubelet.rotate}
    for step in steps:
        if step == "read":
            came += b"".join(log.new())
        elif step == "rotate" or step == "write":
            if step == "rotate" and log._fd < 0:  # what was rotated before the migration began is not the migration's
                came += b"".join(log.new())
            acts[step]()
    came += b"".join(log.new())
    assert came == kubelet.written
    log.close()


def test_what_is_written_between_the_renaming_and_the_new_file_is_there(tmp_path: Path) -> None:
    kubelet = Kubelet(tmp_path)
    log = RotatedLog(kubelet.path)
    kubelet.write()
    came = b"".join(log.new())
    kubelet.rename()
    kubelet.write()
    came += b"".join(log.new())
    kubelet.write()
    kubelet.reopen()
    kubelet.write()
    assert came + b"".join(log.new()) == kubelet.written


def test_a_log_that_is_emptied_in_its_place_goes_on(tmp_path: Path) -> None:
    kubelet = Kubelet(tmp_path)
    log = RotatedLog(kubelet.path)
    kubelet.write()
    kubelet.write()
    first = b"".join(log.new())
    os.truncate(kubelet.path, 0)
    kubelet.write()
    assert first + b"".join(log.new()) == kubelet.written


def test_no_log_is_no_error(tmp_path: Path) -> None:
    assert list(RotatedLog(tmp_path / "missing").new()) == []


@pytest.mark.anyio
async def test_a_leaving_job_sends_what_it_printed_before_and_after_a_rotation(tmp_path: Path) -> None:
    (tmp_path / "pod").mkdir()
    kubelet = Kubelet(tmp_path / "pod")
    job = leaving(tmp_path, made(tmp_path / "group"), Journal(tmp_path / "journal"))
    job._running = replace(job._running, output=Output(kubelet.path))
    came = []
    for step in (kubelet.write, kubelet.rotate, kubelet.write, kubelet.rotate, kubelet.rotate, kubelet.write):
        step()
        came += [piece async for piece in job.logs(last=False)]
    assert b"".join(data for _, _, data in came) == kubelet.written
    assert [offset for _, offset, _ in came] == [
        sum(len(data) for _, _, data in came[:number]) for number in range(len(came))
    ], "the target takes them for one file"
    await job.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
