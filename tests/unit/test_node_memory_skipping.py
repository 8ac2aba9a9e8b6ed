"""What a memory-skipping dump finds in place of a process's page map."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from podferry.criu import memory_skipping
from podferry.criu.memory_skipping import BLANK, MemorySkippingDump
from podferry.criu.skipped_pages import population
from podferry.errors import CommandFailed
from podferry.memory.kernel.maps import read_areas

pytestmark = pytest.mark.unit


def wait_for(pid: int, name: str) -> None:
    for _ in range(1000):
        if Path(f"/proc/{pid}/comm").read_text().strip() == name:
            return
        os.sched_yield()
    raise AssertionError(f"{pid} never became {name}")


def test_each_claimed_process_gets_the_same_page_map(tmp_path: Path) -> None:
    dump = MemorySkippingDump(tmp_path / "shown")
    assert dump.environment() == {"PODFERRY_SHOWN": str(tmp_path / "shown")}
    dump.claim([7, 11])
    lines = [line.split() for line in (tmp_path / "shown").read_text().splitlines()]
    assert [file for _, file in lines] == ["/proc/7/pagemap", "/proc/11/pagemap"]
    (shown,) = {shown for shown, _ in lines}
    assert Path(shown).exists()
    dump.close()
    assert not Path(shown).exists(), "the process has ended"


def test_the_process_has_next_to_no_memory_and_none_where_jobs_have_theirs(tmp_path: Path) -> None:
    dump = MemorySkippingDump(tmp_path / "shown")
    pid = dump._blank.pid
    wait_for(pid, BLANK[-1])
    assert population(pid).held.size < 1 << 20
    libraries = [area.start for area in read_areas(pid) if ".so" in area.name]
    mine = [area.start for area in read_areas(os.getpid()) if ".so" in area.name]
    assert libraries and mine
    assert max(libraries) < min(mine)
    dump.close()


def test_without_its_program_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert shutil.which(BLANK[0])
    monkeypatch.setattr(memory_skipping, "BLANK", ["/nonexistent/program"])
    with pytest.raises(CommandFailed):
        MemorySkippingDump(tmp_path / "shown")
