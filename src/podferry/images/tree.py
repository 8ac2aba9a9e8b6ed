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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from podferry.images.faults import LayerDamaged, LayerUnfit
from podferry.images.layout import FormName, LayerRecord
from podferry.images.ports import Payload
from podferry.images.posix import PosixShare

T = TypeVar("T")
Caller = Callable[[str, Callable[[], T]], T]

FILES = "fs"
MANIFEST = "manifest"
COPIERS = 8  # files in flight: a network file system answers late, but many at once
KEPT = ("trusted.overlay.opaque", "trusted.overlay.redirect", "security.capability")
HIDDEN = "dev/"
"""Where device nodes may be, as many images have them: every container's own /dev lies over it, so none can be opened."""
KEPT_PREFIXES = ("user.", "system.posix_acl_")
"""Extended attributes that belong to a layer; others are the file system's own notes."""


@dataclass(frozen=True)
class Found:
    """One entry of a tree. `path` is relative; `link` is the first path of the same inode, for further hard links."""

    path: str
    about: os.stat_result
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
                int(about.st_mtime),
                number,
                self.attributes,
            ]
        else:
            about = self.about
            size = about.st_size if stat.S_ISREG(about.st_mode) else 0
            owner = [about.st_mode, about.st_uid, about.st_gid, int(about.st_mtime), size]
            fields = [self.path, *owner, self.target, digest, self.attributes]
        return json.dumps(fields, sort_keys=True).encode() + b"\n"


def _directly(what: str, function: Callable[[], T]) -> T:
    return function()


def walk(root: Path, call: Caller[list[Found]] = _directly) -> Iterator[Found]:
    """Everything below `root`, and `root` itself as `.`; parents first, in a fixed order."""
    first: dict[tuple[int, int], str] = {}

    def look(path: Path) -> Found:
        about = path.lstat()
        relative = str(path.relative_to(root))
        link = None
        if about.st_nlink > 1 and not stat.S_ISDIR(about.st_mode):
            known = first.setdefault((about.st_dev, about.st_ino), relative)
            link = known if known != relative else None
        target = str(path.readlink()) if stat.S_ISLNK(about.st_mode) else None
        return Found(relative, about, target, _attributes(path), link)

    def below(directory: Path) -> Iterator[Found]:
        names = lambda: [look(path) for path in sorted(directory.iterdir())]  # noqa: E731
        for found in call(f"read {directory}", names):
            yield found
            if stat.S_ISDIR(found.about.st_mode):
                yield from below(root / found.path)

    yield from call(f"read {root}", lambda: [look(root)])
    yield from below(root)


def survey(root: Path) -> tuple[int, int]:
    """Inodes and bytes of a tree. Raises `LayerUnfit` naming what must not be shared."""
    inodes = total = 0
    for found in walk(root):
        inodes += found.link is None
        total += found.about.st_blocks * 512 if found.link is None else 0
        check_fit(found)
    return inodes, total


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


