"""The benchmark's job: its memory's rule, that damage shows, that it sees itself being stopped."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podferry.bench.load import GAP_NS, PAGE, REPORT, Children, Files, Log, Memory, UpperFiles, Work, share
from podferry.bench.workload import JobWork, Pattern, Report, Workload
from podferry.node.process import Child, spawn

pytestmark = pytest.mark.unit


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_memory_holds_what_it_must_after_any_number_of_writes(data: st.DataObject) -> None:
    pages = data.draw(st.integers(1, 40))
    hot = data.draw(st.integers(1, pages))
    memory = Memory(pages, hot, scattered=data.draw(st.booleans()), compressible=data.draw(st.booleans()))
    for count in data.draw(st.lists(st.integers(0, 100), max_size=4)):
        memory.write(count)
    assert memory.damaged() == []


def test_many_processes_need_little_beside_their_memory() -> None:
    assert len(Memory(2048, 2048, scattered=True, compressible=False)._pool) <= 2048 * PAGE // 4 + PAGE


@pytest.fixture
def memory() -> Memory:
    memory = Memory(64, 48, scattered=True, compressible=False)
    memory.write(100)
    return memory


def test_a_flipped_bit_shows(memory: Memory) -> None:
    memory.data[7 * PAGE + 1234] ^= 1
    assert memory.damaged() == [7]


def test_a_lost_page_shows(memory: Memory) -> None:
    memory.data[60 * PAGE : 61 * PAGE] = bytes(PAGE)
    assert memory.damaged() == [60]
    assert memory.diagnosis(60) == "page 60: zeros instead of version 0"


def test_a_stale_page_shows(memory: Memory) -> None:
    page = memory.written * memory.stride % memory.span
    before = memory.data[page * PAGE : (page + 1) * PAGE]
    memory.write(1)
    assert memory.damaged() == []
    memory.data[page * PAGE : (page + 1) * PAGE] = before
    assert memory.damaged() == [page]
    assert memory.diagnosis(page) == f"page {page}: whole version 2 instead of version 3"


def test_a_torn_page_shows(memory: Memory) -> None:
    page = memory.written * memory.stride % memory.span
    before = memory.data[page * PAGE : (page + 1) * PAGE]
    memory.write(1)
    memory.data[page * PAGE + PAGE // 2 : (page + 1) * PAGE] = before[PAGE // 2 :]
    assert memory.damaged() == [page]
    assert memory.diagnosis(page) == f"page {page}: torn version 3 instead of version 3"


def test_swapped_pages_show(memory: Memory) -> None:
    one, other = memory.data[: 1 * PAGE], memory.data[PAGE : 2 * PAGE]
    memory.data[:PAGE], memory.data[PAGE : 2 * PAGE] = other, one
    assert memory.damaged() == [0, 1]
    assert memory.diagnosis(0).startswith("page 0: version 2 of page 1")


def test_writes_visit_every_hot_page_and_no_other() -> None:
    memory = Memory(20, 12, scattered=True, compressible=False)
    before = [memory.data[page * PAGE : (page + 1) * PAGE] for page in range(20)]
    memory.write(12)
    changed = [page for page in range(20) if memory.data[page * PAGE : (page + 1) * PAGE] != before[page]]
    assert changed == list(range(12))


def test_files_that_lost_a_line_show(tmp_path: Path) -> None:
    files = Files(tmp_path, 3)
    for _ in range(10):
        files.grow()
    assert files.damaged() == []
    (tmp_path / "file-1").write_text("1\n4\n")
    assert files.damaged() == [1]


def test_upper_files_that_changed_show(tmp_path: Path) -> None:
    files = UpperFiles(tmp_path, 2 << 20, 1001)
    assert files.damaged() == []
    assert (tmp_path / "large").stat().st_size == 2 << 20
    (tmp_path / "small-1" / "1000").write_bytes(b"")
    (tmp_path / "small-0" / "7").unlink()
    with (tmp_path / "large").open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"!")
    assert files.damaged() == [7, 1000, 1001]


def test_a_streaming_job_reads_every_page_in_order() -> None:
    memory = Memory(40, 40, scattered=False, compressible=False)
    work = Work("stream", memory)
    read = []
    for _ in range(4):
        work.unit()
        read += [int.from_bytes(work._block[at : at + 4], "little") for at in range(0, len(work._block), PAGE)]
    assert read == [*range(40), *range(16)]


def test_processes_share_what_there_is_to_do() -> None:
    whole = {"pages": 100, "hot_pages": 100, "bytes_per_second": 8e6, "scattered": True}
    assert share(whole, 8) == {"pages": 12, "hot_pages": 12, "bytes_per_second": 1e6, "scattered": True}


@pytest.mark.parametrize("shared", [False, True])
def test_children_say_what_is_damaged_in_their_memory(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"pages": 8, "hot_pages": 8, "scattered": True, "compressible": False, "shared": shared}
    children = Children(2, {**settings, "bytes_per_second": 1e6})
    assert children.damaged() == 0
    monkeypatch.setattr(Memory, "damaged", lambda memory: [1, 2])
    broken = Children(2, {**settings, "bytes_per_second": 0})
    assert broken.damaged() == 4
    for ask, _ in children._links + broken._links:
        os.close(ask)  # the end of its input ends a child
    for _, answers in children._links + broken._links:
        assert os.read(answers, 1) == b""
        os.close(answers)


def test_the_log_keeps_gaps_and_bins() -> None:
    log = Log(0)
    log.look(1_000_000)
    assert not log.done(0)
    log.look(1_000_000 + 50_000_000)
    assert log.done(7)
    log.look(1_000_000 + 50_000_000 + GAP_NS - 1)
    assert not log.done(8)
    assert log.gaps == [(50_000_000, 1_000_000)]
    assert list(log.bins)[:3] == [51_000_000, 2, 7]


def settings_of(workload: Workload, directory: Path) -> list[str]:
    """The job's command, with its files in `directory`."""
    *program, config = workload.argv()
    values: dict[str, Any] = json.loads(config)
    return [*program, json.dumps({**values, "directory": str(directory)})]


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        child.kill()
        child.wait()


