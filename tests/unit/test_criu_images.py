"""CRIU's images: what is read of them, in the formats of 4.1 and 4.2, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from google.protobuf.message import Message

from podferry.criu.dump_images import (
    PE_LAZY,
    PE_PRESENT,
    anonymous_areas,
    lazy_pages,
    lazy_runs,
    missing,
    tasks,
)
from podferry.errors import PeerMisbehaved
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.ranges import Runs
from podferry.memory.store.page_store import PageStore
from podferry.protos.pagemap_pb2 import MmEntry, PagemapEntry, PagemapHead, PstreeEntry, VmaEntry

pytestmark = pytest.mark.unit

COMMON, PAGEMAP, PSTREE, MM = 0x54564319, 0x56084025, 0x50273030, 0x57492820
IN_PARENT = 1


def image(path: Path, magic: int, *messages: Message, head: int = COMMON, tail: bytes = b"") -> None:
    parts = [message.SerializePartialToString() for message in messages]
    body = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    path.write_bytes(struct.pack("<II", head, magic) + body + tail)


def entry(page: int, pages: int, flags: int, *, new: bool = True) -> PagemapEntry:
    count = {"nr_pages": pages} if new else {}
    return PagemapEntry(vaddr=page * PAGE, compat_nr_pages=0 if new else pages, flags=flags, **count)


def span(first: int, last: int) -> tuple[int, int]:
    return first * PAGE, last * PAGE


@pytest.fixture
def images(tmp_path: Path) -> Path:
    image(tmp_path / "pstree.img", PSTREE, PstreeEntry(pid=1, ppid=0), PstreeEntry(pid=9, ppid=1))
    return tmp_path


@pytest.mark.parametrize("new", [True, False])
def test_lazy_pages_are_those_that_criu_leaves_to_the_daemon(images: Path, new: bool) -> None:
    entries = [
        entry(1, 2, PE_LAZY, new=new),
        entry(3, 1, PE_LAZY, new=new),
        entry(4, 1, PE_PRESENT, new=new),
        entry(9, 3, PE_LAZY | PE_PRESENT, new=new),
        entry(12, 1, IN_PARENT, new=new),
    ]
    image(images / "pagemap-1.img", PAGEMAP, PagemapHead(pages_id=1), *entries)
    assert tasks(images) == {1: 0, 9: 1}
    assert lazy_runs(images) == {1: Runs([span(1, 4), span(9, 12)])}


def test_what_the_store_lacks_is_missing_unless_it_is_known_to_be_zero(images: Path) -> None:
    for pid in (1, 9):
        image(images / f"pagemap-{pid}.img", PAGEMAP, PagemapHead(pages_id=1), entry(1, 4, PE_LAZY))
    store = PageStore.create(images / "store")
    store.write(1, PAGE, b"x" * 2 * PAGE, 0)
    assert missing(store, images) == {1: Runs([span(3, 5)]), 9: Runs([span(1, 5)])}
    store.complete(1)
    store.write(9, PAGE, b"x" * 4 * PAGE, 0)
    assert missing(store, images) == {}
    store.close()


def test_areas_are_those_that_can_be_lazy_and_say_what_a_child_does_not_inherit(images: Path) -> None:
    private, locked, huge = 0x22, 0x2022, 0x40022
    image(
        images / "mm-1.img",
        MM,
        MmEntry(
            vmas=[
                VmaEntry(start=PAGE, end=3 * PAGE, flags=private, status=0x201),
                VmaEntry(start=3 * PAGE, end=4 * PAGE, flags=private, status=0x201, madv=1 << 18),
                VmaEntry(start=4 * PAGE, end=5 * PAGE, flags=private, status=0x201, madv=1 << 10),
                VmaEntry(start=5 * PAGE, end=6 * PAGE, flags=0x02, status=0x41),
                VmaEntry(start=6 * PAGE, end=7 * PAGE, flags=locked, status=0x201),
                VmaEntry(start=7 * PAGE, end=8 * PAGE, flags=huge, status=0x201),
                VmaEntry(start=8 * PAGE, end=9 * PAGE, flags=private, status=0x209),
                VmaEntry(start=0xFFFFFFFFFF600000, end=0xFFFFFFFFFF601000, flags=private, status=0x204),
            ]
        ),
    )
    assert list(anonymous_areas(images, 1)) == [(*span(1, 3), 0), (*span(3, 5), 1)]


@pytest.mark.parametrize(
    "entries",
    [
        [entry(1, 0, PE_LAZY)],
        [PagemapEntry(vaddr=PAGE + 1, compat_nr_pages=1, flags=PE_LAZY)],
        [entry(4, 2, PE_LAZY), entry(5, 1, PE_LAZY)],
        [entry(4, 2, PE_LAZY), entry(1, 1, PE_PRESENT)],
        [entry(1, 1 << 60, PE_LAZY)],
        [PagemapEntry(vaddr=1 << 63, compat_nr_pages=1, flags=PE_LAZY)],
        [PagemapEntry(vaddr=PAGE)],
    ],
)
def test_a_page_map_that_does_not_hold_together_is_refused(images: Path, entries: list[PagemapEntry]) -> None:
    image(images / "pagemap-1.img", PAGEMAP, PagemapHead(pages_id=1), *entries)
    with pytest.raises(PeerMisbehaved):
        lazy_pages(images, 1)


@pytest.mark.parametrize(
    ("head", "magic", "tail"),
    [
        (COMMON + 1, PAGEMAP, b""),
        (COMMON, MM, b""),
        (COMMON, PAGEMAP, b"\1"),
        (COMMON, PAGEMAP, b"\xff\xff\xff\xff"),
        (COMMON, PAGEMAP, b"\x02\0\0\0\x08"),
        (COMMON, PAGEMAP, b"\x02\0\0\0\xff\xff"),
    ],
)
def test_a_file_that_is_no_image_is_refused(images: Path, head: int, magic: int, tail: bytes) -> None:
    image(images / "pagemap-1.img", magic, PagemapHead(pages_id=1), head=head, tail=tail)
    with pytest.raises(PeerMisbehaved):
        lazy_pages(images, 1)


def test_files_that_are_not_plain_are_refused(images: Path) -> None:
    image(images / "elsewhere", PAGEMAP, PagemapHead(pages_id=1))
    (images / "pagemap-1.img").symlink_to(images / "elsewhere")
    (images / "pagemap-9.img").mkdir()
    (images / "empty").write_bytes(b"")
    for pid in (1, 9, 10):
        with pytest.raises(PeerMisbehaved):
            lazy_pages(images, pid)


@pytest.mark.parametrize("pids", [[0], [1 << 30], [5, 5]])
def test_a_process_list_that_cannot_be_is_refused(images: Path, pids: list[int]) -> None:
    image(images / "pstree.img", PSTREE, *[PstreeEntry(pid=pid, ppid=0) for pid in pids])
    with pytest.raises(PeerMisbehaved):
        tasks(images)
