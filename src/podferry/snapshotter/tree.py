"""Directory trees: walking one, naming what a share cannot carry, and the form that keeps a layer as a tree.

A layer is the upper directory of an overlay mount as containerd filled it: besides files it holds whiteouts (character
device 0:0) and directories marked opaque. Links are copied as links and never followed, so whatever they point to, nothing
outside the tree is read or written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from podferry.fs.beneath import DIRECTORY, Beneath, reached
from podferry.snapshotter.faults import LayerDamaged, LayerUnfit, ShareTampered
from podferry.snapshotter.layer_ports import Payload
from podferry.snapshotter.layout import FormName, LayerRecord
from podferry.snapshotter.posix import PosixShare

T = TypeVar("T")
Caller = Callable[[str, Callable[[], T]], T]

FILES = "fs"
MANIFEST = "manifest"
DEEPEST = 256  # directories inside each other
LARGEST_MANIFEST = 1 << 29  # bytes
COPIERS = 8  # files in flight: a network file system answers late, but many at once
KEPT = ("trusted.overlay.opaque", "trusted.overlay.redirect", "security.capability")
HIDDEN = "dev/"
"""Where device nodes may be, as many images have them: every container's own /dev lies over it, so none can be opened."""
KEPT_PREFIXES = ("user.", "system.posix_acl_")
"""Extended attributes that belong to a layer; others are the file system's own notes."""


@dataclass(frozen=True)
class Found:
    """One entry of a tree. `path` is relative; `link` is the first path of the same inode, for further hard links; `mtime` is the
    time of its last change that belongs to the layer, in nanoseconds."""

    path: str
    about: os.stat_result
    mtime: int
    target: str | None
    attributes: dict[str, str]
    link: str | None

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.about.st_mode)

    def line(self, digest: str | None) -> bytes:
        """The manifest's line for it: everything of the entry that a container can see."""
        if self.link is not None:
            fields: list[Any] = [self.path, "link", self.link]
        elif is_device(self.about):
            about = self.about
            number = [os.major(about.st_rdev), os.minor(about.st_rdev)]
            fields = [
                self.path,
                about.st_mode,
                about.st_uid,
                about.st_gid,
                self._second,
                number,
                self.attributes,
            ]
        else:
            about = self.about
            size = about.st_size if stat.S_ISREG(about.st_mode) else 0
            owner = [about.st_mode, about.st_uid, about.st_gid, self._second, size]
            fields = [self.path, *owner, self.target, digest, self.attributes]
        return json.dumps(fields, sort_keys=True).encode() + b"\n"

    @property
    def _second(self) -> int:
        return int(
            self.mtime // 10**9 + 1e-9 * (self.mtime % 10**9)
        )  # as in the manifests that are out there: st_mtime, cut off


def _directly(what: str, function: Callable[[], T]) -> T:
    return function()


def walk(root: Path, call: Caller[Any] = _directly) -> Iterator[Found]:
    """Everything below the local directory `root`, and `root` itself as `.`; parents first, in a fixed order."""
    descriptor = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield from walk_in(Beneath(descriptor), call)
    finally:
        os.close(descriptor)


def walk_in(root: Beneath, call: Caller[Any] = _directly) -> Iterator[Found]:
    """The same below a directory that is open."""
    first: dict[tuple[int, int], str] = {}

    def look(path: str) -> Found:
        with root.opened("" if path == "." else path, os.O_PATH) as entry:
            about = os.fstat(entry)
            link = None
            if about.st_nlink > 1 and not stat.S_ISDIR(about.st_mode):
                known = first.setdefault((about.st_dev, about.st_ino), path)
                link = known if known != path else None
            target = os.readlink("", dir_fd=entry) if stat.S_ISLNK(about.st_mode) else None
            return Found(path, about, about.st_mtime_ns, target, _attributes(reached(entry)), link)

    def below(directory: str) -> Iterator[Found]:
        def entries() -> list[Found]:
            with root.opened(directory, DIRECTORY) as opened, os.scandir(opened) as listing:
                names = sorted(entry.name for entry in listing)
            return [look(f"{directory}/{name}" if directory else name) for name in names]

        if directory.count("/") >= DEEPEST:
            raise LayerUnfit("the layer cannot be used", why=f"directories are nested more than {DEEPEST} deep")
        for found in call(f"read {directory}", entries):
            yield found
            if stat.S_ISDIR(found.about.st_mode):
                yield from below(found.path)

    yield call("read its root", lambda: look("."))
    yield from below("")


