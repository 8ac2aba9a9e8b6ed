"""The share as a mounted directory, every call guarded by a deadline."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from podferry.images import layout
from podferry.images.faults import ShareRefused, ShareUnavailable, faults
from podferry.images.guard import Guard

T = TypeVar("T")

SMALL = 4 << 20  # bytes; no record is larger
CHUNK = 4 << 20  # bytes moved per guarded call
SYNC_EVERY = 64 << 20  # bytes between two fsyncs, so that none of them takes longer than its deadline
DATA_DEADLINE = 60.0  # seconds for a chunk or an fsync of bulk data


class PosixShare:
    """A share at a local path. It is checked at every call that the path still is the share that was opened."""

    def __init__(self, root: Path, share_id: str, guard: Guard) -> None:
        self.root = root
        self.id = share_id
        self.guard = guard
        self.device = -1  # learnt, with the marker read, at the first call; another one after every mount of the share

    def path(self, path: str) -> Path:
        """Where `path` is on this node. Raises ValueError for one that leaves the share."""
        parts = path.split("/")
        if path.startswith("/") or ".." in parts:
            raise ValueError(f"not a path on the share: {path!r}")
        return self.root.joinpath(*parts)

    def call(self, what: str, function: Callable[[], T], deadline: float | None = None) -> T:
        """Run something on the share, guarded, with its errors named."""

        def guarded() -> T:
            with faults(f"cannot {what} on the share {self.root}"):
                self._still_ours()
                try:
                    return function()
                except OSError as error:
                    if error.errno != errno.ESTALE:
                        raise
                    return function()  # the first look-up used a handle that another node has removed

        return self.guard.call(what, guarded, deadline)

    def _still_ours(self) -> None:
        try:
            device = self.root.stat().st_dev
            if device == self.device:
                return
            found = layout.decode_marker((self.root / layout.MARKER).read_bytes())
        except FileNotFoundError:
            device, found = -1, ""
        if found != self.id:
            raise ShareUnavailable(
                f"{self.root} is not the share any more",
                why=f"it holds the share {found}" if found else "nothing, or something else, is mounted there",
                remedy="mount the share again; podferry goes on by itself",
            )
        self.device = device

    def create(self, path: str, data: bytes) -> None:
        self.call(f"create {path}", lambda: _write_new(self.path(path), data))

    def rewrite(self, path: str, data: bytes) -> None:
        def write() -> None:
            descriptor = os.open(self.path(path), os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                file.write(data)
                file.truncate(len(data))
                os.fsync(descriptor)

        self.call(f"rewrite {path}", write)

    def replace(self, path: str, data: bytes) -> None:
        def write() -> None:
            target = self.path(path)
            draft = target.with_name(f".{target.name}.{layout.new_token()}")
            try:
                _write_new(draft, data)
                draft.rename(target)
            except OSError:
                draft.unlink(missing_ok=True)
                raise
            _sync(target.parent)

        self.call(f"replace {path}", write)

    def read(self, path: str) -> bytes:
        def read() -> bytes:
            descriptor = os.open(self.path(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                about = os.fstat(descriptor)
                if not stat.S_ISREG(about.st_mode) or about.st_size > SMALL:
                    raise ShareRefused(f"{path} on the share is not a record", why="not a small regular file")
                return file.read(SMALL)

        return self.call(f"read {path}", read)

    def names(self, path: str) -> list[str]:
        def names() -> list[str]:
            try:
                return sorted(entry.name for entry in self.path(path).iterdir() if not entry.name.startswith("."))
            except FileNotFoundError:
                return []

        return self.call(f"list {path}", names)

    def refresh(self, path: str) -> None:
        def touch() -> None:
            probe = self.path(f"{path}/.fresh.{layout.new_token()}")
            os.close(os.open(probe, _NEW, 0o600))  # a change of our own makes NFS clients look at the directory again
            probe.unlink(missing_ok=True)

        self.call(f"refresh {path}", touch)

    def make(self, path: str) -> None:
        self.call(f"make {path}", lambda: _make(self.path(path)))

    def rename(self, old: str, new: str) -> None:
        def move() -> None:
            source, target = self.path(old), self.path(new)
            source.rename(target)
            _sync(target.parent)
            if source.parent != target.parent:
                _sync(source.parent)

        self.call(f"rename {old} to {new}", move)

    def remove(self, path: str) -> None:
        self.call(f"remove {path}", lambda: self.path(path).unlink(missing_ok=True))

    def remove_tree(self, path: str) -> None:
        for child in self._children(path):
            self.remove_tree(f"{path}/{child}") if self._is_dir(f"{path}/{child}") else self.remove(f"{path}/{child}")
        self.call(f"remove {path}", lambda: _remove_dir(self.path(path)))

    def _children(self, path: str) -> list[str]:
        def children() -> list[str]:
            try:
                return [entry.name for entry in self.path(path).iterdir()]
            except (FileNotFoundError, NotADirectoryError):
                return []

        return self.call(f"list {path}", children)

    def _is_dir(self, path: str) -> bool:
        def is_dir() -> bool:
            try:
                return stat.S_ISDIR(self.path(path).lstat().st_mode)
            except FileNotFoundError:
                return False

        return self.call(f"look at {path}", is_dir)

    def copy_in(self, source: Path, path: str) -> str:
        """Copy a local regular file to `path`, in a directory that nobody else writes, durably; the sha256 of it."""
        digest = hashlib.sha256()
        unsynced = 0
        descriptor = self.call(f"create {path}", lambda: os.open(self.path(path), _OURS, 0o644))
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

        def opened() -> int:
            descriptor = os.open(self.path(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return descriptor

        def close() -> None:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

        descriptor = self.call(f"open {path}", opened)
        try:
            while chunk := self.call(f"read {path}", lambda: os.read(descriptor, CHUNK), DATA_DEADLINE):
                digest.update(chunk)
        finally:
            self.call(f"close {path}", close)
        return digest.hexdigest()

    def space(self) -> tuple[int, int]:
        """Bytes free for us, and in all."""

        def space() -> tuple[int, int]:
            about = os.statvfs(self.root)
            return about.f_bavail * about.f_frsize, about.f_blocks * about.f_frsize

        return self.call("ask for the space left", space)


_OURS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def _write_new(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, _NEW, 0o644), "wb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
    _sync(path.parent)


def _make(path: Path) -> None:
    path.mkdir(mode=0o755)
    _sync(path.parent)


def _remove_dir(path: Path) -> None:
    try:
        path.rmdir()
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        path.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    """Make a directory's entries durable, where the file system has a way to."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
