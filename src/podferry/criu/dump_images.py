"""Read CRIU's images: the pages that the target will request, and the processes.

The format is CRIU's (`criu/image.c`, `criu/protobuf.c`, `criu/include/{magic,pagemap}.h`): two magic numbers, then
protobuf messages, each behind its size. The images come from a peer: whatever does not hold together is refused with
`PeerMisbehaved`.
"""

from __future__ import annotations

import os
import stat
import struct
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from podferry.errors import PeerMisbehaved
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.ranges import Runs
from podferry.memory.store.page_store import ADDRESS_LIMIT, PageStore
from podferry.memory.store.runs import RunMap
from podferry.protos import pagemap_pb2

Entry = TypeVar("Entry", bound=Message)

PE_LAZY, PE_PRESENT = 2, 4

COMMON_MAGIC = 0x54564319
_PAGEMAP_MAGIC = 0x56084025
_PSTREE_MAGIC = 0x50273030
_MM_MAGIC = 0x57492820
_MNTS_MAGIC = 0x55563928
FILES_MAGIC = 0x56303138
_LARGEST_IMAGE = 1 << 30
_MOST_TASKS = 1 << 22
_UINT32 = (1 << 32) - 1

_MAP_KIND, _MAP_LAZY = 0x42022, 0x22  # of MAP_HUGETLB, MAP_LOCKED, MAP_ANONYMOUS, MAP_PRIVATE only the latter two
_SPECIAL = 1 << 2 | 1 << 3 | 1 << 12 | 1 << 16  # VMA_AREA_VSYSCALL, _VDSO, _VVAR, _GUARD of criu/include/image.h
_GUARD = 1 << 16
_DUMPED = 1 << 6 | 1 << 9 | 1 << 15  # VMA_FILE_PRIVATE, VMA_ANON_PRIVATE, VMA_AREA_SHSTK
_NOT_DUMPED = _SPECIAL | 1 << 13 | 1 << 17  # and VMA_AREA_AIORING, which CRIU always writes itself, and _UPROBES
_MAP_DROPPABLE = 8
_NOT_INHERITED = 1 << 10 | 1 << 18  # MADV_DONTFORK, MADV_WIPEONFORK


def tasks(images: Path) -> dict[int, int]:
    """The processes in the images: pid (inside the container) to the parent's pid, 0 for the first. Zombies too."""
    found: dict[int, int] = {}
    for message in _messages(images / "pstree.img", _PSTREE_MAGIC):
        entry = _parse(pagemap_pb2.PstreeEntry(), message)
        if not 0 < entry.pid < _MOST_TASKS or entry.pid in found:
            raise PeerMisbehaved(f"{images / 'pstree.img'} lists the process {entry.pid} wrongly")
        found[entry.pid] = entry.ppid
    return found


def lazy_runs(images: Path) -> dict[int, Runs]:
    """For each process with a page map, the pages that CRIU leaves to the lazy-pages daemon. Zombies have none."""
    return {pid: lazy_pages(images, pid) for pid in tasks(images) if (images / f"pagemap-{pid}.img").exists()}


def lazy_pages(images: Path, pid: int) -> Runs:
    """The pages of one process that CRIU leaves to the lazy-pages daemon."""
    starts, ends = array("Q"), array("Q")
    for entry in _page_map(images, pid)[1]:
        if entry.flags & PE_LAZY:
            starts.append(entry.start)
            ends.append(entry.end)
    return Runs(zip(starts, ends, strict=True))


class Mapped(NamedTuple):
    """Pages [start, end) of a process, and by PE_ flags where they are."""

    start: int
    end: int
    flags: int


