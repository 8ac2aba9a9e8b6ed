"""Post-copy's debt: what is owed goes out once, whatever is cancelled while it does."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import structlog

from podferry.engine.after_switchover import AfterSwitchover
from podferry.engine.migration_record import MigrationRecord
from podferry.engine.ports import DirtySet, OriginalGone
from podferry.errors import Failed, PeerLost
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.ranges import Runs
from podferry.memory.tracking.tracker import TrackerKind
from podferry.memory.tracking.trackers import create
from podferry.model import Mode
from podferry.wire.frames import Drop, Pages
from podferry.wire.messages import Crashed, ErrorReport, PageRequest, PagesLost
from podferry.workload.numbers import address_space_of
from podferry.workload.remote_pages import PUSH, FrozenPages
from podferry.workload.source_memory import SourceMemory

pytestmark = pytest.mark.unit
SIZE = 1 << 20
ADDRESS_SPACE = 1


class Memory:
    """Memory of this very process, so that it can be read like a frozen job's."""

    def __init__(self) -> None:
        self.pages = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.pages[:] = b"x" * SIZE
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.pages))

    def remote_pages(self, pid: int = 0) -> FrozenPages:
        return FrozenPages({ADDRESS_SPACE: pid or os.getpid()}, {ADDRESS_SPACE: Runs.of(self.start, self.start + SIZE)})


class SlowInbox:
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
        if PageRequest in kinds and not self.asked.is_set():
            return PageRequest(ADDRESS_SPACE, self.address)
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
    remote_pages, inbox = memory.remote_pages(), SlowInbox(memory.start)
    after_switchover = AfterSwitchover(
        MigrationRecord("m", "job", "a", "b", Mode.POSTCOPY),
        structlog.get_logger(),
        lambda: None,
        lambda: remote_pages,
        runs,
    )  # type: ignore[arg-type,return-value]
    async with after_switchover._answering(inbox):  # type: ignore[arg-type]
        await inbox.asked.wait()
    rest = [
        Pages(one.address_space, one.round, one.runs, b"") if isinstance(one, Pages) else one
        for one in remote_pages.rest()
    ]
    everything = list(range(memory.start, memory.start + SIZE, PAGE))
    assert pages(inbox.sent + rest) == everything
    remote_pages.close()


def test_a_page_on_its_way_is_not_called_absent() -> None:
    memory = Memory()
    remote_pages = memory.remote_pages()
    first = next(iter(remote_pages.rest()))
    assert isinstance(first, Pages)
    assert first.count == PUSH // PAGE
    assert list(remote_pages.answer(ADDRESS_SPACE, memory.start)) == []
    remote_pages.close()


def test_what_nobody_saw_arrive_is_owed_again() -> None:
    memory = Memory()
    remote_pages = memory.remote_pages()
    assert pages(list(remote_pages.answer(ADDRESS_SPACE, memory.start)))
    remote_pages.start_over()
    assert remote_pages.bytes == SIZE
    remote_pages.close()


@pytest.mark.parametrize("reaped", [False, True])
def test_memory_that_ended_with_its_process_is_not_taken_for_zeros(reaped: bool) -> None:
    memory = Memory()
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    remote_pages, later = memory.remote_pages(pid), memory.remote_pages(pid)
    pushed = remote_pages.rest()
    assert isinstance(next(pushed), Pages)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    with pytest.raises(OriginalGone):
        assert not [frame for frame in pushed if isinstance(frame, Drop)]
    with pytest.raises(OriginalGone):
        assert not [frame for frame in later.answer(ADDRESS_SPACE, memory.start) if isinstance(frame, Drop)]
    for one in (remote_pages, later):
        one.close()
    if not reaped:
        os.waitpid(pid, 0)


def test_a_container_without_processes_leaves_nothing_that_could_be_sent() -> None:
    memory = SourceMemory(0, create(TrackerKind.NONE, list))
    with pytest.raises(OriginalGone):
        list(memory.leave(DirtySet()))


