"""Reading ahead what containers of a layer have read before.

A program that starts where its layers are not in memory reads them page fault by page fault, each a trip over the network.
What earlier containers read, here or elsewhere, the kernel knows: it is in the page cache. So every node notes on the share
which parts of its layer images are cached, and when a container starts, all these parts are asked for at once, in the background.

A list is a hint: it may be missing, old, or torn; nothing waits for it, and nothing fails with it. Only EROFS images have one: a
directory tree would need one for each of its files. (The idea is that of eStargz's prioritized files, docs/estargz.md of
github.com/containerd/stargz-snapshotter, which are recorded when an image is built; here the page cache is the record.)
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import structlog

from podferry.errors import PodferryError
from podferry.fs.libc import libc
from podferry.memory.ranges import Runs
from podferry.snapshotter import layout
from podferry.snapshotter.erofs import IMAGE
from podferry.snapshotter.posix import DATA_DEADLINE, PosixShare

MOST = 128 << 20  # bytes of one layer: of one that is read whole there is nothing to choose
GAP = 32 << 10  # bytes between two parts that are read rather than sought over
NEWS = 0.1  # share of a list by which it must grow to be written again
STEP = 128 << 10  # bytes asked for at once: the kernel cuts a longer wish to the file system's read-ahead
BATCH = 32  # steps within one deadline

log = structlog.get_logger()

libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_FAILED = ctypes.c_void_p(-1).value


@dataclass
class Prefetcher:
    """Keeps the lists, and reads ahead by them. `used` names the layers that this node has from the share, by chain id;
    `asked` is told of bytes asked for."""

    share: PosixShare
    used: Callable[[], Iterable[str]]
    read_only: bool = False
    asked: Callable[[int], None] = lambda count: None
    _starting: SimpleQueue[str | None] = field(default_factory=SimpleQueue)

    def starting(self, chains: Iterable[str]) -> None:
        """A container of these layers is about to start. Returns at once."""
        for chain in chains:
            self._starting.put(chain)

    def run(self) -> None:
        """Read ahead until `stop`."""
        while (chain := self._starting.get()) is not None:
            try:
                self.prefetch(chain)
            except (PodferryError, OSError) as error:
                log.info("not read ahead", chain=chain, why=str(error))

    def stop(self) -> None:
        """Let `run` return after the layer at hand."""
        self._starting.put(None)

    def prefetch(self, chain: str) -> None:
        """Ask the kernel for what containers of this layer have read."""
        pieces = list(self.known(chain).pieces(STEP))
        if not pieces:
            return
        path = _image(chain)
        descriptor = self.share.at(f"open {path}", lambda root: root.open_regular(path))
        try:
            for number in range(0, len(pieces), BATCH):
                self._ask(path, descriptor, pieces[number : number + BATCH])
        finally:
            self.share.call(f"close {path}", lambda: os.close(descriptor))

    def _ask(self, path: str, descriptor: int, pieces: list[tuple[int, int]]) -> None:
        def ask() -> None:
            for start, end in pieces:
                os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)

        self.share.call(f"read {path}", ask, DATA_DEADLINE)
        self.asked(sum(end - start for start, end in pieces))

    def note(self) -> None:
        """Add to the lists what has been read of this node's layers since."""
        for chain in [] if self.read_only else self.used():
            try:
                self._note(chain)
            except FileNotFoundError:
                continue  # a directory tree, or a layer that has just gone

    def _note(self, chain: str) -> None:
        path = _image(chain)
        read = self.share.at(f"look at {path}", lambda root: _cached(root.open_regular(path))).coalesce(GAP)
        known = self.known(chain)
        both = known | read
        if known.size * (1 + NEWS) < both.size <= MOST:
            self.share.replace(_list(chain), layout.encode({"read": [list(run) for run in both]}))

    def known(self, chain: str) -> Runs:
        """What containers of this layer have read, as bytes of its image."""
        try:
            known = Runs(layout.decode_read(self.share.read(_list(chain))))
        except (FileNotFoundError, ValueError):
            return Runs()
        return known if known.size <= MOST else Runs()  # no node writes such a list, and its pieces might fill memory


def cached(path: Path) -> Runs:
    """Which bytes of a file are in the page cache (mincore(2); needs to own the file). Reads none of them."""
    return _cached(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _cached(descriptor: int) -> Runs:
    """Of an open file, which is closed."""
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return Runs()
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        if libc.mincore(address, size, pages) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        libc.munmap(address, size)
    there = re.finditer(rb"\x01+", pages.raw)
    return Runs((run.start() * mmap.PAGESIZE, min(run.end() * mmap.PAGESIZE, size)) for run in there)


def _image(chain: str) -> str:
    return f"{layout.LAYERS}/{layout.name_of(chain)}/{IMAGE}"


def _list(chain: str) -> str:
    return f"{layout.READ}/{layout.name_of(chain)}"
