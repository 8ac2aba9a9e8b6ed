"""Trees for the tests of the upper layer: what one is, as far as a migration is concerned, and how to change one."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

from podferry.node.upper import Receiver, TreeSource
from podferry.node.upper.entries import carried

ROOT = os.geteuid() == 0
IDS = (0, 1000, 65534) if ROOT else (os.geteuid(),)
BLOCK = 128 * 1024


def picture(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything that must be equal: names, types, modes, owners, times, attributes, links, contents."""
    found = {}
    names: dict[tuple[int, int], str] = {}
    for path in [root, *sorted(walk(root))]:
        info = path.lstat() if path != root else path.stat()
        kind = stat.S_IFMT(info.st_mode)
        name = str(path.relative_to(root))
        content: object = None
        if kind == stat.S_IFREG:
            content = path.read_bytes()
        elif kind == stat.S_IFLNK:
            content = os.fsencode(path.readlink())
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            content = info.st_rdev
        leader = name if kind == stat.S_IFDIR else names.setdefault((info.st_dev, info.st_ino), name)
        xattrs = {
            key: os.getxattr(path, key, follow_symlinks=path == root)
            for key in os.listxattr(path, follow_symlinks=path == root)
            if carried(key)
        }
        found[name] = (info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns, leader, content, xattrs)
    return found


def walk(directory: Path) -> Iterator[Path]:
    for item in os.scandir(directory):
        yield Path(item.path)
        if item.is_dir(follow_symlinks=False):
            yield from walk(Path(item.path))


def move(source: TreeSource, receiver: Receiver, *, frozen: bool = False, suspects: tuple[bytes, ...] = ()) -> int:
    """One pass from end to end; the bytes of content that it sent."""
    for chunk in source.send(source.plan(frozen=frozen, suspects=suspects)):
        receiver.feed(chunk)
    summary = receiver.finish()
    assert summary == source.summary
    return summary.bytes


class Gardener:
    """Changes a tree at random, in all the ways a container may."""

    def __init__(self, root: Path, rng: random.Random, *, overlay: bool = False, count: int = 0) -> None:
        """`overlay`: the tree is a merged view, through which whiteouts cannot be made; `count`: names start here."""
        self.root, self.rng, self.overlay, self.count = root, rng, overlay, count

    def work(self, steps: int) -> None:
        actions = [
            self.make_file,
            self.make_file,
            self.make_directory,
            self.make_special,
            self.make_symlink,
            self.hard_link,
            self.remove,
            self.rename,
            self.rename,
            self.swap,
            self.rewrite,
            self.append,
            self.truncate,
            self.change_mode,
            self.change_owner,
            self.change_times,
            self.change_xattrs,
            self.replace_kind,
        ]
        for _ in range(steps):
            try:
                self.rng.choice(actions)()
            except OSError as error:
                # A directory of the image cannot be renamed without redirect_dir.
                if not (self.overlay and error.errno == errno.EXDEV):
                    raise

    def new_name(self) -> Path:
        self.count += 1
        directories = [self.root, *(path for path in walk(self.root) if is_directory(path))]
        odd = self.rng.choice(["", "", "ü", "\udcff", "new\nline", " "])
        return self.rng.choice(directories) / f"{self.count}{odd}"

    def any(self, *kinds: int) -> Path | None:
        found = [path for path in walk(self.root) if not kinds or stat.S_IFMT(path.lstat().st_mode) in kinds]
        return self.rng.choice(found) if found else None

    def content(self) -> bytes:
        size = self.rng.choice([0, 1, 100, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77])
        return self.rng.randbytes(size)

    def make_file(self) -> None:
        path = self.new_name()
        if self.rng.random() < 0.3:
            with path.open("wb") as file:
                for _ in range(self.rng.randrange(3)):
                    file.seek(self.rng.randrange(8 * BLOCK))
                    file.write(self.rng.randbytes(5000))
                file.truncate(self.rng.randrange(10 * BLOCK))
        else:
            path.write_bytes(self.content())

    def make_directory(self) -> None:
        self.new_name().mkdir()

    def make_special(self) -> None:
        kind = self.rng.choice([stat.S_IFIFO, stat.S_IFSOCK, *([] if self.overlay else [stat.S_IFCHR])])
        os.mknod(self.new_name(), kind | 0o640, 0)

    def make_symlink(self) -> None:
        self.new_name().symlink_to(self.rng.choice(["/etc/passwd", "../../..", "1", "x" * 300]))

    def hard_link(self) -> None:
        if path := self.any(stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR):
            os.link(path, self.new_name(), follow_symlinks=False)

    def remove(self) -> None:
        if path := self.any():
            remove(path)

    def rename(self) -> None:
        path, to = self.any(), self.new_name()
        if path and path not in to.parents:
            path.rename(to)

    def swap(self) -> None:
        """Two files change names, or one takes the place of the other, as in log rotation."""
        one, two = self.any(stat.S_IFREG, stat.S_IFLNK), self.any(stat.S_IFREG, stat.S_IFLNK)
        if one and two and one != two:
            spare = self.new_name()
            one.rename(spare)
            two.rename(one)
            if self.rng.random() < 0.5:
                spare.rename(two)

    def rewrite(self) -> None:
        """Some bytes change, the size does not; sometimes the times do not, either."""
        path = self.any(stat.S_IFREG)
        if path and (size := path.stat().st_size):
            times = path.stat()
            with path.open("r+b") as file:
                file.seek(self.rng.randrange(size))
                file.write(self.rng.randbytes(1))
            if self.rng.random() < 0.5:
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def append(self) -> None:
        if path := self.any(stat.S_IFREG):
            with path.open("ab") as file:
                file.write(self.content())

    def truncate(self) -> None:
        if path := self.any(stat.S_IFREG):
            os.truncate(path, self.rng.randrange(5 * BLOCK))

    def change_mode(self) -> None:
        if path := self.any(stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO):
            path.chmod(self.rng.choice([0o700, 0o755, 0o4755, 0o2775, 0o1777] + ([0o000] if ROOT else [])))

    def change_owner(self) -> None:
        if path := self.any():
            os.chown(path, self.rng.choice(IDS), self.rng.choice(IDS) if ROOT else -1, follow_symlinks=False)

    def change_times(self) -> None:
        if path := self.any():
            when = self.rng.choice([0, 1, -1, 2**33 * 10**9, 1_700_000_000_123_456_789])
            os.utime(path, ns=(when, when), follow_symlinks=False)

    def change_xattrs(self) -> None:
        if path := self.any(stat.S_IFREG, stat.S_IFDIR):
            name = self.rng.choice(
                ["user.a", "user.b", *(["trusted.overlay.opaque"] if ROOT and not self.overlay else [])]
            )
            if name in os.listxattr(path) and self.rng.random() < 0.5:
                os.removexattr(path, name)
            else:
                os.setxattr(path, name, self.rng.randbytes(self.rng.randrange(1, 50)))

    def replace_kind(self) -> None:
        if path := self.any():
            remove(path)
            self.rng.choice(
                [
                    path.mkdir,
                    lambda: path.write_bytes(self.content()),
                    lambda: path.symlink_to("elsewhere"),
                    lambda: os.mkfifo(path),
                    lambda: os.mknod(path, stat.S_IFSOCK if self.overlay else stat.S_IFCHR, 0),
                ]
            )()


def is_directory(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


def remove(path: Path) -> None:
    if is_directory(path):
        for item in list(path.iterdir()):
            remove(item)
        path.rmdir()
    else:
        path.unlink()
