"""Frames: what is encoded comes back however it is cut, and nothing else gets through."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.errors import Bug, PeerMisbehaved
from podferry.wire import frames
from podferry.wire.frames import (
    HEADER_SIZE,
    INLINE,
    MAX_ADDRESS,
    MAX_PAYLOAD,
    PAGE,
    ZEROS,
    Beat,
    Control,
    Drop,
    File,
    Flag,
    Frame,
    FrameKind,
    FrameReader,
    Pages,
    Tree,
    encode,
)

pytestmark = [pytest.mark.unit, pytest.mark.smoke]


def packed(frame: Frame) -> bytes:
    head, payload = encode(frame)
    return head + bytes(payload)


def solid(frame: Frame) -> Frame:
    """The frame with payloads of its own, so that it outlives the reader's buffer."""
    match frame:
        case Control():
            return Control(bytes(frame.payload))
        case Pages():
            return Pages(frame.address_space, frame.round, frame.runs, bytes(frame.payload), frame.zstd)
        case Tree():
            return Tree(frame.tree, bytes(frame.records))
        case File():
            return File(frame.directory, frame.name, frame.offset, bytes(frame.payload), frame.last, frame.runs)
    return frame


def header(kind: int, length: int, flags: int = 0, reserved: int = 0) -> bytes:
    return struct.pack("<BBHI", kind, flags, reserved, length)


@st.composite
def pages(draw: st.DrawFn) -> Pages:
    runs = draw(
        st.lists(
            st.tuples(st.integers(0, (MAX_ADDRESS >> 12) - 8).map(lambda page: page * PAGE), st.integers(1, 4)),
            min_size=1,
            max_size=4,
        )
    )
    zstd = draw(st.booleans())
    total = sum(count for _, count in runs)
    payload = (
        draw(st.binary(min_size=1, max_size=99)) if zstd else draw(st.binary(min_size=8, max_size=8)) * (total * 512)
    )
    return Pages(draw(st.integers(0, 0xFFFFFFFF)), draw(st.integers(0, 0xFFFF)), tuple(runs), payload, zstd)


page_runs = st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 20)).map(
    lambda run: (run[0] * PAGE, (run[0] + run[1]) * PAGE)
)
a_frame = st.one_of(
    st.just(Beat()),
    st.builds(Control, st.binary(min_size=2, max_size=300)),
    pages(),
    st.builds(Drop, st.integers(0, 0xFFFFFFFF), st.lists(page_runs, min_size=1, max_size=9).map(tuple)),
    st.builds(Tree, st.integers(0, 255), st.binary(min_size=1, max_size=300)),
    st.builds(
        File,
        st.integers(0, 255),
        st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,20}", fullmatch=True),
        st.integers(0, 1 << 62),
        st.binary(min_size=0, max_size=300),
        st.booleans(),
    ),
    pages().map(lambda one: File(1, "pages-1.img", 5, b"", True, one.runs)),
    st.just(File(1, "pages-1.img", 5, bytes(2 * PAGE), True, ((ZEROS, 1), (INLINE, 2), (PAGE, 3)))),
)


def cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    for size in sizes:
        yield data[:size]
        data = data[size:]
    yield data


@given(st.lists(a_frame, max_size=6), st.lists(st.integers(0, 5000), max_size=20))
def test_frames_come_back_however_they_are_cut(sent: list[Frame], sizes: list[int]) -> None:
    reader = FrameReader()
    came = [solid(frame) for piece in cut(b"".join(map(packed, sent)), sizes) for frame in reader.receive_data(piece)]
    assert came == sent
    assert not reader.in_the_middle


@given(a_frame, st.data())
def test_a_truncated_frame_is_no_frame(sent: Frame, data: st.DataObject) -> None:
    whole = packed(sent)
    end = data.draw(st.integers(0, len(whole) - 1))
    reader = FrameReader()
    assert list(reader.receive_data(whole[:end])) == []
    assert reader.in_the_middle == (end > 0)
    assert 0 < reader.missing <= len(whole) - end
    assert [solid(frame) for frame in reader.receive_data(whole[end:])] == [sent]


