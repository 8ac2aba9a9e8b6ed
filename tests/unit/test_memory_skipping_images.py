"""Images of a memory-skipping dump, completed: entry by entry what CRIU would have written had it looked at the memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.message import Message

from podferry.criu import skipped_pages
from podferry.criu.dump_images import PE_LAZY, PE_PRESENT, Mapped, anonymous_areas, page_map
from podferry.criu.skipped_pages import Population, complete, population, settled, worth_skipping
from podferry.errors import Failed, PeerMisbehaved
from podferry.memory.kernel import guards, pagemap
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.ranges import EMPTY, Runs
from podferry.protos.pagemap_pb2 import MmEntry, PagemapEntry, PagemapHead, VmaEntry

pytestmark = pytest.mark.unit

COMMON, PAGEMAP, PSTREE, MM = 0x54564319, 0x56084025, 0x50273030, 0x57492820
ANONYMOUS, LOCKED, HUGE, FILE = 0x22, 0x2022, 0x40022, 0x02
PRIVATE_FILE, PRIVATE, VDSO, VVAR, AIO, GUARD = (
    1 << 6 | 1,
    1 << 9 | 1,
    1 << 9 | 1 << 3,
    1 << 9 | 1 << 12,
    1 << 13,
    1 << 16,
)
SHARED, DROPPABLE = 1 << 8 | 1, 0x2A
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
    """Images of one process, 7 inside and this one here. Pages are counted from `base`."""

    def __init__(self, images: Path, base: int, *, new: bool = False) -> None:
        self.images, self.base, self.new = images, base, new

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

    def complete(
        self, *held: tuple[int, int], guards: tuple[int, int] | None = None, saved: bool = True
    ) -> tuple[bool, list[tuple[int, int, int]]]:
        """Complete them, where these pages are held; whether CRIU left them alone, and the page map."""
        there = Population(os.getpid(), self.runs(*held), self.runs(guards) if guards else EMPTY)
        left = complete(self.images, {7: there}, guards=saved)
        return left, [
            ((start - self.base) // PAGE, (end - self.base) // PAGE, flags)
            for start, end, flags in page_map(self.images, 7).entries
        ]

    def runs(self, *pages: tuple[int, int]) -> Runs:
        return Runs((self.base + first * PAGE, self.base + last * PAGE) for first, last in pages)

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
    areas = [
        (0, 4, ANONYMOUS, PRIVATE),
        (4, 6, FILE, PRIVATE_FILE),
        (6, 7, ANONYMOUS, PRIVATE),
        (7, 8, ANONYMOUS, VVAR),
        (8, 9, ANONYMOUS, VDSO),
        (9, 12, LOCKED, PRIVATE),
        (12, 13, DROPPABLE, PRIVATE),
        (13, 14, 0x21, SHARED),
        (14, 15, FILE, AIO),
    ]
    dump.write(areas, [(8, 9, PE_PRESENT), (14, 15, PE_PRESENT)], bytes([98]) * PAGE + bytes([99]) * PAGE)
    left, entries = dump.complete((1, 5), (6, 9), (10, 15))
    assert left
    assert entries == [
        (1, 4, PE_LAZY),
        (4, 5, PE_PRESENT),
        (6, 7, PE_LAZY),
        (8, 9, PE_PRESENT),
        (10, 12, PE_PRESENT),
        (14, 15, PE_PRESENT),
    ]
    assert dump.pages == [5, 98, 11, 12, 99]
    assert page_map(tmp_path, 7).pages_id == 3
    assert {path.name for path in tmp_path.iterdir()} == {"mm-7.img", "pagemap-7.img", "pages-3.img"}


def test_an_entry_tells_its_size_to_either_generation_of_criu(tmp_path: Path, memory: tuple[int, mmap.mmap]) -> None:
    dump = Dump(tmp_path, memory[0])
    dump.write([(0, 9, ANONYMOUS, PRIVATE)], [], b"")
    dump.complete((2, 5))
    data = (tmp_path / "pagemap-7.img").read_bytes()
    size = struct.unpack_from("<I", data, 8)[0]
    written = PagemapEntry.FromString(data[8 + 4 + size + 4 :])
    assert (written.compat_nr_pages, written.nr_pages, written.flags) == (3, 3, PE_LAZY)


def test_memory_that_nobody_can_feed_is_read_whole(tmp_path: Path, memory: tuple[int, mmap.mmap]) -> None:
    dump = Dump(tmp_path, memory[0])
    dump.write([(0, PAGES, HUGE, PRIVATE)], [], b"")
    assert dump.complete((0, PAGES)) == (True, [(0, PAGES, PE_PRESENT)])
    assert dump.pages == list(range(1, PAGES + 1))


def test_what_criu_found_by_itself_makes_no_difference(tmp_path: Path, memory: tuple[int, mmap.mmap]) -> None:
    """It was shown the process's own page map; or the one that it was shown has pages there."""
    dump = Dump(tmp_path, memory[0])
    areas = [(0, 9, ANONYMOUS, PRIVATE), (9, 12, FILE, PRIVATE_FILE)]
    dump.write(areas, [(1, 3, PE_LAZY), (4, 5, PE_LAZY), (9, 11, PE_PRESENT)], bytes([98]) * PAGE + bytes([99]) * PAGE)
    assert dump.complete((1, 4), (9, 12)) == (False, [(1, 4, PE_LAZY), (9, 11, PE_PRESENT), (11, 12, PE_PRESENT)])
    assert dump.pages == [98, 99, 12]