class PageMap(NamedTuple):
    """The page map of a process, in order, and the number of its pages image."""

    pages_id: int
    entries: list[Mapped]

    def encode(self) -> bytes:
        """The page map as an image, for either generation of CRIU: since 4.2 the size of an entry is another field."""
        messages: list[Message] = [pagemap_pb2.PagemapHead(pages_id=self.pages_id)]
        for start, end, flags in self.entries:
            count = (end - start) // PAGE
            messages.append(
                pagemap_pb2.PagemapEntry(vaddr=start, compat_nr_pages=min(count, _UINT32), flags=flags, nr_pages=count)
            )
        return _image(_PAGEMAP_MAGIC, messages)


def page_map(images: Path, pid: int) -> PageMap:
    """What CRIU says of a process' pages."""
    pages_id, entries = _page_map(images, pid)
    return PageMap(pages_id, list(entries))


def _page_map(images: Path, pid: int) -> tuple[int, Iterator[Mapped]]:
    path = images / f"pagemap-{pid}.img"
    messages = _messages(path, _PAGEMAP_MAGIC)
    head = _parse(pagemap_pb2.PagemapHead(), next(messages, b""))

    def entries() -> Iterator[Mapped]:
        last = 0
        for message in messages:
            entry = _parse(pagemap_pb2.PagemapEntry(), message)
            start = entry.vaddr
            end = start + PAGE * (entry.nr_pages if entry.HasField("nr_pages") else entry.compat_nr_pages)
            if start % PAGE or not last <= start < end <= ADDRESS_LIMIT:
                raise PeerMisbehaved(f"{path} maps {start:#x}-{end:#x}", why="empty, out of order or no address")
            yield Mapped(start, end, entry.flags)
            last = end

    return head.pages_id, entries()


def anonymous_areas(images: Path, pid: int) -> RunMap:
    """The areas of a process that may hold lazy pages; value 1 where a forked child does not inherit the contents.

    Which these are is CRIU's `vma_entry_can_be_lazy` (criu/include/vma.h).
    """
    areas = RunMap()
    for vma in _areas(images, pid):
        if _can_be_lazy(vma):
            areas.set(vma.start, vma.end, 1 if vma.madv & _NOT_INHERITED else 0)
    return areas


def _can_be_lazy(vma: pagemap_pb2.VmaEntry) -> bool:
    return vma.flags & _MAP_KIND == _MAP_LAZY and not vma.status & _SPECIAL


def dumped_areas(images: Path, pid: int) -> tuple[Runs, Runs]:
    """The areas of a process of whose pages CRIU's images tell: those that may hold lazy ones, and the others.

    Which these are is the rule of `generate_vma_iovs` (criu/mem.c) and `vma_entry_is_private` (criu/include/vma.h).
    """
    lazy: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    for vma in _areas(images, pid):
        if vma.status & _DUMPED and not vma.status & _NOT_DUMPED and not vma.flags & _MAP_DROPPABLE:
            (lazy if _can_be_lazy(vma) else others).append((vma.start, vma.end))
    return Runs(lazy), Runs(others)


def add_guards(images: Path, pid: int, guards: Runs) -> None:
    """Add guard pages to the areas of a process, as CRIU does from 4.2 on (`collect_madv_guards`); not if it has done so."""
    path = images / f"mm-{pid}.img"
    mm = _mm(path)
    if any(vma.status & _GUARD for vma in mm.vmas):
        return
    for start, end in guards:
        mm.vmas.add(start=start, end=end, pgoff=0, shmid=0, prot=0, flags=0, status=_GUARD, fd=-1)
    data = mm.SerializeToString()
    path.write_bytes(struct.pack("<III", COMMON_MAGIC, _MM_MAGIC, len(data)) + data)


def _mm(path: Path) -> pagemap_pb2.MmEntry:
    return _parse(pagemap_pb2.MmEntry(), next(_messages(path, _MM_MAGIC), b""))


