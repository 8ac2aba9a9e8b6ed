"""Frames: how bytes on the connection are cut into pieces. No I/O, after the manner of h11.

Every frame is a header of eight bytes, `kind u8, flags u8, zero u16, length u32`, and `length` bytes of body; all
numbers are little-endian. `FrameReader` is given bytes and gives frames back; `encode` does the opposite. What the peer
may not send raises `PeerMisbehaved` before anything is allocated or used; what we may not send raises `Bug`.

Memory is counted in pages of 4096 bytes, whatever the page size of the node.

The file is long because for each kind of frame what may be sent and what may be received stand side by side.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from podferry.core import precopy
from podferry.errors import Bug, PeerMisbehaved

PAGE = precopy.PAGE
MAX_PAYLOAD = 1 << 20
MAX_PAGES = MAX_PAYLOAD // PAGE
MAX_DROPS = 4096
HELD_PAGES = 0
"""No process has this pid: the address space of shared memory, which many processes have mapped."""
ZEROS, INLINE = 0, 1 << 55
"""Addresses of that address space that stand for something else."""
MAX_ADDRESS = 1 << 56
"""User space ends at 2**47 on x86-64, at 2**56 with five-level page tables, at 2**52 on arm64."""

Buffer = bytes | bytearray | memoryview
Run = tuple[int, int]


class FrameKind(IntEnum):
    CONTROL = 1
    PAGES = 2
    DROP = 3
    TREE = 4
    FILE = 5
    BEAT = 6


class Flag(IntFlag):
    NONE = 0
    ZSTD = 1
    LAST = 2
    HELD = 4


@dataclass(frozen=True, slots=True)
class Control:
    """A message of `podferry.wire.messages`, as JSON."""

    payload: Buffer


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages of one address space, as they were in `round`.

    `runs` are (address in bytes, pages); `payload` is their contents one after another, in one zstd frame if `zstd`.
    """

    address_space: int
    round: int
    runs: tuple[Run, ...]
    payload: Buffer
    zstd: bool = False

    @property
    def count(self) -> int:
        """How many pages these are."""
        return sum(pages for _, pages in self.runs)

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """(address, contents) of each run; only of a frame that is not compressed."""
        view, offset = memoryview(self.payload), 0
        for address, pages in self.runs:
            yield address, view[offset : offset + pages * PAGE]
            offset += pages * PAGE


@dataclass(frozen=True, slots=True)
class Drop:
    """Memory of an address space that is gone: what was sent of it is void. `runs` are (start, end) in bytes."""

    address_space: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """Records of a directory tree in the codec of `podferry.node.upper`; `tree` tells trees apart."""

    tree: int
    records: Buffer


@dataclass(frozen=True, slots=True)
class File:
    """A piece of a file of a flat directory, such as a CRIU image; `last` marks its end.

    Its contents are `payload`; or, where there are `runs`, whole pages of which the target may hold some already: (address in
    bytes, pages) in the address space `HELD_PAGES` of the container, one run after another. Those at `ZEROS` hold only zeros,
    those at `INLINE` are the next pages of `payload`.
    """

    directory: int
    name: str
    offset: int
    payload: Buffer = b""
    last: bool = False
    runs: tuple[Run, ...] = ()

    @property
    def size(self) -> int:
        """How many bytes of the file these are."""
        return sum(pages for _, pages in self.runs) * PAGE if self.runs else _size(self.payload)


@dataclass(frozen=True, slots=True)
class Beat:
    """Nothing, but it shows that the peer lives."""


Data = Pages | Drop | Tree | File
Frame = Control | Beat | Data

_HEADER = struct.Struct("<BBHI")
_PAGES = struct.Struct("<IHH")
_PAGES_RUN = struct.Struct("<QI")
_DROP = struct.Struct("<II")
_DROP_RUN = struct.Struct("<QQ")
_FILE = struct.Struct("<BBQ")
_FILE_RUNS = struct.Struct("<H")
_TREE = struct.Struct("<B")
_LONGEST_RUNS = MAX_PAGES * _PAGES_RUN.size