def test_a_dump_that_was_not_thin_stays_as_it_is(tmp_path: Path, memory: tuple[int, mmap.mmap]) -> None:
    dump = Dump(tmp_path, memory[0])
    dump.write([(0, 9, ANONYMOUS, PRIVATE)], [(2, 5, PE_LAZY), (5, 6, PE_PRESENT)], bytes(PAGE))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    complete(tmp_path, {}, guards=False)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_guards_are_areas_as_criu_writes_them(tmp_path: Path, memory: tuple[int, mmap.mmap]) -> None:
    dump = Dump(tmp_path, memory[0])
    dump.write([(0, 9, ANONYMOUS, PRIVATE)], [], b"")
    assert dump.complete((0, 2), guards=(3, 5)) == (True, [(0, 2, PE_LAZY)])
    mm = MmEntry.FromString((tmp_path / "mm-7.img").read_bytes()[12:])
    assert len(mm.vmas) == 2
    guard = mm.vmas[-1]
    assert (guard.start, guard.end) == next(iter(dump.runs((3, 5))))
    assert (guard.pgoff, guard.shmid, guard.prot, guard.flags, guard.status, guard.fd) == (0, 0, 0, 0, GUARD, -1)
    assert guard.HasField("pgoff") and guard.HasField("shmid") and guard.HasField("prot") and guard.HasField("fd")
    assert anonymous_areas(tmp_path, 7).runs() == dump.runs((0, 9))
    before = (tmp_path / "mm-7.img").read_bytes()
    dump.complete((0, 2), guards=(3, 5))
    assert (tmp_path / "mm-7.img").read_bytes() == before, "CRIU has saved them itself"


def test_guards_that_this_criu_would_lose_are_an_error(tmp_path: Path, memory: tuple[int, mmap.mmap]) -> None:
    dump = Dump(tmp_path, memory[0])
    dump.write([(0, 9, ANONYMOUS, PRIVATE)], [], b"")
    with pytest.raises(Failed, match="guard pages"):
        dump.complete((0, 2), guards=(3, 5), saved=False)


def test_what_does_not_hold_together_is_refused(tmp_path: Path, memory: tuple[int, mmap.mmap]) -> None:
    dump = Dump(tmp_path, memory[0])
    with pytest.raises(PeerMisbehaved, match="cannot be read"):
        dump.complete((0, 1))
    areas = [(0, PAGES, FILE, PRIVATE_FILE)]
    for entries, pages in (
        ([(0, 1, PE_PRESENT)], b"short"),
        ([(3, 4, PE_PRESENT), (0, 1, PE_PRESENT)], bytes(2 * PAGE)),
        ([(2, 2, PE_PRESENT)], b""),
    ):
        dump.write(areas, entries, pages)
        with pytest.raises(PeerMisbehaved):
            dump.complete((4, 5))
        assert (tmp_path / "pages-3.img").read_bytes() == pages


