"""A job without CRIU: memory behind a userfaultfd, handed to a lazy-pages daemon as CRIU hands it over, next to a twin that
never moved.

Every change is made to both copies at the same place, so at any time the two must be equal byte for byte.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import random
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from podferry.lazypages.criu_socket import FINISHED, SOCKET
from podferry.memory.kernel import uffd
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.store.page_store import PageStore
from podferry.protos import pagemap_pb2

MOVED = 0x10_0000_0000
TWIN = 0x20_0000_0000
EVENTS = uffd.Feature.EVENT_FORK | uffd.Feature.EVENT_REMAP | uffd.Feature.EVENT_REMOVE | uffd.Feature.EVENT_UNMAP
FIXED_NOREPLACE, FIXED = 0x100000, 0x10
MADV_DONTNEED, MADV_FREE, MADV_DONTFORK, MADV_WIPEONFORK = 4, 8, 10, 18
MAYMOVE, MREMAP_FIXED, DONTUNMAP = 1, 2, 4

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


def map_at(address: int, length: int) -> None:
    """Fresh private memory at a free address."""
    got = libc.mmap(address, length, READ_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | FIXED_NOREPLACE, -1, 0)
    if got != address:
        raise OSError(ctypes.get_errno(), f"mmap {address:#x}")


def image(path: Path, magic: int, messages: list[bytes]) -> None:
    """An image file as CRIU writes it."""
    body = b"".join(struct.pack("<I", len(message)) + message for message in messages)
    path.write_bytes(struct.pack("<II", 0x54564319, magic) + body)


def write_images(
    images: Path,
    address_spaces: dict[int, list[tuple[int, int]]],
    areas: dict[int, list[tuple[int, int, int]]] | None = None,
) -> None:
    """pstree, pagemap and mm images for processes with these lazy runs, in these areas (the third is the advice they had)."""
    trees = [pagemap_pb2.PstreeEntry(pid=pid, ppid=0).SerializeToString() for pid in address_spaces]
    image(images / "pstree.img", 0x50273030, trees)
    for pid, runs in address_spaces.items():
        entries = [
            pagemap_pb2.PagemapEntry(
                vaddr=start, compat_nr_pages=(end - start) // PAGE, nr_pages=(end - start) // PAGE, flags=2
            )
            for start, end in runs
        ]
        head = pagemap_pb2.PagemapHead(pages_id=1)
        image(images / f"pagemap-{pid}.img", 0x56084025, [message.SerializeToString() for message in (head, *entries)])
        places = areas[pid] if areas else [(start, end, 0) for start, end in runs]
        vmas = [pagemap_pb2.VmaEntry(start=a, end=b, flags=0x22, status=0x201, madv=madv) for a, b, madv in places]
        image(images / f"mm-{pid}.img", 0x57492820, [pagemap_pb2.MmEntry(vmas=vmas).SerializeToString()])


def content(seed: int, page: int) -> bytes:
    """What page `page` holds at the source; every seventh is all zero."""
    return bytes(PAGE) if page % 7 == 3 else random.Random(seed << 32 | page).randbytes(32) * (PAGE // 32)


def fill_store(directory: Path, pid: int, seed: int, pages: int, rounds: int = 3) -> None:
    """A complete store for one process: all pages in round 0, some again later."""
    chance = random.Random(seed)
    store = PageStore.create(directory)
    for round in range(rounds):
        for page in range(pages):
            if page % 7 != 3 and (round == 0 or chance.random() < 0.1):
                old = content(seed, page) if round == rounds - 1 or chance.random() < 0.5 else os.urandom(PAGE)
                store.write(pid, MOVED + page * PAGE, old, round)
    for page in range(pages):
        if page % 7 != 3:
            store.write(pid, MOVED + page * PAGE, content(seed, page), rounds)
    store.complete(pid)
    store.sync()
    store.close()


def hand_over(work: Path, pid: int, start: int, length: int) -> socket.socket:
    """Register our memory and send it to the lazy-pages daemon as CRIU does; returns the connection."""
    fd = uffd.create()
    uffd.api(fd, EVENTS)
    uffd.register(fd, start, length, uffd.RegisterMode.MISSING)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    here = os.open(work, os.O_PATH)
    connection.connect(f"/proc/self/fd/{here}/{SOCKET}")
    os.close(here)
    connection.send(struct.pack("=i", -7))  # a zombie
    connection.send(struct.pack("=i", pid))
    connection.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    os.close(fd)
    return connection


def finish(connection: socket.socket) -> None:
    """Say that the restore has finished."""
    connection.send(struct.pack("=I", FINISHED))
    connection.close()


@dataclass
class Job:
    """A program of random changes over `pages` pages, the same in both copies. `mapped` is what may be touched."""

    chance: random.Random
    pages: int
    mapped: set[int] = field(default_factory=set)
    depth: int = 0
    children: list[int] = field(default_factory=list)

    def run(self, steps: int) -> None:
        """Change and look, `steps` times; then look at everything and at how the forked children fared."""
        for _ in range(steps):
            operation = self.chance.choices(
                [
                    self.look,
                    self.write,
                    self.unmap,
                    self.renew,
                    self.remove,
                    self.move,
                    self.move_areas,
                    self.grow,
                    self.protect,
                    self.fork,
                ],
                [40, 30, 3, 2, 8, 6, 4, 3, 3, 2],
            )[0]
            operation()
        self.look_at(sorted(self.mapped))
        for child in self.children:
            _, status = os.waitpid(child, 0)
            assert status == 0, f"a forked child ended with {status:#x}"

    def look(self) -> None:
        self.look_at(self.some())

    def look_at(self, pages: list[int]) -> None:
        for page in pages:
            mine = ctypes.string_at(MOVED + page * PAGE, PAGE)
            twins = ctypes.string_at(TWIN + page * PAGE, PAGE)
            assert mine == twins, f"page {page} differs: {mine[:8].hex()} is not {twins[:8].hex()}"

    def write(self) -> None:
        for page in self.some():
            at, data = self.chance.randrange(PAGE - 16), self.chance.randbytes(16)
            for base in (MOVED, TWIN):
                ctypes.memmove(base + page * PAGE + at, data, 16)

    def unmap(self) -> None:
        first, count = self.range()
        for base in (MOVED, TWIN):
            check(libc.munmap(base + first * PAGE, count * PAGE))
        self.mapped -= set(range(first, first + count))

    def renew(self) -> None:
        """Map fresh memory over a range: what was there is unmapped by that."""
        self.renew_range(*self.range())

    def renew_range(self, first: int, count: int) -> None:
        for base in (MOVED, TWIN):
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | FIXED
            assert libc.mmap(base + first * PAGE, count * PAGE, READ_WRITE, flags, -1, 0) == base + first * PAGE
        self.mapped |= set(range(first, first + count))

    def remove(self) -> None:
        pages = self.some()
        advice = self.chance.choice([MADV_DONTNEED, MADV_DONTNEED, MADV_FREE])
        if pages:
            for base in (MOVED, TWIN):
                check(libc.madvise(base + pages[0] * PAGE, len(pages) * PAGE, advice))
            if advice == MADV_FREE:  # either content may show until it is written
                for base in (MOVED, TWIN):
                    ctypes.memset(base + pages[0] * PAGE, 1, len(pages) * PAGE)

    def move(self) -> None:
        """mremap onto another place, over whatever is there; sometimes what was left behind stays mapped, empty."""
        pages = self.area()
        to = self.chance.randrange(self.pages - len(pages)) if pages else 0
        if not pages or (to < pages[0] + len(pages) and pages[0] < to + len(pages)):
            return
        flags = MAYMOVE | MREMAP_FIXED | self.chance.choice([0, 0, DONTUNMAP])
        length = len(pages) * PAGE
        for base in (MOVED, TWIN):
            at = libc.mremap(base + pages[0] * PAGE, length, length, flags, base + to * PAGE)
            assert at == base + to * PAGE, os.strerror(ctypes.get_errno())
        if not flags & DONTUNMAP:
            self.mapped -= set(pages)
        self.mapped |= set(range(to, to + len(pages)))

    def move_areas(self) -> None:
        """mremap of several areas at once. The kernel may fail half-way: where one has a userfaultfd, it has moved those before it
        (Linux 6.17) or has unmapped the destination (before that). The twin, which has none, is made to follow."""
        pages = self.some()
        to = self.chance.randrange(self.pages - len(pages)) if pages else 0
        if not pages or (to < pages[0] + len(pages) and pages[0] < to + len(pages)):
            return
        start, length = pages[0], len(pages) * PAGE
        if len(pages) > 1 and self.chance.random() < 0.5:
            self.renew_range(start, self.chance.randrange(1, len(pages)))
        at = libc.mremap(MOVED + start * PAGE, length, length, MAYMOVE | MREMAP_FIXED, MOVED + to * PAGE)
        now = self.mapped_now()
        moved = sum(page not in now for page in pages)
        assert moved == len(pages) or at == ctypes.c_void_p(-1).value
        done = 0
        while done < moved:
            source = TWIN + (start + done) * PAGE
            count = min(moved - done, (limit(source) - source) // PAGE)
            there = TWIN + (to + done) * PAGE
            assert libc.mremap(source, count * PAGE, count * PAGE, MAYMOVE | MREMAP_FIXED, there) == there
            done += count
        for page in range(to + moved, to + len(pages)):
            if page not in now:
                check(libc.munmap(TWIN + page * PAGE, PAGE))
        self.mapped = now

    def mapped_now(self) -> set[int]:
        found: set[int] = set()
        for start, end in areas():
            first, last = max(0, (start - MOVED) // PAGE), min(self.pages, (end - MOVED) // PAGE)
            found.update(range(first, last))
        return found

    def grow(self) -> None:
        """mremap in place, over a hole behind the range: the new pages are fed too, with nothing."""
        pages = self.area()
        behind = pages[-1] + 1 if pages else self.pages
        if behind >= self.pages or behind in self.mapped:
            return
        for base in (MOVED, TWIN):
            at = libc.mremap(base + pages[0] * PAGE, len(pages) * PAGE, (len(pages) + 1) * PAGE, 0, None)
            assert at == base + pages[0] * PAGE, os.strerror(ctypes.get_errno())
        self.mapped.add(behind)

    def protect(self) -> None:
        pages = self.some()
        for protection in (mmap.PROT_READ, READ_WRITE) if pages else ():
            for base in (MOVED, TWIN):
                check(libc.mprotect(base + pages[0] * PAGE, len(pages) * PAGE, protection))

    def fork(self) -> None:
        if self.depth > 2:
            return
        seed = self.chance.random()
        child = os.fork()
        if child:
            self.children.append(child)
            return
        ended = 1
        try:
            Job(random.Random(seed), self.pages, set(self.mapped), self.depth + 1).run(20)
            ended = 0
        finally:
            os._exit(ended)

    def range(self) -> tuple[int, int]:
        first = self.chance.randrange(self.pages)
        return first, min(self.chance.randint(1, 24), self.pages - first)

    def some(self) -> list[int]:
        """Mapped pages side by side."""
        first, count = self.range()
        pages = []
        while len(pages) < count and first in self.mapped:
            pages.append(first)
            first += 1
        return pages

    def area(self) -> list[int]:
        """Pages that lie in one area, in both copies: mremap works on one area only."""
        pages = self.some()
        if not pages:
            return []
        ends = [limit(base + pages[0] * PAGE) // PAGE - base // PAGE for base in (MOVED, TWIN)]
        return [page for page in pages if page < min(ends)]


def limit(address: int) -> int:
    """Where the area around an address ends."""
    for start, end in areas():
        if start <= address < end:
            return end
    raise AssertionError(f"{address:#x} is not mapped")


def areas() -> Iterator[tuple[int, int]]:
    """The areas of this process, as start and end."""
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            start, end = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
            yield start, end


def check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def live(work: Path, pid: int, seed: int, pages: int, steps: int) -> None:
    """Be the job: map both copies, hand one over, run a random program, and compare all along."""
    map_at(MOVED, pages * PAGE)
    map_at(TWIN, pages * PAGE)
    for page in range(pages):
        ctypes.memmove(TWIN + page * PAGE, content(seed, page), PAGE)
    connection = hand_over(work, pid, MOVED, pages * PAGE)
    chance = random.Random(seed)
    job = Job(chance, pages, set(range(pages)))
    job.look()  # before the restore has finished: CRIU's own code does that
    finish(connection)
    job.run(steps)


@dataclass
class Chunks:
    """A thread's own pieces of memory: address, and for each page what it must hold (a number of `content`, or None)."""

    chance: random.Random
    seed: int
    owned: list[tuple[int, list[int | None]]]

    def run(self, steps: int) -> None:
        """Reallocate, free and look, as an allocator does that maps and moves large blocks; the kernel chooses addresses."""
        for _ in range(steps):
            at = self.chance.randrange(len(self.owned))
            address, pages = self.owned[at]
            match self.chance.randrange(10):
                case 0 | 1 | 2:
                    self.look(address, pages, 3)
                case 3 | 4 | 5 | 6:
                    self.owned[at] = self.move(address, pages)
                case 7:
                    cut = self.chance.randrange(len(pages)) + 1
                    check(libc.munmap(address, cut * PAGE))
                    self.owned[at] = (address + cut * PAGE, pages[cut:])
                case 8:
                    first = self.chance.randrange(len(pages))
                    check(libc.madvise(address + first * PAGE, PAGE, MADV_DONTNEED))
                    pages[first] = None
                case 9:
                    self.fork()
            if not self.owned[at][1]:
                del self.owned[at]
            if not self.owned:
                return
        for address, pages in self.owned:
            self.look(address, pages, len(pages))

    def look(self, address: int, pages: list[int | None], count: int) -> None:
        for number in self.chance.sample(range(len(pages)), min(count, len(pages))):
            page = pages[number]
            wanted = bytes(PAGE) if page is None else content(self.seed, page)
            mine = ctypes.string_at(address + number * PAGE, PAGE)
            assert mine == wanted, f"page {page} at {address + number * PAGE:#x} holds {mine[:8].hex()}"

    def move(self, address: int, pages: list[int | None]) -> tuple[int, list[int | None]]:
        more = self.chance.choice([0, 1, 4])
        to = libc.mremap(address, len(pages) * PAGE, (len(pages) + more) * PAGE, MAYMOVE, None)
        assert to != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
        return to, [*pages, *[None] * more]

    def fork(self) -> None:
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            assert status == 0, f"a forked child ended with {status:#x}"
            return
        ended = 1
        try:
            for address, pages in self.owned:
                self.look(address, pages, 5)
            ended = 0
        except AssertionError as error:
            os.write(2, f"in a forked child: {error}\n".encode())
        finally:
            os._exit(ended)


def live_threaded(work: Path, pid: int, seed: int, pages: int, steps: int) -> None:
    """Be a job of several threads that all change the one address space at once."""
    map_at(MOVED, pages * PAGE)
    connection = hand_over(work, pid, MOVED, pages * PAGE)
    finish(connection)
    threads, size = 4, 8
    owned: list[list[tuple[int, list[int | None]]]] = [[] for _ in range(threads)]
    for first in range(0, pages, size):
        owned[first // size % threads].append((MOVED + first * PAGE, list(range(first, first + size))))
    jobs = [Chunks(random.Random(seed * threads + n), seed, owned[n]) for n in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(job.run, steps) for job in jobs]:
            done.result()