HEADER_SIZE = _HEADER.size
BODY_SIZES: dict[FrameKind, tuple[int, int]] = {
    FrameKind.CONTROL: (2, MAX_PAYLOAD),
    FrameKind.PAGES: (_PAGES.size + _PAGES_RUN.size + 1, _PAGES.size + _LONGEST_RUNS + MAX_PAYLOAD),
    FrameKind.DROP: (_DROP.size + _DROP_RUN.size, _DROP.size + MAX_DROPS * _DROP_RUN.size),
    FrameKind.TREE: (_TREE.size + 1, _TREE.size + MAX_PAYLOAD),
    FrameKind.FILE: (_FILE.size + 1, _FILE.size + 255 + _FILE_RUNS.size + _LONGEST_RUNS + MAX_PAYLOAD),
    FrameKind.BEAT: (0, 0),
}
"""The shortest and the longest body of each kind, in bytes."""
FLAGS_OF: dict[FrameKind, Flag] = {FrameKind.PAGES: Flag.ZSTD, FrameKind.FILE: Flag.LAST | Flag.HELD}
"""The flags that a kind may carry; the others none."""
MAX_BODY = max(longest for _, longest in BODY_SIZES.values())

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,254}\Z")


class _Illegal(ValueError):
    """What neither side may send; `encode` makes a `Bug` of it, the reader `PeerMisbehaved`."""


def encode(frame: Frame) -> tuple[bytes, memoryview]:
    """The frame as (header and fixed part, payload); the payload is the frame's own, not a copy. Raises `Bug`."""
    try:
        return _encode(frame)
    except (_Illegal, struct.error) as cause:
        raise Bug.because(f"illegal frame {type(frame).__name__}", cause) from cause


def _encode(frame: Frame) -> tuple[bytes, memoryview]:
    payload: Buffer = b""
    fixed, flags = b"", Flag.NONE
    match frame:
        case Pages():
            kind, payload = FrameKind.PAGES, frame.payload
            flags = Flag.ZSTD if frame.zstd else Flag.NONE
            _check_pages(frame)
            runs = b"".join(_PAGES_RUN.pack(*run) for run in frame.runs)
            fixed = _PAGES.pack(frame.address_space, frame.round, len(frame.runs)) + runs
        case Control():
            kind, payload = FrameKind.CONTROL, frame.payload
        case Drop():
            kind = FrameKind.DROP
            _check_drop(frame)
            fixed = _DROP.pack(frame.address_space, len(frame.runs)) + b"".join(
                _DROP_RUN.pack(*run) for run in frame.runs
            )
        case Tree():
            kind, payload = FrameKind.TREE, frame.records
            fixed = _TREE.pack(frame.tree)
        case File():
            kind, payload = FrameKind.FILE, frame.payload
            flags = (Flag.LAST if frame.last else Flag.NONE) | (Flag.HELD if frame.runs else Flag.NONE)
            _check_file(frame)
            fixed = _FILE.pack(frame.directory, len(frame.name), frame.offset) + frame.name.encode("ascii")
            if frame.runs:
                fixed += _FILE_RUNS.pack(len(frame.runs)) + b"".join(_PAGES_RUN.pack(*run) for run in frame.runs)
        case Beat():
            kind = FrameKind.BEAT
    view = memoryview(payload).cast("B")
    length = len(fixed) + len(view)
    _check_header(kind, flags, 0, length)
    return _HEADER.pack(kind, flags, 0, length) + fixed, view


