"""Post-copy's debt: what is owed goes out once, whatever is cancelled while it does."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from typing import Any

import anyio
import pytest
import structlog

from podferry.engine.contact import Contact
from podferry.engine.ports import Change, OriginalGone
from podferry.engine.story import Story
from podferry.memory.kernel.uffd import PAGE
from podferry.memory.ranges import Runs
from podferry.memory.tracking.tracker import TrackerKind, create
from podferry.model import Mode
from podferry.wire.frames import Drop, Pages
from podferry.wire.messages import PageWanted
from podferry.workload.numbers import space_of
from podferry.workload.remote_pages import PUSH, FrozenPages
from podferry.workload.source_memory import SourceMemory

pytestmark = pytest.mark.unit
SIZE = 1 << 20
SPACE = 1


class Memory:
    """Memory of this very process, so that it can be read like a frozen job's."""

    def __init__(self) -> None:
        self.pages = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.pages[:] = b"x" * SIZE
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.pages))

    def owed(self, pid: int = 0) -> FrozenPages:
        return FrozenPages({SPACE: pid or os.getpid()}, {SPACE: Runs.of(self.start, self.start + SIZE)})


class SlowLetters:
    """The target wants one page, and its word comes while that is being answered."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.sent: list[Pages | Drop] = []
        self.channel = self
        self.asked = anyio.Event()

    async def send(self, frame: Pages | Drop) -> None:
        self.asked.set()
        await anyio.lowlevel.checkpoint()
        self.sent.append(frame)

    async def expect(self, *kinds: type[Any]) -> Any:
        if PageWanted in kinds and not self.asked.is_set():
            return PageWanted(SPACE, self.address)
        return await anyio.sleep_forever()


def pages(frames: list[Pages | Drop]) -> list[int]:
    return sorted(
        page
        for frame in frames
        if isinstance(frame, Pages)
        for address, count in frame.runs
        for page in range(address, address + count * PAGE, PAGE)
    )


async def runs() -> bool:
    return True


@pytest.mark.anyio
async def test_an_answer_that_is_cut_short_by_the_targets_word_still_goes_out() -> None:
    memory = Memory()
    owed, letters = memory.owed(), SlowLetters(memory.start)
    contact = Contact(
        Story("m", "job", "a", "b", Mode.POSTCOPY), structlog.get_logger(), lambda: None, lambda: owed, runs
    )  # type: ignore[arg-type,return-value]
    async with contact._answering(letters):  # type: ignore[arg-type]
        await letters.asked.wait()
    rest = [Pages(one.space, one.round, one.runs, b"") if isinstance(one, Pages) else one for one in owed.rest()]
    everything = list(range(memory.start, memory.start + SIZE, PAGE))
    assert pages(letters.sent + rest) == everything
    owed.close()


def test_a_page_on_its_way_is_not_called_absent() -> None:
    memory = Memory()
    owed = memory.owed()
    first = next(iter(owed.rest()))
    assert isinstance(first, Pages)
    assert first.count == PUSH // PAGE
    assert list(owed.wanted(SPACE, memory.start)) == []
    owed.close()


def test_what_nobody_saw_arrive_is_owed_again() -> None:
    memory = Memory()
    owed = memory.owed()
    assert pages(list(owed.wanted(SPACE, memory.start)))
    owed.start_over()
    assert owed.bytes == SIZE
    owed.close()


@pytest.mark.parametrize("reaped", [False, True])
def test_memory_that_ended_with_its_process_is_not_taken_for_zeros(reaped: bool) -> None:
    memory = Memory()
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    owed, later = memory.owed(pid), memory.owed(pid)
    pushed = owed.rest()
    assert isinstance(next(pushed), Pages)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    with pytest.raises(OriginalGone):
        assert not [frame for frame in pushed if isinstance(frame, Drop)]
    with pytest.raises(OriginalGone):
        assert not [frame for frame in later.wanted(SPACE, memory.start) if isinstance(frame, Drop)]
    for one in (owed, later):
        one.close()
    if not reaped:
        os.waitpid(pid, 0)


def test_a_container_without_processes_leaves_nothing_that_could_be_sent() -> None:
    memory = SourceMemory(0, create(TrackerKind.NONE, list))
    with pytest.raises(OriginalGone):
        list(memory.leave(Change()))


def test_the_pages_of_several_containers_are_asked_for_by_their_numbers() -> None:
    memory, other = Memory(), space_of(1, SPACE)
    runs = Runs.of(memory.start, memory.start + SIZE)
    owed = FrozenPages({SPACE: os.getpid(), other: os.getpid()}, {SPACE: runs, other: runs})
    assert {frame.space for frame in owed.wanted(other, memory.start)} == {other}
    assert 2 * SIZE - (64 << 10) <= owed.bytes < 2 * SIZE  # what is around the page went with it
    assert {frame.space for frame in owed.rest()} == {SPACE, other}
    stranger = space_of(2, SPACE)
    assert list(owed.wanted(stranger, 0)) == [Drop(stranger, ((0, PAGE),))]
    owed.close()


def test_a_page_that_is_not_owed_is_zero() -> None:
    memory = Memory()
    owed = memory.owed()
    beyond = memory.start + SIZE + 16 * PAGE
    assert list(owed.wanted(SPACE, beyond)) == [Drop(SPACE, ((beyond, beyond + PAGE),))]
    owed.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