def test_a_frame_truncated_at_every_byte() -> None:
    for sent in (Drop(1, ((0, PAGE),)), File(1, "core-1.img", 0, b"abc", True), Tree(1, b"x"), Beat(), Control(b"{}")):
        whole = packed(sent)
        for end in range(len(whole)):
            assert list(FrameReader().receive_data(whole[:end])) == []


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_waits_and_never_changes_its_mind(garbage: bytes) -> None:
    reader = FrameReader()
    try:
        for frame in reader.receive_data(garbage):
            assert packed(frame) in garbage
    except PeerMisbehaved as first:
        for data in (b"", packed(Beat()), garbage):
            with pytest.raises(PeerMisbehaved) as again:
                list(reader.receive_data(data))
            assert again.value is first


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        (FrameKind.CONTROL, MAX_PAYLOAD + 1),
        (FrameKind.PAGES, 1 << 31),
        (FrameKind.FILE, 0xFFFFFFFF),
        (FrameKind.BEAT, 1),
        (FrameKind.CONTROL, 1),
    ],
)
def test_a_wrong_length_is_refused_with_the_header_alone(kind: FrameKind, length: int) -> None:
    with pytest.raises(PeerMisbehaved, match="allowed are"):
        list(FrameReader().receive_data(header(kind, length)))


@pytest.mark.parametrize(
    "head",
    [
        header(0, 0),
        header(7, 0),
        header(255, 2),
        header(FrameKind.BEAT, 0, flags=1),
        header(FrameKind.BEAT, 0, reserved=1),
        header(FrameKind.PAGES, 100, flags=Flag.LAST),
        header(FrameKind.CONTROL, 2, flags=Flag.ZSTD),
    ],
)
def test_an_illegal_header_is_refused(head: bytes) -> None:
    with pytest.raises(PeerMisbehaved):
        list(FrameReader().receive_data(head))