@dataclass(frozen=True)
class Survey:
    """A tree as a whole. `newest`: the last change of what has its time from the layer's tar, in seconds, rounded up."""

    inodes: int
    newest: int


def survey(root: Path) -> Survey:
    """Scan a tree. Raises `LayerUnfit` naming what must not be shared."""
    inodes, newest = 0, 0
    for found in walk(root):
        inodes += found.link is None
        newest = max(newest, _newest(found))
        check_fit(found)
    return Survey(inodes, -(-newest // 10**9))


def as_unpacked_anywhere(entries: Sequence[Found]) -> list[Found]:
    """The entries, but for times that only say when this node has unpacked the layer: the root's, those of directories that the
    tar does not name, and of whiteouts. None is later than the newest file, so that the same layer is the same everywhere."""
    newest = max(map(_newest, entries), default=0)
    return [found if _from_tar(found) else replace(found, mtime=min(found.mtime, newest)) for found in entries]


def _newest(found: Found) -> int:
    return found.mtime if _from_tar(found) else 0


def _from_tar(found: Found) -> bool:
    """Whether an entry's time is surely its layer's own."""
    return not stat.S_ISDIR(found.about.st_mode) and not is_whiteout(found.about)


def check_fit(found: Found) -> None:
    """Raise `LayerUnfit` for an entry that has no place in a shared layer."""
    if is_device(found.about) and not found.path.startswith(HIDDEN):
        number = f"{os.major(found.about.st_rdev)}:{os.minor(found.about.st_rdev)}"
        raise LayerUnfit("the layer cannot be shared", why=f"it holds a device node: {found.path!r} ({number})")
    if found.kind == stat.S_IFSOCK:
        raise LayerUnfit("the layer cannot be shared", why=f"it holds a socket: {found.path!r}")


def is_device(about: os.stat_result) -> bool:
    """Whether this entry is a device node, and no whiteout."""
    return stat.S_IFMT(about.st_mode) in (stat.S_IFCHR, stat.S_IFBLK) and not is_whiteout(about)


def is_whiteout(about: os.stat_result) -> bool:
    """Whether this entry says that a lower layer's file is gone."""
    return stat.S_ISCHR(about.st_mode) and about.st_rdev == 0


def _attributes(path: str) -> dict[str, str]:
    """The extended attributes that belong to the layer, as hex."""
    try:
        names = os.listxattr(path)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EPERM):
            return {}
        raise
    kept = [name for name in names if name in KEPT or name.startswith(KEPT_PREFIXES)]
    return {name: os.getxattr(path, name).hex() for name in kept}


class TreeForm:
    """A layer as a directory tree on the share.

    It needs a share that keeps owners, character device 0:0 and trusted extended attributes; a share that does not is
    named, with the other form as the remedy.
    """

    name = FormName.DIR
    payload = MANIFEST

    def __init__(self, share: PosixShare) -> None:
        self.share = share

    def write(self, source: Path, into: str) -> Payload:
        entries = as_unpacked_anywhere(list(walk(source)))
        for found in entries:
            check_fit(found)
        digests: dict[str, str] = {}
        directories = [found for found in entries if stat.S_ISDIR(found.about.st_mode)]
        for found in directories:
            self._do(found, into, _make_directory)

        def copy(found: Found) -> None:
            if stat.S_ISREG(found.about.st_mode):
                digests[found.path] = self.share.copy_in(source / found.path, f"{into}/{FILES}/{found.path}")
            else:
                self._do(found, into, _make_special)
            self._do(found, into, _dress)

        originals = [found for found in entries if found.link is None and found not in directories]
        with ThreadPoolExecutor(COPIERS, thread_name_prefix="publish") as pool:
            list(pool.map(copy, [found for found in originals if not stat.S_ISDIR(found.about.st_mode)]))
        for found in entries:
            if found.link is not None:
                self._do(found, into, _link)
        for found in reversed(directories):  # after their entries, which would change the times
            self._do(found, into, _dress)
        manifest = b"".join(found.line(digests.get(found.path)) for found in entries)
        self.share.replace(f"{into}/{MANIFEST}", manifest)
        size = sum(found.about.st_blocks * 512 for found in entries if found.link is None)
        return Payload(hashlib.sha256(manifest).hexdigest(), size, len(entries))

    def check(self, at: str, record: LayerRecord) -> None:
        wanted = self.share.at("read the manifest", lambda root: _whole(root, f"{at}/{MANIFEST}"))
        if hashlib.sha256(wanted).hexdigest() != record.digest:
            raise LayerDamaged(f"layer {record.chain} is damaged", why="its manifest is not the one published")
        lines = iter(wanted.splitlines(keepends=True))
        files = self.share.at(f"open {at}/{FILES}", lambda root: root.open(f"{at}/{FILES}", DIRECTORY))
        try:
            for found in walk_in(Beneath(files), self.share.call):
                digest = None
                if stat.S_ISREG(found.about.st_mode) and found.link is None:
                    digest = self.share.digest(f"{at}/{FILES}/{found.path}")
                if found.line(digest) != next(lines, b""):
                    raise LayerDamaged(
                        f"layer {record.chain} is damaged", why=f"{found.path!r} is not what was published"
                    )
        finally:
            self.share.call(f"close {at}/{FILES}", lambda: os.close(files))
        if missing := next(lines, None):
            raise LayerDamaged(f"layer {record.chain} is damaged", why=f"missing: {json.loads(missing)[0]!r}")

    def glance(self, at: str, record: LayerRecord) -> None:
        about = self.share.at(f"look at {at}", lambda root: root.stat(f"{at}/{FILES}"))
        if not stat.S_ISDIR(about.st_mode):
            raise LayerDamaged(f"layer {record.chain} is damaged", why=f"{at}/{FILES} is not a directory")

    def _do(self, found: Found, into: str, act: Callable[[Found, Beneath, str], None]) -> None:
        """Do something to the entry's counterpart on the share."""

        def attempt(root: Beneath) -> None:
            try:
                files = f"{into}/{FILES}"
                act(found, root, files if found.path == "." else f"{files}/{found.path}")
            except OSError as error:
                if error.errno in (errno.ENOTSUP, errno.EPERM, errno.EINVAL):
                    raise LayerUnfit(
                        f"the share cannot carry {found.path!r} of a directory tree",
                        why=str(error),
                        remedy="use the EROFS form: podferry-snapshotter --form erofs",
                    ) from error
                raise

        self.share.at(f"write {found.path}", attempt)


def _whole(root: Beneath, path: str) -> bytes:
    with os.fdopen(root.open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > LARGEST_MANIFEST:
            raise LayerDamaged(f"{path} on the share is no manifest", why=f"more than {LARGEST_MANIFEST} bytes")
        return file.read(LARGEST_MANIFEST)


def _make_directory(found: Found, root: Beneath, path: str) -> None:
    with root.place(path) as (place, name), suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=place)


def _make_special(found: Found, root: Beneath, path: str) -> None:
    with root.place(path) as (place, name):
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=place)
        if found.target is not None:
            os.symlink(found.target, name, dir_fd=place)
        else:
            os.mknod(name, found.about.st_mode, found.about.st_rdev, dir_fd=place)


def _link(found: Found, root: Beneath, path: str) -> None:
    original = f"{path.removesuffix(found.path)}{found.link}"
    with root.place(original) as (source, old), root.place(path) as (place, name):
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=place)
        os.link(old, name, src_dir_fd=source, dst_dir_fd=place, follow_symlinks=False)


def _dress(found: Found, root: Beneath, path: str) -> None:
    """Owner, attributes, mode and times; in this order, since a change of owner drops capabilities and set-id bits."""
    about = found.about
    with root.opened(path, os.O_PATH) as entry:
        if stat.S_IFMT(os.fstat(entry).st_mode) != found.kind:
            raise ShareTampered(f"{path} on the share is not what was made there")
        where = reached(entry)
        os.chown(where, about.st_uid, about.st_gid)
        for name, value in found.attributes.items():
            os.setxattr(where, name, bytes.fromhex(value))
        if found.target is None:
            Path(where).chmod(stat.S_IMODE(about.st_mode))
        os.utime(where, ns=(found.mtime, found.mtime))
