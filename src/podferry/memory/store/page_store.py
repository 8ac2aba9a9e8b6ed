"""The page store: the target's copy of the address spaces that are on their way.

A directory (on tmpfs, so that it is memory) with one sparse file per address space. The offset in the file is the
virtual address, so a page has exactly one place and sending it again overwrites it. Beside the files lies the record:
which runs are present and in which round each was last written, for the lazy-pages daemon feeds what was written last first.

An address space is named by an opaque number, its `space` (the process's pid as CRIU knows it). A page that the source
never sent, or dropped, reads as zeroes, but only once the source has said that the space is `complete`.

Callers pass what came from a peer: addresses and lengths are checked here. One thread at a time per store.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from podferry.errors import Failed, PeerMisbehaved
from podferry.fs.libc import libc
from podferry.fs.private import private_directory
from podferry.fs.replacing import replace_file
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.ranges import EMPTY, Runs
from podferry.memory.store.runs import Run, RunMap

ADDRESS_LIMIT = 1 << 56
"""User addresses end here at the latest: x86-64 with five-level page tables; arm64 has 2^52."""
LONGEST_WRITE = 64 << 20
RECENT = 1 << 15
"""So many of the last writes are remembered in their order, and up to twice as many. Their record is written and read while the
job stands still: half a million of them, as a job of 4 GiB makes, cost it 40 ms."""
RECORD = "record"

_MAGIC = b"podferry page store 2\n"
_FALLOC_PUNCH = 0x03  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, include/uapi/linux/falloc.h


@dataclass(frozen=True)
class Totals:
    """What is present, over all spaces or in one."""

    address_spaces: int = 0
    pages: int = 0
    bytes: int = 0


@dataclass
class _AddressSpace:
    fd: int
    present: RunMap = field(default_factory=RunMap)
    first_round: int = 0
    log: array[int] = field(
        default_factory=lambda: array("Q")
    )  # start, end, round of the last writes, joined where it can be
    complete: bool = False


class PageStore:
    """A page store in a directory. `create` makes one, `open` continues one that `sync` recorded."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._address_spaces: dict[int, _AddressSpace] = {}
        self.grows: Callable[[int], object] | None = None
        """Told by how many bytes a write makes the store grow, and a drop shrink; may raise before anything is written."""

    @classmethod
    def create(cls, directory: Path, grows: Callable[[int], object] | None = None) -> PageStore:
        """An empty store. The directory is made; one that holds anything already is refused with `Failed`."""
        private_directory(directory, below=directory.parent)
        if any(directory.iterdir()):
            raise Failed(f"the page store {directory} is not empty", remedy="remove what an older migration left there")
        store = cls(directory)
        store.grows = grows
        return store

    @classmethod
    def open(cls, directory: Path) -> PageStore:
        """The store as its record describes it. Raises `Failed` where there is none or it is damaged."""
        store = cls(directory)
        try:
            store._load((directory / RECORD).read_bytes())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            store.close()
            raise Failed.because(f"cannot open the page store {directory}", error) from error
        return store

    def close(self) -> None:
        """Close the files; what they hold stays."""
        for address_space in self._address_spaces.values():
            os.close(address_space.fd)
        self._address_spaces.clear()

    def discard(self) -> None:
        """Close and delete everything; memory is free again."""
        self.close()
        for path in [*self.directory.glob("space-*"), *self.directory.glob(f"{RECORD}*")]:
            path.unlink(missing_ok=True)

    def write(self, address_space: int, address: int, data: bytes | bytearray | memoryview, round: int) -> None:
        """Put whole pages at `address`. Raises `PeerMisbehaved` for an impossible address, `Failed` when memory is full."""
        length = len(data)
        end = self._check(address_space, address, address + length)
        if length > LONGEST_WRITE or not 0 <= round < 1 << 32:
            raise PeerMisbehaved(f"a write of {length} bytes in round {round} is out of bounds")
        into = self._address_space(address_space)
        if self.grows is not None:
            there = sum(run.end - run.start for run in into.present.within(address, end))
            if there < length:
                self.grows(length - there)
        try:
            # tmpfs writes what still fits and says so, before the next write fails with ENOSPC.
            written = os.pwrite(into.fd, data, address)
            if written != length:
                raise OSError(errno.ENOSPC, f"only {written} of {length} bytes fitted")
        except OSError as error:
            remedy = (
                "give the page store more memory: it needs as much as the job uses"
                if error.errno == errno.ENOSPC
                else ""
            )
            raise Failed.because(f"cannot write to the page store {self.directory}", error, remedy=remedy) from error
        into.present.set(address, end)
        log = into.log
        if log and log[-1] == round and log[-2] == address:
            log[-2] = end
            return
        if not log:
            into.first_round = round
        elif len(log) >= 2 * RECENT * 3:
            del log[: RECENT * 3]
        log.extend((address, end, round))

    def drop(self, address_space: int, start: int, end: int) -> None:
        """Forget a range: it was unmapped, or is all zero now. Its memory is free at once."""
        self._check(address_space, start, end)
        if address_space in self._address_spaces and (
            gone := self._address_spaces[address_space].present.cut(start, end)
        ):
            self.punch(address_space, start, end)
            if self.grows is not None:
                self.grows(-sum(run.end - run.start for run in gone))

    def punch(self, address_space: int, start: int, end: int) -> None:
        """Free the memory of a range and leave the record as it is: for the lazy-pages daemon, as pages reach their place."""
        fd = self._address_spaces[address_space].fd
        while libc.fallocate(fd, _FALLOC_PUNCH, start, end - start) != 0:
            if ctypes.get_errno() != errno.EINTR:
                raise Failed(
                    f"cannot free pages of the page store {self.directory}", why=os.strerror(ctypes.get_errno())
                )

    def complete(self, address_space: int) -> None:
        """Note the source's word that every page of `space` that is not zero has been written."""
        self._check(address_space, 0, PAGE)
        self._address_space(address_space).complete = True

    def is_complete(self, address_space: int) -> bool:
        """Whether a page that is absent from `space` is known to be zero."""
        return address_space in self._address_spaces and self._address_spaces[address_space].complete

    def address_spaces(self) -> list[int]:
        """The spaces known, in order."""
        return sorted(self._address_spaces)

    def present(self, address_space: int) -> Runs:
        """The pages of `space` that are there."""
        return self._address_spaces[address_space].present.runs() if address_space in self._address_spaces else EMPTY

    def holds(self, address_space: int, start: int, end: int) -> bool:
        """Whether all pages from `start` to `end` are there."""
        if address_space not in self._address_spaces:
            return False
        return (
            sum(run.end - run.start for run in self._address_spaces[address_space].present.within(start, end))
            == end - start
        )

    def newest_first(self, address_space: int) -> Iterator[Run]:
        """At least `RECENT` of the last writes, the last first, their round as value. Runs may overlap, or be dropped by now."""
        log = self._address_spaces[address_space].log if address_space in self._address_spaces else array("Q")
        for i in range(len(log) - 3, -1, -3):
            yield Run(log[i], log[i + 1], log[i + 2])

    def first_round(self, address_space: int) -> int:
        """The round of the oldest write, 0 if there is none."""
        return self._address_spaces[address_space].first_round if address_space in self._address_spaces else 0

    def fileno(self, address_space: int) -> int:
        """The descriptor of a space's file; it stays the store's."""
        return self._address_space(address_space).fd

    def totals(self, address_space: int | None = None) -> Totals:
        """What is present, in all spaces or in one."""
        chosen = (
            [self._address_spaces[address_space]] if address_space is not None else list(self._address_spaces.values())
        )
        amount = sum(one.present.total() for one in chosen)
        return Totals(len(chosen), amount // PAGE, amount)

    def verify(self, expected: Mapping[int, Totals]) -> None:
        """Compare each space with what the source says it sent. Raises `PeerMisbehaved` naming the first difference."""
        if self.address_spaces() != sorted(expected):
            raise PeerMisbehaved(
                f"the page store has the spaces {self.address_spaces()}, the source names {sorted(expected)}"
            )
        for address_space, totals in sorted(expected.items()):
            if (have := self.totals(address_space)) != totals:
                raise PeerMisbehaved(
                    f"space {address_space} is not what the source sent", why=f"{asdict(have)} is not {asdict(totals)}"
                )

    def sync(self) -> None:
        """Write the record, so that another process can `open` the store. It replaces the old one in one step."""
        parts, head = [], {}
        for key, address_space in self._address_spaces.items():
            present, log = address_space.present.dump(), address_space.log.tobytes()
            sizes = {"present": len(present), "log": len(log)}
            head[key] = sizes | {"first_round": address_space.first_round, "complete": address_space.complete}
            parts += [present, log]
        replace_file(self.directory / RECORD, b"".join([_MAGIC, json.dumps(head).encode(), b"\n", *parts]))

    def _load(self, data: bytes) -> None:
        if not data.startswith(_MAGIC):
            raise ValueError("the record has another format")
        head, _, rest = data[len(_MAGIC) :].partition(b"\n")
        at = 0
        for key, sizes in json.loads(head).items():
            address_space = self._address_space(int(key))
            middle, end = at + sizes["present"], at + sizes["present"] + sizes["log"]
            if not 0 <= at <= middle <= end <= len(rest) or sizes["log"] % 24:
                raise ValueError("the record is cut short")
            address_space.present = RunMap.load(rest[at:middle])
            address_space.log.frombytes(rest[middle:end])
            address_space.first_round, address_space.complete = int(sizes["first_round"]), bool(sizes["complete"])
            at = end

    def _address_space(self, address_space: int) -> _AddressSpace:
        found = self._address_spaces.get(address_space)
        if found is None:
            path = self.directory / f"space-{address_space}"
            found = self._address_spaces[address_space] = _AddressSpace(
                os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            )
        return found

    def _check(self, address_space: int, start: int, end: int) -> int:
        if not 0 <= address_space < 1 << 32:
            raise PeerMisbehaved(f"{address_space} does not name an address space")
        if start % PAGE or end % PAGE or not 0 <= start < end <= ADDRESS_LIMIT:
            raise PeerMisbehaved(f"{start:#x}-{end:#x} is no range of pages in an address space")
        return end
