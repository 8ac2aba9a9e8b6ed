"""Pagemap entries, zero pages, the choice of a tracker: what needs no other process."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import mmap
import os
import signal
import struct
from array import array
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.errors import UsageError
from podferry.memory.kernel import pagemap
from podferry.memory.kernel.maps import private_anonymous, read_areas
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.kernel.pagemap import Category, Entries, Regions, decode_entries, open_pagemap, read_entries
from podferry.memory.kernel.reader import Data, Gone, Reader, Zero, split_zeroes
from podferry.memory.kernel.zero_frames import ZeroFrames
from podferry.memory.ranges import Runs
from podferry.memory.tracking import none
from podferry.memory.tracking.tracker import Tracker, TrackerFacts, TrackerKind, choose, no_pause
from podferry.memory.tracking.trackers import create

pytestmark = pytest.mark.unit

PRESENT, SWAPPED, SOFT_DIRTY = 1 << 63, 1 << 62, 1 << 55
ALL = TrackerFacts(machine="x86_64", pagemap_scan=True, wp_async=True, soft_dirty=True)


def test_pagemap_entries_are_decoded() -> None:
    frame = 0x7FFFFFFFFFFFF  # frame numbers and the other bits do not matter
    entries = [0, PRESENT | frame, PRESENT | SOFT_DIRTY, SWAPPED | SOFT_DIRTY, SWAPPED, SOFT_DIRTY | frame, 1 << 61]
    there, dirty = decode_entries(struct.pack(f"<{len(entries)}Q", *entries), ZeroFrames())
    assert list(there) == [0, 1, 1, 1, 1, 0, 0]
    assert list(dirty) == [0, 0, 1, 1, 0, 0, 0]
    assert decode_entries(b"", ZeroFrames(1)) == (b"", b"")
    assert decode_entries(bytes(24), ZeroFrames(1)) == (bytes(3), bytes(3))


@given(st.lists(st.tuples(st.integers(0, 1 << 13), st.sampled_from([0, PRESENT, PRESENT | SOFT_DIRTY, SWAPPED]))))
def test_the_pages_of_zeroes_are_told_by_their_frames(pages: list[tuple[int, int]]) -> None:
    base = 0x12_3456_0000
    zeroes = ZeroFrames(small=base + 0x123, huge=base + 0x600, huge_pages=512)
    entries = [base + offset | flags for offset, flags in pages]
    there, dirty = decode_entries(struct.pack(f"<{len(entries)}Q", *entries), zeroes)
    for (offset, flags), held, written in zip(pages, there, dirty, strict=True):
        zero = not flags & SWAPPED and (offset == 0x123 or 0x600 <= offset < 0x800)
        assert held == (flags != 0 and not zero)
        assert written == (held and bool(flags & SOFT_DIRTY))


FRAMES = st.lists(st.integers(0, 3), min_size=1, max_size=9)


def seen(start: int, frames: list[int]) -> Entries:
    row = struct.pack(
        f"<{len(frames)}Q", *(frame << 20 | PRESENT | (SOFT_DIRTY if frame == 2 else 0) for frame in frames)
    )
    end = start + len(frames) * PAGE
    return Entries(
        Runs.of(start, end), Runs(), ((start, row[:24]), *([(start + 3 * PAGE, row[24:])] if row[24:] else []))
    )


@given(FRAMES, FRAMES, st.integers(-4, 4))
def test_pages_in_other_frames_are_found(before: list[int], now: list[int], shift: int) -> None:
    base = 0x100000
    was = dict(enumerate(before))
    found = seen(base + shift * PAGE, now).replaced(seen(base, before))
    for index, frame in enumerate(now):
        assert (base + (index + shift) * PAGE in found) == (was.get(index + shift) != frame)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: frame numbers are hidden from others")
def test_memory_that_was_only_read_is_not_there() -> None:
    with mmap.mmap(-1, 8 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        area.madvise(mmap.MADV_HUGEPAGE)
        assert area[:] == bytes(len(area))
        file = open_pagemap(os.getpid())
        assert not read_entries(file, [(start, start + len(area))]).present
        area[5 * PAGE] = 1
        assert start + 5 * PAGE in read_entries(file, [(start, start + len(area))]).present
        os.close(file)


def test_regions_are_joined_and_told_apart() -> None:
    regions = Regions(
        array("Q", [0x1000, 0x3000, 0x8000]),
        array("Q", [0x3000, 0x4000, 0x9000]),
        array("Q", [0, Category.WRITTEN, Category.WRITTEN | Category.HUGE]),
    )
    assert regions.all() == Runs([(0x1000, 0x4000), (0x8000, 0x9000)])
    assert regions.having(Category.WRITTEN) == Runs([(0x3000, 0x4000), (0x8000, 0x9000)])


PAGES = {"zero": bytes(PAGE), "late": bytes(PAGE - 1) + b"x", "full": b"x" * PAGE, "odd": b"x" + bytes(PAGE - 1)}


@given(st.lists(st.sampled_from(sorted(PAGES)), min_size=1, max_size=12))
def test_zero_pages_are_told_from_data(kinds: list[str]) -> None:
    base = 0x10000
    memory = b"".join(PAGES[kind] for kind in kinds)
    seen = bytearray()
    for piece in split_zeroes(base, memoryview(bytearray(memory))):
        assert base + len(seen) == (piece.address if isinstance(piece, Data) else piece.start)
        if isinstance(piece, Data):
            assert all(piece.memory[at : at + PAGE] != bytes(PAGE) for at in range(0, len(piece.memory), PAGE))
            seen += piece.memory
        else:
            assert isinstance(piece, Zero)
            seen += bytes(piece.end - piece.start)
    assert seen == memory


def test_scattered_pages_are_read_each_once_and_those_that_are_gone_are_told() -> None:
    """More of them than one call takes, several times over."""
    pages, gone = 6000, range(1000, 6000, 1000)
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        handle = ctypes.c_char.from_buffer(area)
        start = ctypes.addressof(handle)
        del handle
        for page in range(0, pages, 2):
            area[page * PAGE : page * PAGE + 4] = struct.pack("<I", page + 1)
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            failed = any(libc.munmap(ctypes.c_void_p(start + page * PAGE), ctypes.c_size_t(PAGE)) for page in gone)
            os.write(tell, b"!" if failed else b".")
            signal.pause()
        try:
            assert os.read(told, 1) == b"."
            seen: list[tuple[int, int]] = []
            with Reader(child) as reader:
                wanted = Runs((start + page * PAGE, start + (page + 1) * PAGE) for page in range(0, pages, 2))
                for piece in reader.read(wanted):
                    assert not isinstance(piece, Zero)
                    first = piece.address if isinstance(piece, Data) else piece.start
                    held = struct.unpack_from("<I", piece.memory)[0] if isinstance(piece, Data) else 0
                    seen.append(((first - start) // PAGE, held))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(told)
            os.close(tell)
    assert seen == [(page, 0 if page in gone else page + 1) for page in range(0, pages, 2)]


@pytest.mark.parametrize(
    ("lacking", "kind", "reason"),
    [
        ({}, TrackerKind.UFFD, "PAGEMAP_SCAN"),
        ({"wp_async": False}, TrackerKind.SOFT_DIRTY, "WP_ASYNC"),
        ({"pagemap_scan": False}, TrackerKind.SOFT_DIRTY, "PAGEMAP_SCAN"),
        ({"machine": "riscv64"}, TrackerKind.SOFT_DIRTY, "riscv64"),
        ({"wp_async": False, "soft_dirty": False}, TrackerKind.NONE, "CONFIG_MEM_SOFT_DIRTY"),
    ],
)
def test_the_best_tracker_is_chosen_and_says_why(
    lacking: dict[str, bool | str], kind: TrackerKind, reason: str
) -> None:
    choice = choose(dataclasses.replace(ALL, **lacking))  # type: ignore[arg-type]
    assert choice.kind is kind
    assert reason in choice.reason


def test_soft_dirty_without_a_pause_is_refused() -> None:
    with pytest.raises(UsageError, match="pause"):
        create(TrackerKind.SOFT_DIRTY, list)


CLASSIC: list[Callable[[], Tracker]] = [
    lambda: create(TrackerKind.SOFT_DIRTY, lambda: [os.getpid()], pause=no_pause),
    lambda: create(TrackerKind.NONE, lambda: [os.getpid()]),
]


@pytest.mark.parametrize("make", CLASSIC)
def test_entries_are_read_of_areas_and_not_of_the_terabytes_between(
    make: Callable[[], Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def counted(file: int, length: int, offset: int) -> bytes:
        nonlocal asked
        asked += length // 8 * PAGE
        assert asked < 1 << 40, "it would read for hours"
        return read(file, length, offset)

    read = os.pread
    monkeypatch.setattr(none, "has_scan", lambda: False)
    monkeypatch.setattr(pagemap.os, "pread", counted)
    with contextlib.closing(make()) as tracker:
        [address_space] = tracker.final().address_spaces.values()
    assert address_space.areas
    assert asked <= 2 * sum(area.size for area in private_anonymous(read_areas(os.getpid())))


def test_nothing_is_read_of_a_process_that_has_got_the_pid_of_one_that_ended() -> None:
    """A child ends, and another process, here this one, answers at its pid: at the same address it holds something else."""
    shared = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    shared.write(b"secret of another" * 100)
    address = ctypes.addressof(ctypes.c_char.from_buffer(shared))
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        reader = Reader(child)
        assert [type(piece) for piece in reader.read(Runs([(address, address + PAGE)]))] == [Data]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    reader._pid = os.getpid()
    assert [type(piece) for piece in reader.read(Runs([(address, address + PAGE)]))] == [Gone]
    reader.close()