HOSTILE_NAMES = [
    "",
    ".",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\0b",
    ".hidden",
    "-rf",
    "a b",
    "ä",
    "a\n",
    "x" * 256,
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_file_name_that_is_a_path_or_no_name_is_refused(name: str) -> None:
    raw = name.encode("latin-1")[:255]
    body = struct.pack("<BBQ", 0, len(raw), 0) + raw + b"payload"
    if len(name) < 256:
        with pytest.raises(PeerMisbehaved, match="file name"):
            list(FrameReader().receive_data(header(FrameKind.FILE, len(body)) + body))
    with pytest.raises(Bug):
        encode(File(0, name, 0, b"payload"))


def hostile_bodies() -> Iterator[tuple[str, FrameKind, int, bytes]]:
    def pages_body(*runs: tuple[int, int], payload: bytes, count: int | None = None) -> bytes:
        head = struct.pack("<IHH", 1, 1, len(runs) if count is None else count)
        return head + b"".join(struct.pack("<QI", *run) for run in runs) + payload

    page = bytes(PAGE)
    yield "unaligned", FrameKind.PAGES, 0, pages_body((1, 1), payload=page)
    yield "no pages", FrameKind.PAGES, 0, pages_body((0, 0), payload=page)
    yield "beyond the address space", FrameKind.PAGES, 0, pages_body((MAX_ADDRESS, 1), payload=page)
    yield "wraps round", FrameKind.PAGES, 0, pages_body((2**64 - PAGE, 1), payload=page)
    yield "payload too short", FrameKind.PAGES, 0, pages_body((0, 2), payload=page)
    yield "payload too long", FrameKind.PAGES, 0, pages_body((0, 1), payload=page + b"x")
    yield "no runs", FrameKind.PAGES, 0, pages_body(payload=page)
    yield "ends within its runs", FrameKind.PAGES, 0, pages_body((0, 1), payload=page, count=65535)
    yield "compressed, too many pages", FrameKind.PAGES, Flag.ZSTD, pages_body((0, 257), payload=b"x")
    yield (
        "compressed, four thousand million pages",
        FrameKind.PAGES,
        Flag.ZSTD,
        pages_body((0, 0xFFFFFFFF), payload=b"x"),
    )
    yield "drop backwards", FrameKind.DROP, 0, struct.pack("<IIQQ", 1, 1, 2 * PAGE, PAGE)
    yield "drop nothing", FrameKind.DROP, 0, struct.pack("<IIQQ", 1, 1, PAGE, PAGE)
    yield "drop unaligned", FrameKind.DROP, 0, struct.pack("<IIQQ", 1, 1, 0, 1)
    yield "drop too far", FrameKind.DROP, 0, struct.pack("<IIQQ", 1, 1, 0, MAX_ADDRESS + PAGE)
    yield "drop goes on", FrameKind.DROP, 0, struct.pack("<IIQQ", 1, 1, 0, PAGE) + b"x"
    yield "drop claims more runs", FrameKind.DROP, 0, struct.pack("<IIQQ", 1, 0xFFFFFFFF, 0, PAGE)
    yield "file ends within its name", FrameKind.FILE, 0, struct.pack("<BBQ", 0, 200, 0) + b"name"
    yield "file offset too far", FrameKind.FILE, 0, struct.pack("<BBQ", 0, 1, 1 << 63) + b"nx"


@pytest.mark.parametrize(("kind", "flags", "body"), [pytest.param(*rest, id=name) for name, *rest in hostile_bodies()])
def test_an_illegal_body_is_refused(kind: FrameKind, flags: int, body: bytes) -> None:
    reader = FrameReader()
    with pytest.raises(PeerMisbehaved):
        list(reader.receive_data(header(kind, len(body), flags) + body + packed(Beat())))


@pytest.mark.parametrize(
    "frame",
    [
        Control(b""),
        Control(bytes(MAX_PAYLOAD + 1)),
        Pages(1, 1, ((0, 1),), b"x"),
        Pages(-1, 1, ((0, 1),), bytes(PAGE)),
        Pages(1, 65536, ((0, 1),), bytes(PAGE)),
        Pages(1, 1, ((-PAGE, 1),), bytes(PAGE)),
        Drop(1, ()),
        Drop(1, ((PAGE, PAGE),)),
        Drop(1, ((2 * PAGE, PAGE),)),
        Drop(1, ((0, PAGE + 1),)),
        Drop(1, ((0, MAX_ADDRESS + PAGE),)),
        Drop(1, tuple((n * 2 * PAGE, n * 2 * PAGE + PAGE) for n in range(frames.MAX_DROPS + 1))),
        Tree(256, b"x"),
        Tree(0, bytes(MAX_PAYLOAD + 1)),
        File(0, "a", -1, b""),
        File(0, "a", 0, bytes(MAX_PAYLOAD + 1)),
        File(0, "a", 0, b"x", runs=((PAGE, 1),)),
        File(0, "a", 0, b"x", runs=((INLINE, 1),)),
        File(0, "a", 0, runs=((1, 1),)),
        File(0, "a", 0, runs=((PAGE, 0),)),
        File(0, "a", 0, runs=((PAGE, MAX_PAYLOAD // PAGE), (0, 1))),
    ],
    ids=repr,
)
def test_what_we_may_not_send_is_our_bug(frame: Frame) -> None:
    with pytest.raises(Bug):
        encode(frame)


def test_payloads_are_views_of_one_buffer_and_end_with_the_next_read() -> None:
    reader = FrameReader()
    sent = packed(Pages(7, 1, ((PAGE, 2),), b"a" * 2 * PAGE))
    home = reader.buffer()
    home[: len(sent)] = sent
    reader.received(len(sent))
    frame = reader.next()
    assert isinstance(frame, Pages)
    assert isinstance(frame.payload, memoryview)
    assert frame.payload.readonly
    assert frame.payload.obj is home.obj
    assert reader.next() is None
    assert frame.payload[0] == ord("a")
    reader.buffer()
    with pytest.raises(ValueError, match="released"):
        frame.payload[0]


def test_a_payload_in_use_while_the_next_is_asked_for_is_our_bug() -> None:
    reader = FrameReader()
    (frame,) = reader.receive_data(packed(Control(b"{}")))
    assert isinstance(frame, Control)
    user = struct.Struct("2s").iter_unpack(frame.payload)  # holds the buffer, as a thread in write() would
    with pytest.raises(Bug, match="still in use"):
        reader.buffer()
    del user


def test_the_reader_takes_no_more_memory_than_its_one_buffer() -> None:
    reader = FrameReader()
    body = bytes(MAX_PAYLOAD)
    sizes = set()
    for _ in range(4):
        for frame in reader.receive_data(packed(Pages(1, 1, ((0, 256),), body)) + packed(Beat())):
            if isinstance(frame, Pages) and isinstance(frame.payload, memoryview):
                sizes.add(len(frame.payload.obj))
    assert sizes == {HEADER_SIZE + frames.MAX_BODY + FrameReader.AHEAD}


def test_pieces_give_each_run_its_contents() -> None:
    frame = Pages(1, 1, ((PAGE, 1), (8 * PAGE, 2)), b"a" * PAGE + b"b" * 2 * PAGE)
    assert [(address, bytes(data)) for address, data in frame.pieces()] == [
        (PAGE, b"a" * PAGE),
        (8 * PAGE, b"b" * 2 * PAGE),
    ]
    assert frame.count == 3