def test_memory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    area = mmap.mmap(-1, PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    area.close()
    dump = Dump(tmp_path, base)
    dump.write([(0, 1, FILE, PRIVATE_FILE)], [], b"")
    with pytest.raises(Failed, match="cannot be read"):
        dump.complete((0, 1))


def test_pieces_are_in_order_and_what_criu_wrote_comes_first() -> None:
    def pages(*runs: tuple[int, int]) -> Runs:
        return Runs((start * PAGE, end * PAGE) for start, end in runs)

    entries = [Mapped(3 * PAGE, 5 * PAGE, PE_PRESENT), Mapped(9 * PAGE, 10 * PAGE, PE_LAZY)]
    found = settled(entries, pages((0, 4), (7, 8)), pages((4, 6), (8, 9)))
    assert [(start // PAGE, end // PAGE, flags, done) for start, end, flags, done in found] == [
        (0, 3, PE_LAZY, False),
        (3, 5, PE_PRESENT, True),
        (5, 6, PE_PRESENT, False),
        (7, 8, PE_LAZY, False),
        (8, 9, PE_PRESENT, False),
    ]


@pytest.mark.parametrize("scans", [True, False])
def test_a_population_is_what_a_process_has_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scans: bool
) -> None:
    if scans and not pagemap.has_scan():
        pytest.skip("this kernel has no PAGEMAP_SCAN (6.7)")
    monkeypatch.setattr(skipped_pages, "has_scan", lambda: scans)
    (tmp_path / "file").write_bytes(bytes(4 * PAGE))
    with (tmp_path / "file").open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 4 * PAGE, flags=mmap.MAP_PRIVATE)
    own = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    shared = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    for area in (mapped, own, shared):
        assert area[0] == 0  # a file's page, or the zero page
        area[2 * PAGE] = 1
    held = population(os.getpid()).held
    starts = [ctypes.addressof(ctypes.c_char.from_buffer(area)) for area in (mapped, own, shared)]
    wanted = [[False, False, True, False]] * 2 + [[False] * 4]
    if not scans and os.geteuid():
        wanted[1] = [True, False, True, False]  # which page is the zero page is hidden
    assert [[start + page * PAGE in held for page in range(4)] for start in starts] == wanted


def test_a_process_without_memory_has_no_population() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    try:
        with pytest.raises((Failed, OSError)):
            while True:  # until it has ended; then it is a zombie
                population(pid)
    finally:
        os.waitpid(pid, 0)


def test_guards_are_no_memory() -> None:
    if not pagemap.reports_guards():
        pytest.skip("this kernel does not tell guards (6.15)")
    own = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    own[:] = bytes([1]) * len(own)
    start = ctypes.addressof(ctypes.c_char.from_buffer(own))
    own.madvise(guards._GUARD_INSTALL, PAGE, 2 * PAGE)
    found = population(os.getpid())
    assert found.guards & Runs.of(start, start + 4 * PAGE) == Runs.of(start + PAGE, start + 3 * PAGE)
    assert [start + page * PAGE in found.held for page in range(4)] == [True, False, False, True]


@pytest.mark.parametrize(("told", "made", "hidden"), [(True, True, False), (False, True, True), (False, False, False)])
def test_where_guards_hide_no_dump_is_thin(
    monkeypatch: pytest.MonkeyPatch, told: bool, made: bool, hidden: bool
) -> None:
    """Linux 6.13 and 6.14: CRIU trips over a guard there, and is not to be kept from it."""
    if not pagemap.reports_guards() and made:
        pytest.skip("this kernel has no guards, or none that it tells")
    monkeypatch.setattr(guards, "reports_guards", lambda: told)
    monkeypatch.setattr(guards, "_GUARD_INSTALL", guards._GUARD_INSTALL if made else 9999)
    guards.hides_guards.cache_clear()
    assert guards.hides_guards() is hidden
    assert skipped_pages.possible() is not hidden
    guards.hides_guards.cache_clear()


def test_memory_in_many_small_pieces_is_quicker_dumped_as_ever() -> None:
    def pieces(count: int, pages: int) -> Runs:
        return Runs((start, start + pages * PAGE) for start in range(0, count * (pages + 1) * PAGE, (pages + 1) * PAGE))

    large = (128 << 10) // PAGE
    assert worth_skipping(Runs())
    assert worth_skipping(pieces(1, 1000))
    assert worth_skipping(pieces(1000, 1))
    assert not worth_skipping(pieces(1001, 1))
    assert not worth_skipping(pieces(1001, large - 1))
    assert worth_skipping(pieces(1001, large))