def published(directory: Path, number: int, child: Child) -> dict[str, Any]:
    path = directory / REPORT.format(number)
    while not path.exists():
        assert child.poll() is None, "the job has ended"
        time.sleep(0.01)
    report: dict[str, Any] = json.loads(path.read_text())
    return report


@pytest.mark.parametrize("work", list(JobWork))
@pytest.mark.parametrize("pattern", list(Pattern))
def test_a_job_that_was_stopped_saw_it(tmp_path: Path, children: list[Child], work: JobWork, pattern: Pattern) -> None:
    stopped_and_asked(tmp_path, children, Workload(2, 10.0, pattern=pattern, hot=1, work=work, threads=3, files=2))


def test_so_did_one_of_several_processes_with_shared_memory_and_files(tmp_path: Path, children: list[Child]) -> None:
    stopped_and_asked(
        tmp_path, children, Workload(4, 10.0, processes=3, shared=True, upper=1, small_files=5, threads=2)
    )


def stopped_and_asked(tmp_path: Path, children: list[Child], workload: Workload) -> None:
    children.append(child := spawn(settings_of(workload, tmp_path)))
    published(tmp_path, 0, child)
    time.sleep(0.1)
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    stopped = time.time_ns()
    time.sleep(0.05)
    continued = time.time_ns()
    os.kill(child.pid, signal.SIGCONT)
    time.sleep(0.1)
    os.kill(child.pid, signal.SIGUSR1)
    report = Report.from_dict(published(tmp_path, 1, child))
    gap = report.gap_at((stopped + continued) // 2)
    assert gap is not None
    assert gap[0] <= stopped
    assert gap[1] >= continued
    assert report.written > 0
    assert (report.damaged, report.damaged_files) == ((), ())
    assert report.speed(0, 1 << 62) is not None