class FrameReader:
    """Bytes in, frames out, through one buffer of fixed size.

    Read into `buffer()`, say how much with `received()`, then call `next()` until it gives None. The payloads are views
    of that buffer: they end with the next call of `buffer()`, and using them later raises ValueError (slices taken of
    them, which Python does not trace, show other bytes then). After illegal input `next` raises the same `PeerMisbehaved`
    for ever.
    """

    AHEAD = 1 << 16
    """Bytes read beyond the frame in hand: enough for many small frames, little to move to the front afterwards."""

    def __init__(self) -> None:
        self._view = memoryview(bytearray(HEADER_SIZE + MAX_BODY + self.AHEAD))
        self._start = 0
        self._end = 0
        self._lent: list[memoryview] = []
        self._error: PeerMisbehaved | None = None

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty. Ends all views lent so far; raises `Bug` if one is still exported."""
        try:
            while self._lent:
                self._lent[-1].release()
                self._lent.pop()
        except BufferError as cause:
            raise Bug("a payload is still in use although the next frame is asked for") from cause
        if self._start:
            held = self._end - self._start
            self._view[:held] = self._view[self._start : self._end]
            self._start, self._end = 0, held
        return self._view[self._end : max(self._need(), self._end + self.AHEAD)]

    def received(self, count: int) -> None:
        """`count` bytes were put at the front of what `buffer` gave."""
        self._end += count

    @property
    def missing(self) -> int:
        """How many more bytes are needed, at least, before `next` can give a frame."""
        try:
            return max(0, self._start + self._need() - self._end)
        except _Illegal:
            return 0

    @property
    def in_the_middle(self) -> bool:
        """Whether a frame has begun that has not ended; an end of file is then a truncation."""
        return self._end > self._start

    def next(self) -> Frame | None:
        """The next frame, or None if more bytes are needed. Raises `PeerMisbehaved`."""
        if self._error is not None:
            raise self._error
        try:
            need = self._need()
            if self._end - self._start < need:
                return None
            kind, flags, _, _ = _HEADER.unpack_from(self._view, self._start)
            body = self._view[self._start + HEADER_SIZE : self._start + need].toreadonly()
            self._lent.append(body)
            frame = self._decode(FrameKind(kind), Flag(flags), body)
        except (_Illegal, struct.error) as cause:
            self._error = PeerMisbehaved("illegal frame", why=str(cause))
            raise self._error from cause
        self._start += need
        return frame

    def receive_data(self, data: Buffer) -> Iterator[Frame]:
        """Take all of `data` and give the frames that it completes; a frame's payload lasts until the next is asked for."""
        rest = memoryview(data).cast("B")
        while True:
            frame = self.next()
            if frame is not None:
                yield frame
            elif rest:
                into = self.buffer()
                size = min(len(into), len(rest))
                into[:size] = rest[:size]
                self.received(size)
                rest = rest[size:]
            else:
                return

    def _need(self) -> int:
        """The size of the frame in hand as far as it is known: that of a header, or of the whole frame."""
        if self._end - self._start < HEADER_SIZE:
            return HEADER_SIZE
        kind, flags, reserved, length = _HEADER.unpack_from(self._view, self._start)
        _check_header(kind, flags, reserved, length)
        return HEADER_SIZE + int(length)

    def _lend(self, body: memoryview, start: int) -> memoryview:
        payload = body[start:]
        self._lent.append(payload)
        return payload

    def _decode(self, kind: FrameKind, flags: Flag, body: memoryview) -> Frame:
        match kind:
            case FrameKind.PAGES:
                address_space, round_, count = _PAGES.unpack_from(body)
                runs, end = _runs(_PAGES_RUN, body, _PAGES.size, count)
                pages = Pages(address_space, round_, runs, self._lend(body, end), zstd=Flag.ZSTD in flags)
                _check_pages(pages)
                return pages
            case FrameKind.CONTROL:
                return Control(body)
            case FrameKind.DROP:
                address_space, count = _DROP.unpack_from(body)
                runs, end = _runs(_DROP_RUN, body, _DROP.size, count)
                if end != len(body):
                    raise _Illegal("the drop frame goes on after its runs")
                drop = Drop(address_space, runs)
                _check_drop(drop)
                return drop
            case FrameKind.TREE:
                return Tree(body[0], self._lend(body, _TREE.size))
            case FrameKind.FILE:
                directory, length, offset = _FILE.unpack_from(body)
                name = bytes(body[_FILE.size : _FILE.size + length])
                if len(name) != length:
                    raise _Illegal("the file frame ends within the name")
                start, runs = _FILE.size + length, ()
                if Flag.HELD in flags:
                    runs, start = _runs(_PAGES_RUN, body, start + _FILE_RUNS.size, *_FILE_RUNS.unpack_from(body, start))
                    if not runs:
                        raise _Illegal("a file frame of no runs")
                payload, last = self._lend(body, start), Flag.LAST in flags
                file = File(directory, name.decode("latin-1"), offset, payload, last, runs)
                _check_file(file)
                return file
            case FrameKind.BEAT:
                return Beat()


