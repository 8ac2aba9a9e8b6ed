"""The records of a pass: what the source says and the target does. Pure: bytes in, values out.

A chunk is a sequence of whole records and at most `MAX_CHUNK` bytes long. A record is a verb (u8), the length of its
body (u32) and the body; numbers are little-endian; a path is a u16 length and that many bytes. A pass is

    BEGIN  PARK*  REMOVE*  (MAKE | UNPARK | LINK | FILE (DATA | HOLE)* | ATTRIBUTES)*  END

Everything that is read here may come from a hostile peer. What does not follow the form raises `PeerMisbehaved`;
whether a well-formed record makes sense is for the receiver to judge.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from podferry.errors import PeerMisbehaved
from podferry.node.upper.entries import MAX_DEPTH, MAX_NAME, MAX_PATH, MAX_XATTRS, Entry, carried

MAX_CHUNK = 512 * 1024
VERSION = 1
SECOND = 1_000_000_000
KINDS = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK})

Record = tuple[bytes, ...]
"""Parts that make one record when joined; content is not copied for its header's sake."""


class Verb(IntEnum):
    BEGIN = 1
    PARK = 2
    REMOVE = 3
    MAKE = 4
    UNPARK = 5
    LINK = 6
    FILE = 7
    DATA = 8
    HOLE = 9
    ATTRIBUTES = 10
    END = 11


class How(IntEnum):
    """What becomes of a regular file's content when it is opened for a new one."""

    CREATE = 0
    """The file must not exist."""
    DISCARD = 1
    """It exists; nothing of its content is known to be right."""
    PATCH = 2
    """It exists; its content stays but for what follows."""


class Attributes(NamedTuple):
    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    xattrs: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Summary:
    """What one pass did, counted by each side for itself; both must come to the same.

    `entries` is the number of links made and of entries that got attributes, `bytes` that of content sent, `digest` is
    the XXH3-128 of all chunks before the last one, in hexadecimal.
    """

    entries: int
    bytes: int
    digest: str


_HEAD = struct.Struct("<BI")
_BEGIN = struct.Struct("<BB")
_LENGTH = struct.Struct("<H")
_SLOT = struct.Struct("<I")
_MAKE = struct.Struct("<IQ")
_FILE = struct.Struct("<BQ")
_OFFSET = struct.Struct("<Q")
_HOLE = struct.Struct("<QQ")
_ATTRIBUTES = struct.Struct("<IIIqIqIH")
_XATTR = struct.Struct("<HI")
_END = struct.Struct("<QQ16s")


def begin(*, fresh: bool) -> Record:
    return _record(Verb.BEGIN, _BEGIN.pack(VERSION, fresh))


def park(path: bytes, slot: int) -> Record:
    return _record(Verb.PARK, _SLOT.pack(slot) + _sized(path))


def unpark(slot: int, path: bytes) -> Record:
    return _record(Verb.UNPARK, _SLOT.pack(slot) + _sized(path))


def remove(path: bytes) -> Record:
    return _record(Verb.REMOVE, _sized(path))


def make(path: bytes, entry: Entry) -> Record:
    """A directory, symbolic link, FIFO, socket or device node."""
    return _record(Verb.MAKE, _MAKE.pack(entry.kind, entry.rdev) + _sized(path) + _sized(entry.target))


def link(path: bytes, leader: bytes) -> Record:
    return _record(Verb.LINK, _sized(path) + _sized(leader))


def file(path: bytes, how: How, size: int) -> Record:
    return _record(Verb.FILE, _FILE.pack(how, size) + _sized(path))


def data(offset: int, content: bytes) -> Record:
    head = _HEAD.pack(Verb.DATA, _OFFSET.size + len(content)) + _OFFSET.pack(offset)
    return head, content


def hole(offset: int, length: int) -> Record:
    return _record(Verb.HOLE, _HOLE.pack(offset, length))


def attributes(path: bytes, entry: Entry) -> Record:
    accessed, modified = divmod(entry.atime_ns, SECOND), divmod(entry.mtime_ns, SECOND)
    body = [
        _ATTRIBUTES.pack(entry.mode, entry.uid, entry.gid, *accessed, *modified, len(entry.xattrs)),
        _sized(path),
    ]
    for name, value in entry.xattrs:
        raw = name.encode("utf-8", "surrogateescape")
        body += _XATTR.pack(len(raw), len(value)), raw, value
    return _record(Verb.ATTRIBUTES, b"".join(body))


def end(summary: Summary) -> Record:
    return _record(Verb.END, _END.pack(summary.entries, summary.bytes, bytes.fromhex(summary.digest)))


def chunks(records: Iterable[Record]) -> Iterator[bytes]:
    """Join records into chunks as large as allowed."""
    parts: list[bytes] = []
    size = 0
    for record in records:
        length = sum(map(len, record))
        if size + length > MAX_CHUNK:
            yield b"".join(parts)
            parts, size = [], 0
        parts += record
        size += length
    if parts:
        yield b"".join(parts)


def _record(verb: Verb, body: bytes) -> Record:
    return (_HEAD.pack(verb, len(body)) + body,)


def _sized(path: bytes) -> bytes:
    return _LENGTH.pack(len(path)) + path


