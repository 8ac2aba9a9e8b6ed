"""Scan a tree while it may be changing, by descriptors only.

Nothing is opened but directories, and these with `openat2`, so that a container that puts a symbolic link, a FIFO or a
device where a directory was gains nothing. What vanishes on the way is left out: its container still runs and a later
pass sees the tree again. A frozen tree has no such excuse.

A later scan takes over the entries of an earlier one whose inode and ctime are the same. Every change to a file's
content, attributes or link count sets its ctime, with two exceptions which are taken care of here:

- A change in the same tick of the kernel's clock as the earlier look leaves an equal ctime. Such entries are not
  `settled` and count as changed next time. (The idea is git's "racily clean" index entry.)
- A store through a shared writable mapping sets ctime only at the first fault after the last write-back, and never on
  tmpfs. Paths that are mapped so are given as `suspects` and always count as changed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import time
from collections.abc import Collection

from podferry.core.limits import FILES
from podferry.errors import Failed, Refused
from podferry.fs.beneath import open_beneath
from podferry.node.upper.entries import MAX_DEPTH, MAX_PATH, MAX_XATTRS, Entry, Manifest, carried

CLOCK_REALTIME_COARSE = 5  # linux/time.h; the clock that file systems stamp with
ENCODING = sys.getfilesystemencoding()
SECOND = 1_000_000_000

VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)
"""What opening a name says if it was removed or replaced since it was listed."""


def scan(
    root: int, previous: Manifest | None = None, *, suspects: Collection[bytes] = (), frozen: bool = False
) -> Manifest:
    """List the tree below the directory descriptor `root`.

    `previous` saves looking at what has not changed since. `suspects` are paths to be taken as changed whatever their
    times say. With `frozen`, a tree that changes while it is read raises `Failed`. Raises `Refused` for a tree that
    cannot be moved (too deep, attributes too large) and `Failed` where it cannot be read.
    """
    try:
        return _Scan(root, previous, suspects, frozen).run()
    except OSError as broken:
        raise Failed.because("the upper layer cannot be read", broken) from broken


OF_CRIU = re.compile(rb"(tmp/)?cr-tmpfs\.[A-Za-z0-9]{6}")
"""The directory on which CRIU mounts a clean view of each file system while it dumps (`get_clean_mnt` in criu/mount.c): it comes
and goes beside the last pass, and is not the job's."""


class _Scan:
    def __init__(self, root: int, previous: Manifest | None, suspects: Collection[bytes], frozen: bool) -> None:
        self.root = root
        self.known = previous.entries if previous else {}
        self.suspects = suspects
        self.frozen = frozen
        self.clock = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
        self.entries: dict[bytes, Entry] = {}
        self.todo = [b""]

    def run(self) -> Manifest:
        found, old = os.fstat(self.root), self.known.get(b"")
        if old is None or old.ctime_ns != found.st_ctime_ns or not old.settled:
            old = self._take(b"", found, self.root, ".")
        self.entries[b""] = old
        while self.todo:
            self._directory(self.todo.pop())
        return Manifest(self.entries)

    def _directory(self, directory: bytes) -> None:
        if directory.count(b"/") >= MAX_DEPTH - 1:
            raise Refused(
                "the upper layer cannot be moved",
                why=f"directories are nested more than {MAX_DEPTH} deep: {os.fsdecode(directory[:200])}...",
                remedy="remove the directory",
            )
        try:
            fd = open_beneath(self.root, directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as gone:
            self._excuse(gone)
            return
        prefix = directory + b"/" if directory else b""
        known, entries, suspects = self.known, self.entries, self.suspects
        try:
            with os.scandir(fd) as listing:
                for item in listing:
                    name = item.name
                    path = prefix + name.encode(ENCODING, "surrogateescape")  # os.fsencode in half the time
                    if self.frozen and path not in known and OF_CRIU.fullmatch(path):
                        continue
                    try:
                        found = item.stat(follow_symlinks=False)
                        old = known.get(path)
                        if (
                            old is None
                            or old.ctime_ns != found.st_ctime_ns
                            or old.ino != found.st_ino
                            or not old.settled
                            or path in suspects
                        ):
                            old = self._take(path, found, fd, name)
                    except OSError as gone:
                        self._excuse(gone)
                        continue
                    entries[path] = old
                    if len(entries) > FILES.most:
                        FILES.demand(len(entries), "the tree of files")
                    if old.kind == stat.S_IFDIR:
                        self.todo.append(path)
        finally:
            os.close(fd)

    def _excuse(self, gone: OSError) -> None:
        """Let pass what a running container may do to a tree."""
        if self.frozen or gone.errno not in (*VANISHED, errno.EINVAL):
            raise gone

    def _take(self, path: bytes, found: os.stat_result, directory: int, name: str) -> Entry:
        if len(path) > MAX_PATH:
            raise Refused(
                "the upper layer cannot be moved",
                why=f"a path is longer than {MAX_PATH} bytes: {os.fsdecode(path[:200])}...",
                remedy="remove the file or directory",
            )
        kind = stat.S_IFMT(found.st_mode)
        ctime = found.st_ctime_ns
        # Where a file system keeps whole seconds only (ext4 with small inodes), a tick is that long.
        tick = 2 * SECOND if ctime % SECOND == 0 else 0
        return Entry(
            kind=kind,
            mode=stat.S_IMODE(found.st_mode),
            uid=found.st_uid,
            gid=found.st_gid,
            dev=found.st_dev,
            ino=found.st_ino,
            nlink=found.st_nlink,
            size=found.st_size if kind == stat.S_IFREG else 0,
            allocated=found.st_blocks * 512,
            rdev=found.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
            atime_ns=found.st_atime_ns,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=ctime,
            target=os.fsencode(os.readlink(name, dir_fd=directory)) if kind == stat.S_IFLNK else b"",
            xattrs=read_xattrs(f"/proc/self/fd/{directory}/{name}"),
            settled=ctime + tick < self.clock,
        )


def read_xattrs(path: str, *, follow: bool = False) -> tuple[tuple[str, bytes], ...]:
    """The extended attributes that move, sorted by name; none where the file system has none. Follows no link but with `follow`."""
    try:
        names = os.listxattr(path, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return ()
        raise
    if not names:
        return ()
    found = []
    for name in sorted(filter(carried, names)):
        try:
            found.append((name, os.getxattr(path, name, follow_symlinks=follow)))
        except OSError as error:
            if error.errno != errno.ENODATA:  # removed since it was listed; the ctime tells the next pass
                raise
    if sum(len(name) + len(value) for name, value in found) > MAX_XATTRS:
        raise Refused(
            "the upper layer cannot be moved",
            why=f"a file has more than {MAX_XATTRS // 1024} KiB of extended attributes",
            remedy="remove some of them",
        )
    return tuple(found)
