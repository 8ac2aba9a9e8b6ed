"""Pagemap entries, zero pages, the choice of a tracker: what needs no other process."""

from __future__ import annotations

import dataclasses
import struct
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.errors import UsageError
from podferry.memory.pagemap import PAGE, Category, Regions, decode_entries
from podferry.memory.ranges import Runs
from podferry.memory.reader import Data, Zero, tell_zeroes
from podferry.memory.tracker import Kind, TrackerFacts, choose, create

pytestmark = pytest.mark.unit

PRESENT, SWAPPED, SOFT_DIRTY = 1 << 63, 1 << 62, 1 << 55
ALL = TrackerFacts(machine="x86_64", pagemap_scan=True, wp_async=True, soft_dirty=True)


def test_pagemap_entries_are_decoded() -> None:
    frame = 0x7FFFFFFFFFFFF  # frame numbers and the other bits do not matter
    entries = [0, PRESENT | frame, PRESENT | SOFT_DIRTY, SWAPPED | SOFT_DIRTY, SWAPPED, SOFT_DIRTY | frame, 1 << 61]
    there, dirty = decode_entries(struct.pack(f"<{len(entries)}Q", *entries))
    assert list(there) == [0, 1, 1, 1, 1, 0, 0]
    assert list(dirty) == [0, 0, 1, 1, 0, 0, 0]
    assert decode_entries(b"") == (b"", b"")


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
    for piece in tell_zeroes(base, memoryview(bytearray(memory))):
        assert base + len(seen) == (piece.address if isinstance(piece, Data) else piece.start)
        if isinstance(piece, Data):
            assert all(piece.memory[at : at + PAGE] != bytes(PAGE) for at in range(0, len(piece.memory), PAGE))
            seen += piece.memory
        else:
            assert isinstance(piece, Zero)
            seen += bytes(piece.end - piece.start)
    assert seen == memory


@pytest.mark.parametrize(
    ("lacking", "kind", "reason"),
    [
        ({}, Kind.UFFD, "PAGEMAP_SCAN"),
        ({"wp_async": False}, Kind.SOFT_DIRTY, "WP_ASYNC"),
        ({"pagemap_scan": False}, Kind.SOFT_DIRTY, "PAGEMAP_SCAN"),
        ({"machine": "riscv64"}, Kind.SOFT_DIRTY, "riscv64"),
        ({"wp_async": False, "soft_dirty": False}, Kind.NONE, "CONFIG_MEM_SOFT_DIRTY"),
    ],
)
def test_the_best_tracker_is_chosen_and_says_why(lacking: dict[str, bool | str], kind: Kind, reason: str) -> None:
    choice = choose(dataclasses.replace(ALL, **lacking))  # type: ignore[arg-type]
    assert choice.kind is kind
    assert reason in choice.reason


def test_soft_dirty_without_a_pause_is_refused() -> None:
    with pytest.raises(UsageError, match="pause"):
        create(Kind.SOFT_DIRTY, list)