def parse(chunk: memoryview) -> Iterator[tuple[Verb, Body]]:
    """The records of a chunk. Raises `PeerMisbehaved`."""
    if len(chunk) > MAX_CHUNK:
        raise misbehaved(f"a chunk of {len(chunk)} bytes")
    offset = 0
    while offset < len(chunk):
        if len(chunk) - offset < _HEAD.size:
            raise misbehaved("a chunk ends in the middle of a record")
        verb, length = _HEAD.unpack_from(chunk, offset)
        offset += _HEAD.size
        if length > len(chunk) - offset:
            raise misbehaved("a record is longer than its chunk")
        try:
            known = Verb(verb)
        except ValueError:
            raise misbehaved(f"an unknown record {verb}") from None
        yield known, Body(chunk[offset : offset + length])
        offset += length


class Body:
    """The body of a record, read from front to back. Every method raises `PeerMisbehaved`."""

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def begin(self) -> bool:
        """Whether the target starts from an empty tree."""
        version, fresh = self._numbers(_BEGIN)
        self._done()
        if version != VERSION:
            raise misbehaved(f"version {version} of the upper layer's records, not {VERSION}")
        return bool(fresh)

    def slot_and_path(self) -> tuple[int, bytes]:
        (slot,) = self._numbers(_SLOT)
        path = self._path()
        self._done()
        return slot, path

    def path(self) -> bytes:
        path = self._path()
        self._done()
        return path

    def make(self) -> tuple[int, int, bytes, bytes]:
        """Kind, device number, path, target of a symbolic link."""
        kind, rdev = self._numbers(_MAKE)
        path, target = self._path(), self._string()
        self._done()
        if kind not in KINDS or kind == stat.S_IFREG:
            raise misbehaved(f"an entry of the unknown kind {kind:#o}")
        if (kind == stat.S_IFLNK) != bool(target) or b"\0" in target or len(target) > MAX_PATH:
            raise misbehaved("a symbolic link without a proper target, or a target without a link")
        if rdev and kind not in (stat.S_IFCHR, stat.S_IFBLK):
            raise misbehaved("a device number for something that is no device")
        return kind, rdev, path, target

    def link(self) -> tuple[bytes, bytes]:
        path, leader = self._path(), self._path()
        self._done()
        return path, leader

    def file(self) -> tuple[How, int, bytes]:
        number, size = self._numbers(_FILE)
        path = self._path()
        self._done()
        if number > max(How):
            raise misbehaved(f"an unknown way {number} to open a file")
        if size >= 1 << 63:
            raise misbehaved(f"a file of {size} bytes")
        return How(number), size, path

    def data(self) -> tuple[int, memoryview]:
        (offset,) = self._numbers(_OFFSET)
        return offset, self._view

    def hole(self) -> tuple[int, int]:
        offset, length = self._numbers(_HOLE)
        self._done()
        return offset, length

    def attributes(self) -> tuple[bytes, Attributes]:
        mode, uid, gid, asec, ansec, msec, mnsec, count = self._numbers(_ATTRIBUTES)
        path = self._path(root=True)
        xattrs, total = [], 0
        for _ in range(count):
            name_length, value_length = self._numbers(_XATTR)
            name = self._take(name_length).decode("utf-8", "surrogateescape")
            xattrs.append((name, self._take(value_length)))
            total += name_length + value_length
            if name_length > MAX_NAME or "\0" in name or not carried(name):
                raise misbehaved(f"the extended attribute {name[:MAX_NAME]!r}")
        self._done()
        if total > MAX_XATTRS:
            raise misbehaved(f"{total} bytes of extended attributes on one entry")
        if mode & ~0o7777 or uid == 0xFFFFFFFF or gid == 0xFFFFFFFF or ansec >= SECOND or mnsec >= SECOND:
            raise misbehaved("a mode, owner or time out of range")
        return path, Attributes(mode, uid, gid, asec * SECOND + ansec, msec * SECOND + mnsec, tuple(xattrs))

    def end(self) -> Summary:
        entries, size, digest = self._numbers(_END)
        self._done()
        return Summary(entries, size, digest.hex())

    def _take(self, length: int) -> bytes:
        if length > len(self._view):
            raise misbehaved("a record ends too early")
        taken = bytes(self._view[:length])
        self._view = self._view[length:]
        return taken

    def _numbers(self, form: struct.Struct) -> tuple[Any, ...]:
        return form.unpack(self._take(form.size))

    def _string(self) -> bytes:
        (length,) = self._numbers(_LENGTH)
        return self._take(length)

    def _path(self, *, root: bool = False) -> bytes:
        path = self._string()
        if not (path or root):
            raise misbehaved("an empty path")
        if path:
            check_path(path)
        return path

    def _done(self) -> None:
        if self._view:
            raise misbehaved("a record goes on after its end")


def check_path(path: bytes) -> None:
    """Raise `PeerMisbehaved` unless `path` names something below a root by plain names, at a bounded depth."""
    if len(path) > MAX_PATH or b"\0" in path:
        raise misbehaved(f"the path {path[:80]!r}")
    names = path.split(b"/")
    if len(names) > MAX_DEPTH:
        raise misbehaved(f"a path of {len(names)} names")
    for name in names:
        if name in (b"", b".", b"..") or len(name) > MAX_NAME:
            raise misbehaved(f"the path {path[:80]!r}")


def misbehaved(what: str) -> PeerMisbehaved:
    return PeerMisbehaved(
        f"the source sent {what}", remedy="migrate again; if it happens again, check both nodes' versions"
    )
