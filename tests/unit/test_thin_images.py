"""Images of a thin dump, completed: entry by entry what CRIU would have written without a parent."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.message import Message

from podferry.errors import Failed, PeerMisbehaved
from podferry.memory.criu_images import PE_LAZY, PE_PARENT, PE_PRESENT, Mapped, lazy_runs, page_map
from podferry.memory.ranges import Runs
from podferry.memory.thin_images import complete, is_thin, settled, worth_sparing
from podferry.memory.uffd import PAGE
from podferry.protos.pagemap_pb2 import MmEntry, PagemapEntry, PagemapHead, PstreeEntry, VmaEntry

pytestmark = pytest.mark.unit

COMMON, PAGEMAP, PSTREE, MM = 0x54564319, 0x56084025, 0x50273030, 0x57492820
ANONYMOUS, LOCKED, HUGE, FILE = 0x22, 0x2022, 0x40022, 0x02
VDSO, GUARD = 1 << 3, 1 << 16
PAGES = 16


@pytest.fixture
def memory() -> Iterator[tuple[int, mmap.mmap]]:
    """Memory of this process whose page n is full of n + 1, and its address."""
    area = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area[:] = b"".join(bytes([number + 1]) * PAGE for number in range(PAGES))
    yield ctypes.addressof(ctypes.c_char.from_buffer(area)), area


def image(path: Path, magic: int, *messages: Message) -> None:
    parts = [message.SerializePartialToString() for message in messages]
    path.write_bytes(
        struct.pack("<II", COMMON, magic) + b"".join(struct.pack("<I", len(part)) + part for part in parts)
    )


def entry(start: int, pages: int, flags: int, *, new: bool) -> PagemapEntry:
    """As CRIU up to 4.1 writes it, or as 4.2 does."""
    count = {"nr_pages": pages} if new else {}
    return PagemapEntry(vaddr=start, compat_nr_pages=0 if new else pages, flags=flags, **count)  # type: ignore[arg-type]


class Dump:
    """Images of one process, 7 inside and this one here."""

    def __init__(self, images: Path, base: int, *, new: bool = False) -> None:
        self.images, self.base, self.new = images, base, new
        image(images / "pstree.img", PSTREE, PstreeEntry(pid=7, ppid=0), PstreeEntry(pid=8, ppid=7))  # 8: a zombie
        (images / "parent").symlink_to("../parent")

    def write(self, areas: list[tuple[int, int, int, int]], entries: list[tuple[int, int, int]], pages: bytes) -> None:
        """`areas` are first page, last, flags, status; `entries` first page, last, flags."""
        vmas = [
            VmaEntry(start=self.base + first * PAGE, end=self.base + last * PAGE, flags=flags, status=status)
            for first, last, flags, status in areas
        ]
        image(self.images / "mm-7.img", MM, MmEntry(vmas=vmas))
        maps = [entry(self.base + a * PAGE, b - a, flags, new=self.new) for a, b, flags in entries]
        image(self.images / "pagemap-7.img", PAGEMAP, PagemapHead(pages_id=3), *maps)
        (self.images / "pages-3.img").write_bytes(pages)

    def complete(self) -> list[tuple[int, int, int]]:
        complete(self.images, {7: os.getpid()})
        assert not is_thin(self.images)
        return [
            ((start - self.base) // PAGE, (end - self.base) // PAGE, flags)
            for start, end, flags in page_map(self.images, 7).entries
        ]

    @property
    def pages(self) -> list[int]:
        """The first byte of each page in the pages image."""
        data = (self.images / "pages-3.img").read_bytes()
        assert len(data) % PAGE == 0
        return [data[at] for at in range(0, len(data), PAGE)]


@pytest.mark.parametrize("new", [False, True])
def test_what_can_be_fed_is_lazy_and_the_rest_is_in_the_pages_image(
    tmp_path: Path, memory: tuple[int, mmap.mmap], new: bool
) -> None:
    dump = Dump(tmp_path, memory[0], new=new)
    areas = [(0, 4, ANONYMOUS, 1), (4, 6, FILE, 1), (6, 8, ANONYMOUS, 1), (8, 9, ANONYMOUS, VDSO), (9, 12, LOCKED, 1)]
    # One hole over several areas; what CRIU spliced, as of a process that the parent does not know; and a page it wrote.
    entries = [(1, 7, PE_PARENT), (7, 8, PE_LAZY), (8, 10, PE_PARENT), (10, 11, PE_PRESENT), (11, 12, PE_PARENT)]
    dump.write([*areas, (2, 3, 0, GUARD)], entries, bytes([99]) * PAGE)
    assert dump.complete() == [
        (1, 4, PE_LAZY),
        (4, 6, PE_PRESENT),
        (6, 7, PE_LAZY),
        (7, 8, PE_LAZY),
        (8, 10, PE_PRESENT),
        (10, 11, PE_PRESENT),
        (11, 12, PE_PRESENT),
    ]
    assert dump.pages == [5, 6, 9, 10, 99, 12]
    assert page_map(tmp_path, 7).pages_id == 3
    base = memory[0]
    assert lazy_runs(tmp_path) == {7: Runs([(base + PAGE, base + 4 * PAGE), (base + 6 * PAGE, base + 8 * PAGE)])}
    assert {path.name for path in tmp_path.iterdir()} == {"pstree.img", "mm-7.img", "pagemap-7.img", "pages-3.img"}


def test_an_entry_tells_its_size_to_either_generation_of_criu(tmp_path: Path, memory: tuple[int, mmap.mmap]) -> None:
    dump = Dump(tmp_path, memory[0])
    dump.write([(0, 9, ANONYMOUS, 1)], [(2, 5, PE_PARENT)], b"")
    dump.complete()
    data = (tmp_path / "pagemap-7.img").read_bytes()
    size = struct.unpack_from("<I", data, 8)[0]
    written = PagemapEntry.FromString(data[8 + 4 + size + 4 :])
    assert (written.compat_nr_pages, written.nr_pages, written.flags) == (3, 3, PE_LAZY)


def test_memory_that_nobody_can_feed_is_read_whole(tmp_path: Path, memory: tuple[int, mmap.mmap]) -> None:
    dump = Dump(tmp_path, memory[0])
    dump.write([(0, PAGES, HUGE, 1)], [(0, PAGES, PE_PARENT)], b"")
    assert dump.complete() == [(0, PAGES, PE_PRESENT)]
    assert dump.pages == list(range(1, PAGES + 1))


def test_a_dump_that_was_not_thin_stays_as_it_is(tmp_path: Path, memory: tuple[int, mmap.mmap]) -> None:
    dump = Dump(tmp_path, memory[0])
    dump.write([(0, 9, ANONYMOUS, 1)], [(2, 5, PE_LAZY), (5, 6, PE_PRESENT)], bytes(PAGE))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    complete(tmp_path, {})  # has a parent, and nothing in it: a process that was forked too late
    assert not is_thin(tmp_path)
    complete(tmp_path, {})
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_an_ordinary_dump_is_not_looked_into(tmp_path: Path) -> None:
    complete(tmp_path, {})


def test_what_does_not_hold_together_is_refused(tmp_path: Path, memory: tuple[int, mmap.mmap]) -> None:
    dump = Dump(tmp_path, memory[0])
    areas = [(0, PAGES, FILE, 1)]
    dump.write(areas, [(0, 2, PE_PARENT)], b"")
    with pytest.raises(Failed, match="process 7"):
        complete(tmp_path, {1: os.getpid()})
    for entries, pages in (
        ([(0, 1, PE_PRESENT), (1, 2, PE_PARENT)], b"short"),
        ([(3, 4, PE_PARENT), (0, 1, PE_PARENT)], b""),
        ([(0, 1, PE_PARENT), (2, 2, PE_PARENT)], b""),
    ):
        dump.write(areas, entries, pages)
        with pytest.raises(PeerMisbehaved):
            dump.complete()
        assert is_thin(tmp_path), "nobody takes it for whole"


def test_memory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    area = mmap.mmap(-1, PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    area.close()
    dump = Dump(tmp_path, base)
    dump.write([(0, 1, FILE, 1)], [(0, 1, PE_PARENT)], b"")
    with pytest.raises(Failed, match="cannot be read"):
        dump.complete()


def test_holes_end_where_areas_end() -> None:
    def pages(*runs: tuple[int, int]) -> Runs:
        return Runs((start * PAGE, end * PAGE) for start, end in runs)

    entries = [Mapped(PAGE, 9 * PAGE, PE_PARENT), Mapped(9 * PAGE, 10 * PAGE, PE_LAZY)]
    found = settled(entries, pages((0, 2), (4, 5), (8, 20)))
    assert [(start // PAGE, end // PAGE, flags, done) for start, end, flags, done in found] == [
        (1, 2, PE_LAZY, False),
        (2, 4, PE_PRESENT, False),
        (4, 5, PE_LAZY, False),
        (5, 8, PE_PRESENT, False),
        (8, 9, PE_LAZY, False),
        (9, 10, PE_LAZY, True),
    ]


def test_memory_in_many_pieces_is_quicker_dumped_as_ever() -> None:
    mib = 1 << 20
    assert worth_sparing(Runs([(0, mib)]))
    assert worth_sparing(Runs([(0, mib), (2 * mib, 2 * mib + PAGE)]))
    assert not worth_sparing(Runs((start, start + PAGE) for start in range(0, mib, 2 * PAGE)))
    assert worth_sparing(Runs())
