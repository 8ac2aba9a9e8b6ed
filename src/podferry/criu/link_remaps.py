"""Names that CRIU gave to open files whose own are gone (`link-remap`), taken away again where the job goes on here.

CRIU takes them away itself where its dump fails. A lazy dump, which has succeeded by then and is rolled back later, leaves them
(`cr_dump_finish` in its criu/cr-dump.c, up to 4.2): the job would find files that it has not made, and wrong counts of links.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from podferry.criu.dump_images import FILES_MAGIC, parse_entries
from podferry.errors import PeerMisbehaved
from podferry.protos.rights_pb2 import FileEntry

_NAME = re.compile(rb"link_remap\.[0-9]+")
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove(images: Path, pids: Iterable[int]) -> int:
    """Remove those that the dump in `images` of the frozen processes `pids` made; how many were there."""
    paths = list(_made(images))
    done = 0
    for pid in _first(pids) if paths else ():
        with suppress(OSError):
            root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for path in paths:
                    with suppress(OSError):
                        _remove(root, path)
                        done += 1
            finally:
                os.close(root)
    return done


def _made(images: Path) -> Iterator[bytes]:
    with suppress(OSError, PeerMisbehaved):
        for entry in parse_entries(images / "files.img", FILES_MAGIC, FileEntry):
            if entry.HasField("reg") and _NAME.fullmatch(entry.reg.name.rpartition(b"/")[2]):
                yield entry.reg.name


def _first(pids: Iterable[int]) -> list[int]:
    """The first process of a pid namespace among these: its root is the container's."""
    for pid in pids:
        with suppress(OSError):
            if re.search(rb"^NSpid:.*\t1$", Path(f"/proc/{pid}/status").read_bytes(), re.MULTILINE):
                return [pid]
    return []


def _remove(root: int, path: bytes) -> None:
    """By no link of the job's: the kernel told CRIU the path, in which there are none."""
    *directories, name = path.strip(b"/").split(b"/")
    place = os.dup(root)
    try:
        for one in directories:
            if one in (b"", b".", b".."):
                raise FileNotFoundError(os.fsdecode(path))
            inner = os.open(one, _DIRECTORY, dir_fd=place)
            os.close(place)
            place = inner
        os.unlink(name, dir_fd=place)
    finally:
        os.close(place)