def _areas(images: Path, pid: int) -> Iterator[pagemap_pb2.VmaEntry]:
    path = images / f"mm-{pid}.img"
    for vma in _mm(path).vmas:
        if vma.start >= ADDRESS_LIMIT:  # the vsyscall page
            continue
        if vma.start % PAGE or vma.end % PAGE or not vma.start < vma.end <= ADDRESS_LIMIT:
            raise PeerMisbehaved(
                f"{path} has the area {vma.start:#x}-{vma.end:#x}", why="empty, out of order or no address"
            )
        yield vma


def missing(store: PageStore, images: Path) -> dict[int, Runs]:
    """Lazy pages that the target could not feed: neither in the store nor known to be zero. Empty: ready to restore."""
    unknown = {pid: lazy - store.present(pid) for pid, lazy in lazy_runs(images).items() if not store.is_complete(pid)}
    return {pid: runs for pid, runs in unknown.items() if runs}


def without_deleted_sources(mounts: bytes) -> bytes:
    """The image of a mount namespace, for a node that mounts things of its own.

    What was mounted into the container may have been deleted since: a file of a ConfigMap (`subPath`) that has changed. CRIU would
    make the file anew and delete it again; the target's is there.
    """
    entries = [_parse(pagemap_pb2.MntEntry(), message) for message in messages_of(mounts, "mountpoints", _MNTS_MAGIC)]
    stale = [entry for entry in entries if entry.deleted and entry.ext_key]
    for entry in stale:
        entry.ClearField("deleted")
    return _image(_MNTS_MAGIC, entries) if stale else mounts


def parse_entries(path: Path, magic: int, kind: type[Entry]) -> list[Entry]:
    """The entries of an image of one kind. Fields that are not in our .proto files stay in them, and are written again."""
    return [_parse(kind(), message) for message in _messages(path, magic)]


def entries_of(data: bytes, name: str, magic: int, kind: type[Entry]) -> list[Entry]:
    """The entries of an image, `name`, that is in memory."""
    return [_parse(kind(), message) for message in messages_of(data, name, magic)]


def encode_entries(magic: int, entries: Iterable[Message]) -> bytes:
    """An image of these entries."""
    return _image(magic, entries)


def write_entries(path: Path, magic: int, entries: Iterable[Message]) -> None:
    """Write an image anew."""
    path.write_bytes(_image(magic, entries))


def _image(magic: int, messages: Iterable[Message]) -> bytes:
    encoded = [message.SerializeToString() for message in messages]
    body = b"".join(struct.pack("<I", len(data)) + data for data in encoded)
    return struct.pack("<II", COMMON_MAGIC, magic) + body


def _messages(path: Path, magic: int) -> Iterator[bytes]:
    """The protobuf messages of an image. Memory stays at one image's size, which is bounded."""
    return messages_of(read_image(path), str(path), magic)


def messages_of(data: bytes, path: str, magic: int, *, first_alone: bool = False) -> Iterator[bytes]:
    """The protobuf messages of an image; the first alone where what follows it is of another kind."""
    if len(data) < 8 or struct.unpack_from("<II", data) != (COMMON_MAGIC, magic):
        raise PeerMisbehaved(f"{path} is an image of another kind than its name says")
    at = 8
    while at < len(data):
        body = at + 4
        end = body + struct.unpack_from("<I", data, at)[0] if body <= len(data) else body
        if end > len(data):
            raise PeerMisbehaved(f"{path} is cut short")
        yield data[body:end]
        if first_alone:
            return
        at = end


def read_image(path: Path) -> bytes:
    """What an image holds: a plain file of a bounded size, or `PeerMisbehaved`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise PeerMisbehaved.because(f"the image {path} cannot be read", error) from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_IMAGE:
        os.close(fd)
        raise PeerMisbehaved(f"{path} is not an image", why="no plain file, or larger than any image")
    with os.fdopen(fd, "rb") as file:
        return file.read()


def _parse(entry: Entry, message: bytes) -> Entry:
    try:
        entry.ParseFromString(message)
    except DecodeError as error:
        raise PeerMisbehaved.because("an image of CRIU's holds an invalid message", error) from error
    return entry
