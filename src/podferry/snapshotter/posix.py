"""The share as a mounted directory, every call guarded by a deadline.

Other nodes write to the share, and one of them may have been taken over. So every path is resolved beneath the share's root,
without following a link or entering a mount, and acted on by descriptor (`podferry.fs.beneath`): also when it is deleted.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

from podferry.fs.beneath import DIRECTORY, Beneath, NotRegular
from podferry.snapshotter import layout
from podferry.snapshotter.deadlines import Guard
from podferry.snapshotter.faults import ShareRefused, ShareTampered, ShareUnavailable, faults

T = TypeVar("T")

SMALL = 4 << 20  # bytes; no record is larger
CHUNK = 4 << 20  # bytes moved per guarded call
SYNC_EVERY = 64 << 20  # bytes between two fsyncs, so that none of them takes longer than its deadline
MOST_NAMES = 200_000  # in one folder: who may write to the share must not fill a node's memory
REMOVED_AT_ONCE = 200  # entries within one deadline
MOST_STEPS = 100_000  # of removing one tree
LONGEST = 2048  # bytes of a path of a directory that is emptied in its place; what lies deeper is brought up: none exceeds 4096
DATA_DEADLINE = 60.0  # seconds for a chunk or an fsync of bulk data


class _Root(Beneath):
    """The share's root."""

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        demand_inside(path)
        return super().open(path, flags, mode)


def demand_inside(path: str) -> None:
    """Raise `ValueError` for a path that our own code must never use."""
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"not a path on the share: {path!r}")