def test_the_pages_of_several_containers_are_asked_for_by_their_numbers() -> None:
    memory, other = Memory(), address_space_of(1, ADDRESS_SPACE)
    runs = Runs.of(memory.start, memory.start + SIZE)
    remote_pages = FrozenPages({ADDRESS_SPACE: os.getpid(), other: os.getpid()}, {ADDRESS_SPACE: runs, other: runs})
    assert {frame.address_space for frame in remote_pages.answer(other, memory.start)} == {other}
    assert 2 * SIZE - (64 << 10) <= remote_pages.bytes < 2 * SIZE  # what is around the page went with it
    assert {frame.address_space for frame in remote_pages.rest()} == {ADDRESS_SPACE, other}
    stranger = address_space_of(2, ADDRESS_SPACE)
    assert list(remote_pages.answer(stranger, 0)) == [Drop(stranger, ((0, PAGE),))]
    remote_pages.close()


def test_a_page_that_is_not_owed_is_zero() -> None:
    memory = Memory()
    remote_pages = memory.remote_pages()
    beyond = memory.start + SIZE + 16 * PAGE
    assert list(remote_pages.answer(ADDRESS_SPACE, beyond)) == [Drop(ADDRESS_SPACE, ((beyond, beyond + PAGE),))]
    remote_pages.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Conversation:
    """An inbox in which `word` comes, or which breaks with it, and that says what was sent to it and whether it was closed."""

    def __init__(self, *words: object) -> None:
        self._words, self.closed, self.channel = list(words), False, self
        self.sent: list[Any] = []
        self.traffic = SimpleNamespace(sent=0)

    async def send(self, frame: object) -> None:
        self.sent.append(frame)

    async def expect(self, *kinds: type[Any]) -> Any:
        if not self._words:
            return await anyio.sleep_forever()
        word = self._words.pop(0)
        if isinstance(word, Exception):
            raise word
        return word

    async def close(self) -> None:
        self.closed = True


def after(remote_pages: FrozenPages | None = None) -> AfterSwitchover:
    return AfterSwitchover(
        MigrationRecord("m", "job", "a", "b", Mode.POSTCOPY),
        structlog.get_logger(),
        lambda: None,  # type: ignore[arg-type,return-value]
        (lambda: remote_pages) if remote_pages else None,  # type: ignore[arg-type,return-value]
        runs,
    )


@pytest.mark.anyio
async def test_a_job_that_died_on_the_target_is_left_to_a_person_and_the_conversation_ends() -> None:
    one, inbox = after(), Conversation(Crashed("m", ErrorReport.of(Failed("out of memory"))))
    assert await one.send_go(inbox) is None  # type: ignore[arg-type]
    assert "out of memory" in one._record.reason
    assert "podferry resolve m --run-on NODE" in one._record.reason
    assert (inbox.closed, one.inbox) == (True, None), "the next try dials again"


@pytest.mark.anyio
@pytest.mark.parametrize("gone", [False, True])
async def test_the_target_is_told_that_pages_are_lost_only_where_they_are(
    gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target ends the job then. A connection that breaks is no reason: the nodes meet again."""
    memory = Memory()
    remote_pages = memory.remote_pages()
    error = OriginalGone("the frozen original has ended") if gone else PeerLost("b closed the connection")

    def rest() -> Any:
        raise error

    monkeypatch.setattr(remote_pages, "rest", rest)
    monkeypatch.setattr("podferry.engine.after_switchover.LAST_RITES", 0.05)
    monkeypatch.setattr("podferry.engine.after_switchover.LAST_WORD", 0.05)
    one, inbox = after(remote_pages), Conversation()
    one.inbox = inbox  # type: ignore[assignment]
    assert await one.serve() is None
    assert [type(word) for word in inbox.sent] == ([PagesLost] if gone else [])
    assert inbox.closed
    remote_pages.close()
