"""Batches, compression and pacing: no I/O, no clock of their own."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from podferry.errors import Bug, PeerMisbehaved
from podferry.wire.batch import PageBatch
from podferry.wire.compression import Deflater, Measured, decide, inflate
from podferry.wire.frames import MAX_PAGES, MAX_PAYLOAD, PAGE, FrameReader, Pages, encode
from podferry.wire.pacing import BURST, TokenBucket

pytestmark = pytest.mark.unit


def numbered(first: int, count: int) -> bytes:
    return b"".join(page.to_bytes(8, "little") * (PAGE // 8) for page in range(first, first + count))


@given(st.lists(st.integers(1, 700), max_size=12))
def test_a_batch_sends_every_page_once_in_legal_frames(sizes: list[int]) -> None:
    batch, came = PageBatch(7, 3), dict[int, bytes]()

    def take(frame: Pages) -> None:
        assert (frame.address_space, frame.round) == (7, 3)
        head, payload = encode(frame)
        for decoded in FrameReader().receive_data(head + bytes(payload)):
            assert isinstance(decoded, Pages)
            for address, data in decoded.pieces():
                for offset in range(0, len(data), PAGE):
                    assert address + offset not in came
                    came[address + offset] = bytes(data[offset : offset + PAGE])

    page = 0
    for size in sizes:
        for frame in batch.add(page * PAGE, numbered(page, size)):
            take(frame)
        page += size + 1
    for frame in batch.flush():
        take(frame)
    assert list(batch.flush()) == []
    assert len(came) == sum(sizes)
    assert all(data == numbered(address // PAGE, 1) for address, data in came.items())


def test_a_batch_gathers_scattered_pages_and_passes_large_runs_uncopied() -> None:
    batch = PageBatch(1, 1)
    page = numbered(1, 1)
    gathered = [frame for n in range(1000) for frame in batch.add(n * 2 * PAGE, page)] + list(batch.flush())
    assert [frame.count for frame in gathered] == [MAX_PAGES] * 3 + [1000 - 3 * MAX_PAGES]
    large = bytearray(MAX_PAYLOAD)
    (frame,) = batch.add(0, large)
    assert isinstance(frame.payload, memoryview)
    assert frame.payload.obj is large


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1])
def test_what_is_no_whole_number_of_pages_is_our_bug(size: int) -> None:
    with pytest.raises(Bug):
        list(PageBatch(1, 1).add(0, bytes(size)))


def test_pages_come_back_from_compression() -> None:
    deflater, inflater = Deflater(), zstandard.ZstdDecompressor()
    pages = Pages(1, 1, ((0, 4), (PAGE * 9, 2)), numbered(0, 6))
    small = deflater.deflate(pages)
    assert small.zstd
    assert inflate(small, inflater) == pages
    assert deflater.taken == 6 * PAGE
    assert deflater.given == len(bytes(small.payload))
    assert deflater.ratio == deflater.taken / deflater.given > 2
    assert deflater.rate > 0


def test_pages_that_do_not_shrink_are_sent_as_they_are() -> None:
    deflater = Deflater()
    pages = Pages(1, 1, ((0, 4),), os.urandom(4 * PAGE))
    assert deflater.deflate(pages) is pages
    assert deflater.ratio == 1


def compressed(data: bytes, *, size: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=size).compress(data)


@pytest.mark.parametrize(
    "payload",
    [
        b"x",
        compressed(bytes(2 * PAGE)),
        compressed(bytes(PAGE - 1)),
        compressed(bytes(1 << 24)),
        compressed(bytes(PAGE), size=False),
        compressed(bytes(PAGE))[:-1],
        compressed(bytes(PAGE)) + b"x",
        compressed(os.urandom(PAGE)).replace(b"\x00", b"\x01"),
    ],
    ids=["garbage", "too much", "too little", "bomb", "no size", "truncated", "more behind", "damaged"],
)
def test_hostile_compressed_pages_are_refused(payload: bytes) -> None:
    with pytest.raises(PeerMisbehaved):
        inflate(Pages(1, 1, ((0, 1),), payload, zstd=True), zstandard.ZstdDecompressor(max_window_size=MAX_PAYLOAD))


SLOW_LINK = Measured(link=125e6, waiting=0.9, deflate=800e6, ratio=3.0)


@pytest.mark.parametrize(
    ("on", "measured", "after", "reason"),
    [
        (False, SLOW_LINK, True, "3.0 times faster"),
        (True, SLOW_LINK, True, "3.0 times faster"),
        (False, replace(SLOW_LINK, waiting=0.1), False, "waited for the link only 10%"),
        (False, replace(SLOW_LINK, deflate=130e6), False, "no gain"),
        (False, replace(SLOW_LINK, ratio=1.1), False, "no gain"),
        (True, replace(SLOW_LINK, ratio=1.1), True, "1.1 times faster"),
        (True, replace(SLOW_LINK, ratio=1.0), False, "no gain"),
        (True, replace(SLOW_LINK, link=600e6, waiting=0.1), False, "the processor is the limit"),
        (True, replace(SLOW_LINK, waiting=0.1), True, "3.0 times faster"),
        (False, replace(SLOW_LINK, link=0), False, "no gain"),
    ],
)
def test_compression_is_decided_by_what_was_measured(on: bool, measured: Measured, after: bool, reason: str) -> None:
    decision = decide(on, measured)
    assert decision.on is after
    assert reason in decision.reason


@given(
    st.floats(1e3, 1e10),
    st.lists(st.tuples(st.floats(0, 1.0), st.integers(1, MAX_PAYLOAD)), min_size=1, max_size=50),
)
def test_a_bucket_never_lets_more_through_than_its_rate(rate: float, pieces: list[tuple[float, int]]) -> None:
    bucket, now = TokenBucket(rate), 0.0
    gone: list[tuple[float, int]] = []
    for pause, size in pieces:
        now += pause
        now += bucket.take(now, size)
        gone.append((now, size))
    for first in range(len(gone)):
        for last in range(first, len(gone)):
            # What went from the one piece up to, not including, the other had this much time.
            allowed = (gone[last][0] - gone[first][0] + BURST) * rate
            assert sum(size for _, size in gone[first:last]) <= allowed * (1 + 1e-6) + 1e-3


def test_a_bucket_uses_its_rate_fully() -> None:
    bucket, now = TokenBucket(1e6), 0.0
    for _ in range(1000):
        now += bucket.take(now, 10_000)
    assert 10 - 2 * BURST <= now <= 10