def _runs(shape: struct.Struct, body: memoryview, start: int, count: int) -> tuple[tuple[Run, ...], int]:
    """`count` runs at `start` of `body`, and where they end."""
    end = start + count * shape.size
    if end > len(body):
        raise _Illegal("the frame ends within its runs")
    return tuple(shape.iter_unpack(body[start:end])), end


def _size(payload: Buffer) -> int:
    return len(payload) if isinstance(payload, bytes) else memoryview(payload).nbytes


def _check_header(kind: int, flags: int, reserved: int, length: int) -> None:
    if kind not in BODY_SIZES:
        raise _Illegal(f"unknown kind {kind}")
    kind = FrameKind(kind)
    shortest, longest = BODY_SIZES[kind]
    if not shortest <= length <= longest:
        raise _Illegal(f"{length} bytes of {kind.name}, allowed are {shortest} to {longest}")
    if flags & ~FLAGS_OF.get(kind, Flag.NONE) or reserved:
        raise _Illegal(f"flags {flags:#x} and reserved {reserved:#x} of {kind.name}")


def _check_runs(runs: tuple[Run, ...]) -> int:
    """How many pages they are."""
    total = 0
    for address, pages in runs:
        if pages < 1 or address % PAGE or address + pages * PAGE > MAX_ADDRESS:
            raise _Illegal(f"{pages} pages at {address:#x}")
        total += pages
    if not 1 <= total <= MAX_PAGES:
        raise _Illegal(f"{total} pages in one frame, allowed are 1 to {MAX_PAGES}")
    return total


def _check_pages(frame: Pages) -> None:
    total = _check_runs(frame.runs)
    size = _size(frame.payload)
    if not (0 < size <= MAX_PAYLOAD if frame.zstd else size == total * PAGE):
        raise _Illegal(f"{size} bytes for {total} pages")


def _check_drop(frame: Drop) -> None:
    if not 1 <= len(frame.runs) <= MAX_DROPS:
        raise _Illegal(f"{len(frame.runs)} runs in one drop frame, allowed are 1 to {MAX_DROPS}")
    for start, end in frame.runs:
        if start % PAGE or end % PAGE or not start < end <= MAX_ADDRESS:
            raise _Illegal(f"memory from {start:#x} to {end:#x}")


def _check_file(frame: File) -> None:
    if not _FILE_NAME.match(frame.name):
        raise _Illegal(f"file name {frame.name!r}")
    if frame.runs:
        _check_runs(frame.runs)
        inline = sum(pages for address, pages in frame.runs if address == INLINE) * PAGE
        if _size(frame.payload) != inline:
            raise _Illegal(f"{_size(frame.payload)} bytes for {inline}")
    if frame.offset + frame.size > 1 << 63:
        raise _Illegal(f"file offset {frame.offset}")
    if frame.size > MAX_PAYLOAD:
        raise _Illegal(f"{frame.size} bytes in one file frame")
