"""What a tree consists of: entries, the manifest that lists them, and which extended attributes belong to them.

Names and paths are bytes; a path is relative to the root of the tree, its components joined by `/`; b"" is the root.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import NamedTuple

MAX_NAME = 255  # NAME_MAX
MAX_PATH = 4095  # PATH_MAX without its NUL: a longer path cannot be opened in one call
MAX_DEPTH = 512
MAX_XATTRS = 256 * 1024  # bytes of all attributes of one entry, so that they fit into one record

_OVERLAY_PREFIXES = ("trusted.overlay.", "user.overlay.")

NODE_PRIVATE = frozenset({"origin", "impure", "nlink", "upper", "uuid"})
"""What overlayfs writes about this node's own file systems, and what would be a lie on another node.

`origin` and `upper` are file handles with a file system's UUID, `impure` says that a directory holds entries with an
origin, `nlink` is relative to an index in the work directory that does not move, `uuid` is the identity of one overlay.
overlayfs does without each of them; with them it may refuse the mount or the entry (ESTALE) where `index` is on.
All others move: `opaque`, `redirect`, `whiteout` and `protattr` say what the tree means, `metacopy` says that a file's
data is that of the same image below it. Source: Documentation/filesystems/overlayfs.rst ("Sharing and copying
layers", "Changes to underlying filesystems", "index", "NFS export") and fs/overlayfs/overlayfs.h of the kernel.
"""

_CARRIED = frozenset({"security.capability", "system.posix_acl_access", "system.posix_acl_default"})


def carried(name: str) -> bool:
    """Whether an extended attribute moves with its entry; what does not is neither sent, accepted nor removed.

    `security.selinux`, `security.ima` and `security.evm` stay: the target's runtime labels its own files and its
    keys are its own.
    """
    for prefix in _OVERLAY_PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :] not in NODE_PRIVATE
    return name in _CARRIED or name.startswith("user.")


class Entry(NamedTuple):
    """One name of the tree and the inode behind it; the fields without a word are those of `os.stat_result`."""

    kind: int
    """The S_IFMT bits of the mode."""
    mode: int
    """The permission bits, S_ISUID, S_ISGID and S_ISVTX."""
    uid: int
    gid: int
    dev: int
    ino: int
    nlink: int
    size: int
    """Bytes; 0 for what is not a regular file."""
    allocated: int
    """Bytes on disk; fewer than `size` where the file has holes."""
    rdev: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    target: bytes
    """Where a symbolic link points; empty for all else."""
    xattrs: tuple[tuple[str, bytes], ...]
    settled: bool
    """An equal ctime at a later look proves that nothing was changed in between (see `scan`)."""

    @property
    def is_directory(self) -> bool:
        return self.kind == stat.S_IFDIR

    @property
    def is_regular(self) -> bool:
        return self.kind == stat.S_IFREG

    @property
    def is_foreign_device(self) -> bool:
        """A device node other than a whiteout (character device 0:0)."""
        return self.kind == stat.S_IFBLK or (self.kind == stat.S_IFCHR and self.rdev != 0)

    @property
    def identity(self) -> tuple[int, int, int, int, bytes]:
        """What two names share if they are hard links, or one file under its old and its new name.

        It holds what cannot be changed in place, so that an inode number that was used again for something else is
        told apart, or is something that the old one can be turned into.
        """
        return self.dev, self.ino, self.kind, self.rdev, self.target


@dataclass(frozen=True)
class Manifest:
    """A tree as it was found: every entry by its path, parents before children, a directory's entries together."""

    entries: dict[bytes, Entry]


def parent_of(path: bytes) -> bytes:
    """The path of the directory that holds `path`; b"" for the root's own entries."""
    return path.rpartition(b"/")[0]