class PosixShare:
    """A share at a local path. It is checked at every call that the path still is the share that was opened."""

    def __init__(self, root: Path, share_id: str, guard: Guard) -> None:
        self.root = root
        self.id = share_id
        self.guard = guard
        self.device = -1  # learnt, with the marker read, at the first call; another one after every mount of the share

    def path(self, path: str) -> Path:
        """Where `path` is on this node, for people to read: somebody may put something else there. Raises ValueError for one that
        leaves the share."""
        demand_inside(path)
        return self.root.joinpath(path)

    def call(self, what: str, function: Callable[[], T], deadline: float | None = None) -> T:
        """Run something that waits for the share, guarded, with its errors named."""

        def guarded() -> T:
            with faults(f"cannot {what} on the share {self.root}"):
                try:
                    return function()
                except OSError as error:
                    if error.errno != errno.ESTALE:
                        raise
                    return function()  # the first look-up used a handle that another node has removed

        return self.guard.call(what, guarded, deadline)

    def at(self, what: str, function: Callable[[Beneath], T], deadline: float | None = None) -> T:
        """Run something on the share, guarded. It is given the root, checked, beneath which it reaches all else."""

        def act() -> T:
            with self._checked_root() as root:
                return function(root)

        return self.call(what, act, deadline)

    @contextmanager
    def _checked_root(self) -> Iterator[Beneath]:
        """The root as it is mounted now. It is not kept open, so that the share can be unmounted."""
        try:
            descriptor = os.open(self.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self._other_share("") from None
        try:
            root = _Root(descriptor)
            device = os.fstat(descriptor).st_dev
            if device != self.device:
                try:
                    found = layout.decode_marker(read_small(root, layout.MARKER))
                except FileNotFoundError:
                    found = ""
                if found != self.id:
                    raise self._other_share(found)
                self.device = device
            yield root
        finally:
            os.close(descriptor)

    def _other_share(self, found: str) -> ShareUnavailable:
        return ShareUnavailable(
            f"{self.root} is not the share any more",
            why=f"it holds the share {found}" if found else "nothing, or something else, is mounted there",
            remedy="mount the share again; podferry goes on by itself",
        )

    def create(self, path: str, data: bytes) -> None:
        self.at(f"create {path}", lambda root: write_new(root, path, data))

    def rewrite(self, path: str, data: bytes) -> None:
        def write(root: Beneath) -> None:
            descriptor = root.open_regular(path, os.O_WRONLY)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                file.write(data)
                file.truncate(len(data))
                os.fsync(descriptor)

        self.at(f"rewrite {path}", write)

    def replace(self, path: str, data: bytes) -> None:
        def write(root: Beneath) -> None:
            directory, _, name = path.rpartition("/")
            draft = f".{name}.{layout.new_token()}"
            where = f"{directory}/{draft}" if directory else draft
            with root.opened(directory, DIRECTORY) as place:
                try:
                    write_new(root, where, data)
                    os.rename(draft, name, src_dir_fd=place, dst_dir_fd=place)
                except OSError:
                    with suppress(FileNotFoundError):
                        os.unlink(draft, dir_fd=place)
                    raise
                _sync(place)

        self.at(f"replace {path}", write)

    def read(self, path: str) -> bytes:
        return self.at(f"read {path}", lambda root: read_small(root, path))

    def names(self, path: str) -> list[str]:
        def names(root: Beneath) -> list[str]:
            try:
                with root.opened(path, DIRECTORY) as directory, os.scandir(directory) as listing:
                    found = [entry.name for entry in islice(listing, MOST_NAMES + 1) if not entry.name.startswith(".")]
            except FileNotFoundError:
                return []
            if len(found) > MOST_NAMES:
                raise ShareRefused(
                    f"{path} on the share cannot be listed", why=f"it holds more than {MOST_NAMES} names"
                )
            return sorted(found)

        return self.at(f"list {path}", names)

    def refresh(self, path: str) -> None:
        def touch(root: Beneath) -> None:
            with root.place(f"{path}/.fresh.{layout.new_token()}") as (place, name):
                os.close(os.open(name, _NEW, 0o600, dir_fd=place))
                with suppress(FileNotFoundError):  # the change of our own made NFS clients look at the directory again
                    os.unlink(name, dir_fd=place)

        self.at(f"refresh {path}", touch)

    def make(self, path: str) -> None:
        def make(root: Beneath) -> None:
            with root.place(path) as (place, name):
                os.mkdir(name, 0o755, dir_fd=place)
                _sync(place)

        self.at(f"make {path}", make)

    def rename(self, old: str, new: str) -> None:
        def move(root: Beneath) -> None:
            with root.place(old) as (source, name), root.place(new) as (target, other):
                os.rename(name, other, src_dir_fd=source, dst_dir_fd=target)
                _sync(target)
                if old.rpartition("/")[0] != new.rpartition("/")[0]:
                    _sync(source)

        self.at(f"rename {old} to {new}", move)

    def remove(self, path: str) -> None:
        def unlink(root: Beneath) -> None:
            with suppress(FileNotFoundError), root.place(path) as (place, name):
                os.unlink(name, dir_fd=place)

        self.at(f"remove {path}", unlink)

    def remove_tree(self, path: str) -> None:
        todo = [path]
        for _ in range(MOST_STEPS):
            if not todo:
                return
            current = todo[-1]
            below = self.at(f"remove {current}", lambda root: _remove_some(root, path, current))  # noqa: B023
            if below is None:
                todo.pop()
            else:
                todo += below
        raise ShareUnavailable(f"cannot remove {path} from the share {self.root}", why="somebody fills it meanwhile")

    def copy_in(self, source: Path, path: str) -> str:
        """Copy a local regular file to `path`, in a directory that nobody else writes, durably; the sha256 of it."""
        digest = hashlib.sha256()
        unsynced = 0
        descriptor = self.at(f"create {path}", lambda root: _create_ours(root, path))
        try:
            with source.open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    self._push(path, descriptor, chunk)
                    unsynced += len(chunk)
                    if unsynced >= SYNC_EVERY:
                        self.call(f"write {path}", lambda: os.fsync(descriptor), DATA_DEADLINE)
                        unsynced = 0
            self.call(f"write {path}", lambda: os.fsync(descriptor), DATA_DEADLINE)
        finally:
            self.call(f"close {path}", lambda: os.close(descriptor), DATA_DEADLINE)
        return digest.hexdigest()

    def _push(self, path: str, descriptor: int, chunk: bytes) -> None:
        def push() -> None:
            view = memoryview(chunk)
            while view:
                view = view[os.write(descriptor, view) :]

        self.call(f"write {path}", push, DATA_DEADLINE)

    def digest(self, path: str) -> str:
        """The sha256 of a file as the server has it: this node's cached pages of it are dropped first, and again
        afterwards, since nobody has used them."""
        digest = hashlib.sha256()

        def opened(root: Beneath) -> int:
            descriptor = root.open_regular(path)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return descriptor

        def close() -> None:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

        descriptor = self.at(f"open {path}", opened)
        try:
            while chunk := self.call(f"read {path}", lambda: os.read(descriptor, CHUNK), DATA_DEADLINE):
                digest.update(chunk)
        finally:
            self.call(f"close {path}", close)
        return digest.hexdigest()

    def space(self) -> tuple[int, int]:
        """Bytes free for us, and in all."""

        def space(root: Beneath) -> tuple[int, int]:
            about = os.fstatvfs(root.fd)
            return about.f_bavail * about.f_frsize, about.f_blocks * about.f_frsize

        return self.at("ask for the space left", space)


_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def read_small(root: Beneath, path: str) -> bytes:
    """A small regular file's content."""
    try:
        descriptor = root.open_regular(path)
    except NotRegular as error:
        raise ShareTampered(f"{path} on the share is not a record", why="not a regular file") from error
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        if os.fstat(descriptor).st_size > SMALL:
            raise ShareRefused(f"{path} on the share is not a record", why="not a small file")
        return file.read(SMALL)


def write_new(root: Beneath, path: str, data: bytes) -> None:
    """A new file, durable with its name."""
    with root.place(path) as (place, name):
        with os.fdopen(os.open(name, _NEW, 0o644, dir_fd=place), "wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
        _sync(place)


def _create_ours(root: Beneath, path: str) -> int:
    """A new file in a directory of our own, whose name an earlier call may have taken that was given up."""
    with root.place(path) as (place, name):
        try:
            return os.open(name, _NEW, 0o644, dir_fd=place)
        except FileExistsError:
            os.unlink(name, dir_fd=place)
            return os.open(name, _NEW, 0o644, dir_fd=place)


def _remove_some(root: Beneath, top: str, path: str) -> list[str] | None:
    """Remove an entry, or some of a directory's: None when it is gone, or else the directories that must go before it."""
    try:
        with root.place(path) as (place, name):
            try:
                os.unlink(name, dir_fd=place)
                return None
            except IsADirectoryError:
                pass
            with root.opened(path, DIRECTORY) as directory:
                below = _remove_files(root, top, path, directory)
            if below is None:
                os.rmdir(name, dir_fd=place)
            return below
    except FileNotFoundError:  # another collector is at it as well
        return None


def _remove_files(root: Beneath, top: str, path: str, directory: int) -> list[str] | None:
    """Of one directory; None when nothing is left in it."""
    with os.scandir(directory) as listing:
        names = [entry.name for entry in islice(listing, REMOVED_AT_ONCE)]
    below, done = list[str](), 0
    for name in names:
        try:
            os.unlink(name, dir_fd=directory)
            done += 1
        except FileNotFoundError:  # an old listing
            continue
        except IsADirectoryError:
            done += 1
            if len(os.fsencode(path)) < LONGEST:
                below.append(f"{path}/{name}")
                continue
            with root.opened(top, DIRECTORY) as above, suppress(FileNotFoundError):
                os.rename(name, f".{layout.new_token()}", src_dir_fd=directory, dst_dir_fd=above)
    return below if done else None


def _sync(directory: int) -> None:
    """Make a directory's entries durable, where the file system has a way to."""
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
