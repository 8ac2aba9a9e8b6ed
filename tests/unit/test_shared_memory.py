"""Shared memory on its way: what the source finds changed, what it sends of an image, and what the target makes of it."""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path

import anyio
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from podferry.engine.sending import _piece
from podferry.errors import PeerMisbehaved
from podferry.memory.kernel.shared import shared_objects
from podferry.wire.frames import HELD_PAGES, INLINE, PAGE, ZEROS, Drop, File, Pages
from podferry.wire.held_pages import CHUNK, HeldPages
from podferry.wire.messages import FileSum
from podferry.workload.numbers import address_space_of
from podferry.workload.received_images import ReceivedImages
from podferry.workload.shared_memory import SPACING, SharedMemory

pytestmark = pytest.mark.unit

AT = 1 << 40
IMAGE = "pages-7.img"


def memory(*numbers: int) -> memoryview:
    """Pages, one for each number; 0 is the page of zeros."""
    return memoryview(b"".join(random.Random(number).randbytes(PAGE) if number else bytes(PAGE) for number in numbers))


class Target:
    """What arrives of one container."""

    def __init__(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        self.path, self.stored = path, 0
        self.images = ReceivedImages(lambda: path, path / "waiting", self._grows)

    def _grows(self, size: int) -> None:
        self.stored += size

    def take(self, frame: Pages | Drop | File) -> None:
        match frame:
            case Pages():
                for address, data in frame.pieces():
                    self.images.hold(address, data, frame.round)
            case Drop():
                for start, end in frame.runs:
                    self.images.drop(start, end)
            case File() if frame.runs:
                self.stored += frame.size
                self.images.take_pages(frame)
            case File():
                self.stored += frame.size
                self.images.take(frame.name, frame.offset, memoryview(frame.payload), last=frame.last)

    def image(self, content: bytes) -> bytes:
        self.images.verify([FileSum(0, IMAGE, len(content), xxhash.xxh3_128_hexdigest(content))])
        return (self.path / IMAGE).read_bytes()


def sent(held: HeldPages, content: bytes) -> File:
    return _piece(File(0, IMAGE, 0, content, last=True), held)


PAGE_NUMBERS = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(passes=st.lists(PAGE_NUMBERS, max_size=4), image=PAGE_NUMBERS, odd=st.binary(max_size=9))
def test_an_image_arrives_whole_whatever_was_sent_before(
    tmp_path_factory: pytest.TempPathFactory, passes: list[list[int]], image: list[int], odd: bytes
) -> None:
    held, target = HeldPages(), Target(tmp_path_factory.mktemp("target"))
    for number, numbers in enumerate(passes):
        data = memory(*numbers)
        for start, end in held.changed(AT, data):
            target.take(Pages(0, number, ((AT + start, (end - start) // PAGE),), data[start:end]))
    content = bytes(memory(*image)) + odd
    target.take(sent(held, content))
    assert target.image(content) == content
    target.images.complete()
    assert target.stored == len(content)


def test_only_what_changed_is_sent_again() -> None:
    held = HeldPages()
    assert held.changed(AT, memory(1, 2, 0, 3, 4)) == [(0, 2 * PAGE), (3 * PAGE, 5 * PAGE)]
    assert held.changed(AT, memory(1, 2, 0, 3, 4)) == []
    assert held.changed(AT, memory(1, 5, 0, 0, 4)) == [(PAGE, 2 * PAGE)]
    assert held.take(memory(1, 2, 3, 4, 5, 0, 0)) == [
        (AT, 1),
        (INLINE, 2),
        (AT + 4 * PAGE, 1),
        (AT + PAGE, 1),
        (ZEROS, 2),
    ]


def test_what_was_longer_once_is_remembered_until_it_is_written_again() -> None:
    held = HeldPages()
    held.changed(AT, memory(1, 2))
    assert held.changed(AT, memory(1)) == []
    assert held.changed(AT, memory(1, 3)) == [(PAGE, 2 * PAGE)]
    assert held.take(memory(2, 3)) == [(INLINE, 1), (AT + PAGE, 1)]


def test_a_page_is_taken_once() -> None:
    """The target frees it as soon as it is in an image."""
    held = HeldPages()
    held.changed(AT, memory(1, 1))
    assert held.take(memory(1, 1)) == [(AT + PAGE, 1), (INLINE, 1)]


def test_no_more_is_remembered_than_may_be() -> None:
    held = HeldPages(most=2)
    assert held.changed(AT, memory(1, 2, 3)) == [(0, 2 * PAGE)]
    assert held.changed(AT, memory(4, 2, 3)) == [(0, PAGE)]
    assert len(held) == 2


def test_what_is_dropped_is_sent_again() -> None:
    held = HeldPages()
    held.changed(AT, memory(1))
    assert not held.drop(AT + CHUNK, AT + 2 * CHUNK)
    assert held.drop(AT, AT + CHUNK)
    assert held.take(memory(1)) == [(INLINE, 1)]


def test_other_images_go_as_they_are() -> None:
    held = HeldPages()
    held.changed(AT, memory(1))
    whole = File(0, "ghost-file-1.img", 0, memory(1), last=True)
    assert _piece(whole, held) == whole


def test_pages_that_did_not_come_are_not_taken(tmp_path: Path) -> None:
    target = Target(tmp_path / "target")
    with pytest.raises(PeerMisbehaved, match="were not sent"):
        target.take(File(0, IMAGE, 0, runs=((AT, 1),)))
    target.take(Pages(0, 1, ((AT, 1),), memory(1)))
    with pytest.raises(PeerMisbehaved, match="were not sent"):
        target.take(File(0, IMAGE, 0, runs=((AT, 2),)))
    target.take(File(0, IMAGE, 0, runs=((AT, 1),)))


# With shared memory of this process.


def one_pass(shared: SharedMemory) -> list[Pages | Drop]:
    async def collect() -> list[Pages | Drop]:
        found: list[Pages | Drop] = []
        async for frame in shared.changed(1):
            found.append(Pages(*_own(frame)) if isinstance(frame, Pages) else frame)
        return found

    return anyio.run(collect)


def _own(frame: Pages) -> tuple[int, int, tuple[tuple[int, int], ...], bytes]:
    return frame.address_space, frame.round, frame.runs, bytes(frame.payload)


@pytest.fixture
def anonymous() -> mmap.mmap:
    return mmap.mmap(-1, 5 * CHUNK, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)


@pytest.fixture
def readable(anonymous: mmap.mmap) -> None:
    try:
        for one in shared_objects([os.getpid()]):
            os.close(one.open())
    except OSError:
        pytest.skip("needs CAP_CHECKPOINT_RESTORE, to open /proc/PID/map_files")


def test_shared_memory_is_found_once_whoever_has_it_mapped(anonymous: mmap.mmap) -> None:
    before = {one.key for one in shared_objects([os.getpid()])}
    more = mmap.mmap(-1, PAGE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    descriptor = os.memfd_create("heap")
    os.truncate(descriptor, 2 * PAGE)
    views = [mmap.mmap(descriptor, 2 * PAGE), mmap.mmap(descriptor, 2 * PAGE)]
    found = [one for one in shared_objects([os.getpid(), os.getpid(), 1 << 30]) if one.key not in before]
    assert sorted(one.name for one in found) == ["/dev/zero (deleted)", "/memfd:heap (deleted)"]
    more.close()
    for view in views:
        view.close()
    os.close(descriptor)


def test_a_file_that_is_mapped_is_not_opened_whatever_its_name(tmp_path: Path) -> None:
    """In another mount namespace the kernel tells of a path what is below the mount, so a job can make it look like anything."""
    path = tmp_path / "memfd:heap"
    path.write_bytes(bytes(PAGE))
    before = shared_objects([os.getpid()])
    with path.open("r+b") as file, mmap.mmap(file.fileno(), PAGE):
        assert shared_objects([os.getpid()]) == before


@pytest.mark.usefixtures("readable")
def test_passes_over_shared_memory_of_a_process(anonymous: mmap.mmap, tmp_path: Path) -> None:
    shared, target = SharedMemory(3, lambda: [os.getpid()]), Target(tmp_path / "target")
    content = memory(*range(1, 9))
    anonymous[CHUNK : CHUNK + len(content)] = bytes(content)
    anonymous[4 * CHUNK + PAGE : 4 * CHUNK + 2 * PAGE] = bytes(memory(20))
    for frame in one_pass(shared):
        assert isinstance(frame, Pages)
        assert frame.address_space == address_space_of(3, HELD_PAGES)
        target.take(frame)
    anonymous[CHUNK + PAGE : CHUNK + 2 * PAGE] = bytes(memory(30))
    changed = one_pass(shared)
    assert sum(frame.count for frame in changed if isinstance(frame, Pages)) == 1
    for frame in changed:
        target.take(frame)
    wanted = bytes(memory(1, 30, *range(3, 9), 20))
    frame = sent(shared.held, wanted)
    assert not frame.payload
    target.take(frame)
    assert target.image(wanted) == wanted


@pytest.mark.usefixtures("readable")
def test_what_is_unmapped_is_dropped(anonymous: mmap.mmap) -> None:
    anonymous[:PAGE] = bytes(memory(1))
    shared = SharedMemory(0, lambda: [os.getpid()])
    there = one_pass(shared)
    assert any(isinstance(frame, Pages) for frame in there)
    anonymous.close()
    (drop,) = [frame for frame in one_pass(shared) if isinstance(frame, Drop)]
    ((start, end),) = drop.runs
    assert start % SPACING == 0
    assert end == start + SPACING
    assert shared.held.take(memory(1)) == [(INLINE, 1)]