def _attributes(path: Path) -> dict[str, str]:
    """The extended attributes that belong to the layer, as hex."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EPERM):
            return {}
        raise
    kept = [name for name in names if name in KEPT or name.startswith(KEPT_PREFIXES)]
    return {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in kept}


class TreeForm:
    """A layer as a directory tree on the share.

    It needs a share that keeps owners, character device 0:0 and trusted extended attributes; a share that does not is
    named, with the other form as the remedy.
    """

    name = FormName.DIR

    def __init__(self, share: PosixShare) -> None:
        self.share = share

    def write(self, source: Path, into: str) -> Payload:
        entries = list(walk(source))
        for found in entries:
            check_fit(found)
        target = self.share.path(f"{into}/{FILES}")
        digests: dict[str, str] = {}
        directories = [found for found in entries if stat.S_ISDIR(found.about.st_mode)]
        for found in directories:
            self._do(found, lambda found=found: (target / found.path).mkdir(mode=0o700, exist_ok=True))  # type: ignore[misc]

        def copy(found: Found) -> None:
            if stat.S_ISREG(found.about.st_mode):
                digests[found.path] = self.share.copy_in(source / found.path, f"{into}/{FILES}/{found.path}")
            else:
                self._do(found, lambda: _make_special(found, target / found.path))
            self._do(found, lambda: _dress(found, target / found.path))

        originals = [found for found in entries if found.link is None and found not in directories]
        with ThreadPoolExecutor(COPIERS, thread_name_prefix="publish") as pool:
            list(pool.map(copy, [found for found in originals if not stat.S_ISDIR(found.about.st_mode)]))
        for found in entries:
            if found.link is not None:
                self._do(found, lambda found=found: _link(target / found.link, target / found.path))  # type: ignore[misc]
        for found in reversed(directories):  # after their entries, which would change the times
            self._do(found, lambda found=found: _dress(found, target / found.path))  # type: ignore[misc]
        manifest = b"".join(found.line(digests.get(found.path)) for found in entries)
        self.share.replace(f"{into}/{MANIFEST}", manifest)
        size = sum(found.about.st_blocks * 512 for found in entries if found.link is None)
        return Payload(hashlib.sha256(manifest).hexdigest(), size, len(entries))

    def check(self, at: str, record: LayerRecord) -> None:
        wanted = self.share.call("read the manifest", lambda: self.share.path(f"{at}/{MANIFEST}").read_bytes())
        if hashlib.sha256(wanted).hexdigest() != record.digest:
            raise LayerDamaged(f"layer {record.chain} is damaged", why="its manifest is not the one published")
        lines = iter(wanted.splitlines(keepends=True))
        root = self.share.path(f"{at}/{FILES}")
        for found in walk(root, self.share.call):
            digest = None
            if stat.S_ISREG(found.about.st_mode) and found.link is None:
                digest = self.share.digest(f"{at}/{FILES}/{found.path}")
            if found.line(digest) != next(lines, b""):
                raise LayerDamaged(f"layer {record.chain} is damaged", why=f"{found.path!r} is not what was published")
        if missing := next(lines, None):
            raise LayerDamaged(f"layer {record.chain} is damaged", why=f"missing: {json.loads(missing)[0]!r}")

    def glance(self, at: str, record: LayerRecord) -> None:
        about = self.share.call(f"look at {at}", lambda: self.share.path(f"{at}/{FILES}").lstat())
        if not stat.S_ISDIR(about.st_mode):
            raise LayerDamaged(f"layer {record.chain} is damaged", why=f"{at}/{FILES} is not a directory")

    def _do(self, found: Found, function: Callable[[], object]) -> None:
        def attempt() -> None:
            try:
                function()
            except OSError as error:
                if error.errno in (errno.ENOTSUP, errno.EPERM, errno.EINVAL):
                    raise LayerUnfit(
                        f"the share cannot carry {found.path!r} of a directory tree",
                        why=str(error),
                        remedy="use the EROFS form: podferry-snapshotter --form erofs",
                    ) from error
                raise

        self.share.call(f"write {found.path}", attempt)


def _make_special(found: Found, path: Path) -> None:
    path.unlink(missing_ok=True)
    if found.target is not None:
        path.symlink_to(found.target)
    else:
        os.mknod(path, found.about.st_mode, found.about.st_rdev)


def _link(original: Path, path: Path) -> None:
    path.unlink(missing_ok=True)
    os.link(original, path, follow_symlinks=False)


def _dress(found: Found, path: Path) -> None:
    """Owner, attributes, mode and times; in this order, since a change of owner drops capabilities and set-id bits."""
    about = found.about
    os.chown(path, about.st_uid, about.st_gid, follow_symlinks=False)
    for name, value in found.attributes.items():
        os.setxattr(path, name, bytes.fromhex(value), follow_symlinks=False)
    if found.target is None:
        path.chmod(stat.S_IMODE(about.st_mode))
    os.utime(path, ns=(about.st_mtime_ns, about.st_mtime_ns), follow_symlinks=False)
