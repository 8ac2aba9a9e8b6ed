"""The target's side: records are carried out below one directory, and nowhere else.

Every path is resolved with `openat2` beneath the root, through real directories only; names are checked before that. What a
record is about is opened first, looked at, and changed through its descriptor: the source is not trusted, and nor is whoever
else can write to the tree. He may spoil what arrives, but no link or device that he puts in an entry's place is followed.

The tree is usually the upper directory of an overlay that is mounted already but in which nothing has been looked up.
The kernel's documentation calls changes to the layers of a mounted overlay undefined (overlayfs.rst, "Changes to
underlying filesystems"), since the overlay caches what it has looked up: which layers a name is found in, whether a
directory is opaque, a directory's listing. What it has not looked up it cannot have cached, so it is read from the
layers as they are then. The one inode that it holds from the mount on is the root's; `tests/node/test_upper_overlay.py`
shows what that means on this kernel.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash

from podferry.errors import Failed, PeerMisbehaved, PodferryError
from podferry.fs.beneath import empty, open_beneath, reached, remove
from podferry.node.upper.entries import carried
from podferry.node.upper.linux import punch_hole, write_all
from podferry.node.upper.send import TreePolicy
from podferry.node.upper.tree_records import Attributes, Body, How, Summary, Verb, misbehaved, parse

_CONTRADICTS_THE_TREE = (
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOTEMPTY,
    errno.ELOOP,
    errno.EXDEV,
    errno.ENAMETOOLONG,
)

_REMEDIES = {
    errno.ENOSPC: "free space on the target's disk, or migrate to another node",
    errno.EDQUOT: "raise the quota of the target's disk, or migrate to another node",
    errno.EROFS: "make the target's container storage writable",
    errno.EPERM: "run the agent as root with CAP_SYS_ADMIN, CAP_CHOWN, CAP_FOWNER and CAP_MKNOD",
    errno.EACCES: "run the agent as root with CAP_DAC_OVERRIDE",
    errno.EOPNOTSUPP: "put the target's container storage on a file system with the source's features (xattrs, ACLs)",
    errno.EFBIG: "put the target's container storage on a file system that takes files as large as the source's",
    errno.EMLINK: "put the target's container storage on a file system that takes as many links as the source's",
}


class _OpenEntry:
    """The entry that the last record was about; its content and attributes arrive next."""

    def __init__(self, path: bytes, fd: int, size: int | None = None) -> None:
        self.path, self.fd, self.size = path, fd, size

    def end_content(self) -> None:
        """Give a file its size, unless its content did that already."""
        if self.size is not None and os.fstat(self.fd).st_size != self.size:
            os.ftruncate(self.fd, self.size)
        self.size = None


class Receiver:
    """Makes the tree below `root` what a `Source` sends. Belongs to one thread at a time; closes with `close`.

    After any error the tree is in a state nobody knows and the receiver takes nothing more; a new one can be filled by
    a fresh pass.
    """

    def __init__(self, root: Path, policy: TreePolicy | None = None) -> None:
        self.policy = policy or TreePolicy()
        self._entry: _OpenEntry | None = None
        self._parent: tuple[bytes, int] | None = None
        self._parked: set[int] = set()
        self._linked: set[tuple[int, int]] | None = None
        """The inodes that have several names, where all entries are known to have been made here."""
        self._park_prefix = f".podferry-{secrets.token_hex(8)}-".encode()
        self._in_pass = False
        self._broken = False
        self._summary: Summary | None = None
        self._entries = self._bytes = self._total = self._made = 0
        self._digest = xxhash.xxh3_128()
        self._actions: dict[Verb, Callable[[Body], None]] = {
            Verb.BEGIN: lambda body: self._begin(fresh=body.begin()),
            Verb.PARK: lambda body: self._park(*body.slot_and_path()),
            Verb.REMOVE: lambda body: self._remove(body.path()),
            Verb.MAKE: lambda body: self._make(*body.make()),
            Verb.UNPARK: lambda body: self._unpark(*body.slot_and_path()),
            Verb.LINK: lambda body: self._link(*body.link()),
            Verb.FILE: lambda body: self._open(*body.file()),
            Verb.DATA: lambda body: self._data(*body.data()),
            Verb.HOLE: lambda body: self._hole(*body.hole()),
            Verb.ATTRIBUTES: lambda body: self._attributes(*body.attributes()),
        }
        try:
            self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Failed.because(f"the upper layer {root} cannot be opened", error) from error

    def close(self) -> None:
        """Let go of all descriptors. The tree stays as it is."""
        self._forget_entry()
        self._forget_parent()
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def feed(self, chunk: bytes | memoryview) -> None:
        """Carry out one chunk of `Source.send`.

        Raises `PeerMisbehaved` for what no source may say, at the record that says it, and `Failed` for what this
        node cannot do (no space, no permission).
        """
        if self._broken:
            raise Failed("the upper layer's receiver has failed before", remedy="start a new one")
        view = memoryview(chunk).toreadonly()
        digest = self._digest.hexdigest()
        self._digest.update(view)
        try:
            with _os_errors():
                for verb, body in parse(view):
                    self._record(verb, body, digest)
        except PodferryError:
            self._broken = True
            raise

    def finish(self) -> Summary:
        """The summary of the pass that has just ended, equal to the source's. Raises `PeerMisbehaved` otherwise."""
        if self._summary is None or self._broken or self._in_pass:
            raise misbehaved("no end record of its pass over the upper layer")
        return self._summary

    def _record(self, verb: Verb, body: Body, digest: str) -> None:
        if self._in_pass == (verb is Verb.BEGIN):
            raise misbehaved(f"{verb.name} {'inside' if self._in_pass else 'outside'} a pass")
        if self._entry and verb not in (Verb.DATA, Verb.HOLE):
            self._entry.end_content()
            if verb is not Verb.ATTRIBUTES:
                self._forget_entry()
        if verb is Verb.END:
            self._end(body.end(), digest)
        else:
            self._actions[verb](body)

    # -- a pass ------------------------------------------------------------------------------------------------

    def _begin(self, *, fresh: bool) -> None:
        self._in_pass, self._summary = True, None
        self._entries = self._bytes = self._made = 0
        if fresh:
            empty(self._root)
            self._linked = set()

    def _end(self, claimed: Summary, digest: str) -> None:
        if self._parked:
            raise misbehaved("an end before all that was parked had a name again")
        summary = Summary(self._entries, self._bytes, digest)
        if summary != claimed:
            raise misbehaved(f"totals that do not hold: {claimed}, not {summary}")
        self._in_pass, self._summary = False, summary
        self._forget_parent()
        self._digest.reset()

    def _makes(self) -> None:
        """A name is about to be made, or remembered: whoever sends no attributes, and no end, could have as many as he likes."""
        self._made += 1
        if self._made > self.policy.max_entries:
            raise misbehaved(f"more than the {self.policy.max_entries} entries that one pass may make")

    # -- names -------------------------------------------------------------------------------------------------

    def _place(self, path: bytes) -> tuple[int, bytes]:
        """The directory descriptor and the name that `path` stands for; the root is its own b"."."""
        if not path:
            return self._root, b"."
        directory, _, name = path.rpartition(b"/")
        if not directory:
            return self._root, name
        if self._parent is None or self._parent[0] != directory:
            self._forget_parent()
            self._parent = directory, open_beneath(self._root, directory, os.O_PATH | os.O_DIRECTORY)
        return self._parent[1], name

    def _forget_parent(self) -> None:
        if self._parent:
            os.close(self._parent[1])
            self._parent = None

    def _forget_entry(self) -> None:
        if self._entry:
            os.close(self._entry.fd)
            self._entry = None

    def _open_entry(self, place: int, name: bytes) -> tuple[int, os.stat_result]:
        """What has this name now, opened without any effect on it, and what it is."""
        fd = open_beneath(place, b"" if name == b"." else name, os.O_PATH)
        found = os.fstat(fd)
        if (
            self._linked is not None
            and found.st_nlink > 1
            and not stat.S_ISDIR(found.st_mode)
            and (found.st_dev, found.st_ino) not in self._linked
        ):
            os.close(fd)
            raise _exchanged(name)
        return fd, found

    def _park(self, slot: int, path: bytes) -> None:
        if slot in self._parked:
            raise misbehaved(f"the parking slot {slot} twice")
        self._makes()
        place, name = self._place(path)
        fd, found = self._open_entry(place, name)
        os.close(fd)
        if stat.S_ISDIR(found.st_mode):
            raise misbehaved("a directory to be parked")
        os.rename(name, self._park_prefix + b"%d" % slot, src_dir_fd=place, dst_dir_fd=self._root)
        self._parked.add(slot)

    def _unpark(self, slot: int, path: bytes) -> None:
        if slot not in self._parked:
            raise misbehaved(f"an empty parking slot {slot}")
        place, name = self._place(path)
        os.rename(self._park_prefix + b"%d" % slot, name, src_dir_fd=self._root, dst_dir_fd=place)
        self._parked.remove(slot)

    def _remove(self, path: bytes) -> None:
        place, name = self._place(path)
        remove(place, name)
        self._forget_parent()  # it may be among what was removed

    def _link(self, path: bytes, leader: bytes) -> None:
        self._makes()
        directory, _, old = leader.rpartition(b"/")
        source = open_beneath(self._root, directory, os.O_PATH | os.O_DIRECTORY)
        try:
            fd, found = self._open_entry(source, old)
            os.close(fd)
            if stat.S_ISDIR(found.st_mode):
                raise misbehaved("a hard link to a directory")
            place, name = self._place(path)
            os.link(old, name, src_dir_fd=source, dst_dir_fd=place, follow_symlinks=False)
        finally:
            os.close(source)
        if self._linked is not None:
            self._linked.add((found.st_dev, found.st_ino))
        self._entries += 1

    def _make(self, kind: int, rdev: int, path: bytes, target: bytes) -> None:
        if (kind == stat.S_IFBLK or (kind == stat.S_IFCHR and rdev != 0)) and not self.policy.devices:
            raise misbehaved("a device node, which the policy does not allow")
        self._makes()
        place, name = self._place(path)
        if kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=place)
        elif kind == stat.S_IFLNK:
            os.symlink(target, name, dir_fd=place)
        else:
            os.mknod(name, kind | 0o600, rdev, dir_fd=place)
        fd, found = self._open_entry(place, name)
        self._entry = _OpenEntry(path, fd)
        if stat.S_IFMT(found.st_mode) != kind or (rdev and found.st_rdev != rdev):
            raise _exchanged(path)

    # -- content -----------------------------------------------------------------------------------------------

    def _open(self, how: How, size: int, path: bytes) -> None:
        place, name = self._place(path)
        if how is How.CREATE:
            self._makes()
            fd = open_beneath(place, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        else:
            handle, found = self._open_entry(place, name)
            try:
                if not stat.S_ISREG(found.st_mode):
                    raise misbehaved("content for what is no regular file")
                fd = os.open(reached(handle), os.O_WRONLY | os.O_CLOEXEC)
            finally:
                os.close(handle)
        self._entry = _OpenEntry(path, fd, size)
        if how is How.DISCARD:
            os.ftruncate(fd, 0)

    def _data(self, offset: int, content: memoryview) -> None:
        file = self._entry
        if file is None or file.size is None or offset + len(content) > file.size:
            raise misbehaved("content outside its file")
        self._bytes += len(content)
        self._total += len(content)
        if self.policy.max_bytes is not None and self._total > self.policy.max_bytes:
            raise misbehaved(f"more than the {self.policy.max_bytes} bytes that were agreed")
        write_all(file.fd, content, offset)

    def _hole(self, offset: int, length: int) -> None:
        file = self._entry
        if file is None or file.size is None or length == 0 or offset + length > file.size:
            raise misbehaved("a hole outside its file")
        punch_hole(file.fd, offset, length)

    def _attributes(self, path: bytes, attributes: Attributes) -> None:
        """Set what belongs to an entry, in the order in which nothing undoes what was set before.

        A change of owner clears set-user-ID bits and file capabilities, an ACL changes the mode.
        """
        if self._entry is None or self._entry.path != path:
            self._forget_entry()
            self._entry = _OpenEntry(path, self._open_entry(*self._place(path))[0])
        fd = self._entry.fd
        where = reached(fd)
        os.chown(where, attributes.uid, attributes.gid)
        set_xattrs(where, attributes.xattrs)
        if not stat.S_ISLNK(os.fstat(fd).st_mode):
            Path(where).chmod(attributes.mode)
        os.utime(where, ns=(attributes.atime_ns, attributes.mtime_ns))
        self._forget_entry()
        self._entries += 1


def set_xattrs(path: str, wanted: tuple[tuple[str, bytes], ...]) -> None:
    """Make the attributes that move equal to `wanted`; those of this node stay, and so do not follow a default ACL."""
    try:
        present = [name for name in os.listxattr(path) if carried(name)]
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP or wanted:
            raise
        return
    names = {name for name, _ in wanted}
    for name in present:
        if name not in names:
            os.removexattr(path, name)
    for name, value in wanted:
        os.setxattr(path, name, value)


def _exchanged(path: bytes) -> Failed:
    return Failed(
        f"{os.fsdecode(path)} of the upper layer is not what was made of it",
        why="another process on the target writes to the tree while it arrives",
        remedy="find that process and stop it, then migrate again",
    )


@contextmanager
def _os_errors() -> Iterator[None]:
    """Say whose fault an `OSError` is: the record's, which does not fit the tree, or this node's."""
    try:
        yield
    except (OSError, OverflowError, ValueError) as error:
        code = error.errno if isinstance(error, OSError) else None
        if code is None or code in _CONTRADICTS_THE_TREE:
            raise PeerMisbehaved.because("the source sent a record that does not fit the tree", error) from error
        raise Failed.because(
            "the upper layer cannot be written", error, remedy=_REMEDIES.get(code, "see the target's kernel log")
        ) from error
