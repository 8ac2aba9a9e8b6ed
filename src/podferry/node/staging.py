"""A tree that arrives before its place is there: an upper layer before its container, a volume before its pod.

It may hold what no local user may get at: setuid programs, device nodes, files that anybody may read. So it lies in a directory
that only its owner enters, and is mounted over itself so that nothing in it can be run or opened as a device by whoever
holds a descriptor of it. When the place is there the files are renamed to it, with their inodes, since the job may stand still
meanwhile; they are copied where that is another file system.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from podferry.errors import Failed
from podferry.fs.beneath import empty, reached, remove
from podferry.fs.mounts import MS_NODEV, MS_NOEXEC, MS_NOSUID, bind, unmount
from podferry.fs.private import private_directory
from podferry.node.outside import among_node_mounts
from podferry.node.upper import Receiver, copy
from podferry.node.upper.receive import set_xattrs
from podferry.node.upper.scan import read_xattrs

CLOSED = MS_NOSUID | MS_NODEV | MS_NOEXEC
SELINUX = Path("/sys/fs/selinux/enforce")

_TREE = "tree"


class Staged:
    """A staged tree, and the receiver that fills it: first there, then in its place. Closes with `close`."""

    def __init__(self, directory: Path, *, below: Path) -> None:
        """`directory` is made, private from `below` on."""
        self.directory = private_directory(directory, below=below, new=True)
        self.tree = private_directory(directory / _TREE, below=directory, new=True)
        if os.geteuid() == 0:  # or else what arrives has no rights that its owner has not
            try:
                identity = _identity(self.tree)
                among_node_mounts(lambda: _close_to_programs(self.tree, identity))
            except OSError as error:
                raise Failed.because(
                    f"cannot mount {self.tree} nosuid,nodev,noexec", error, remedy="run the agent with CAP_SYS_ADMIN"
                ) from error
        self.receiver = Receiver(self.tree)

    def move_to(self, place: Path) -> None:
        """Make the tree at `place` what arrived; what it held goes. From now on the receiver fills it there."""
        self.receiver.close()
        try:
            identity = _identity(self.tree)
            renamed = among_node_mounts(lambda: _rename_entries(self.tree, identity, place))
        except OSError as error:
            raise Failed.because(f"cannot move {self.tree} to {place}", error) from error
        if not renamed:
            copy(self.tree, place)
        discard(self.directory)
        self.receiver = Receiver(place)

    def close(self) -> None:
        """Let go of descriptors. The tree stays."""
        self.receiver.close()


def discard(directory: Path) -> None:
    """Remove a staged tree, also one that an agent left which was killed; nothing there is no error."""
    with suppress(OSError):
        among_node_mounts(lambda: unmount(directory / _TREE))
    with suppress(OSError):
        above = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            remove(above, os.fsencode(directory.name))
        finally:
            os.close(above)


def _identity(tree: Path) -> tuple[int, int]:
    found = tree.stat()
    return found.st_dev, found.st_ino


def _seen_on_node(tree: Path, identity: tuple[int, int]) -> bool:
    """Whether it is there among the node's mounts, too. What was mounted over /run/podferry since our pod began hides it."""
    try:
        return _identity(tree) == identity
    except FileNotFoundError:
        return False


def _close_to_programs(tree: Path, identity: tuple[int, int]) -> None:
    if not _seen_on_node(tree, identity):
        return  # nobody but us reaches it
    bind(tree, tree, CLOSED)


def _rename_entries(tree: Path, identity: tuple[int, int], place: Path) -> bool:
    """False where that cannot be done and `place` has to be filled by copying; then all is still in `tree`."""
    if not _seen_on_node(tree, identity) or SELINUX.exists():  # a renamed file keeps the label of where it was made
        return False
    if os.geteuid() == 0:
        unmount(tree)  # nothing is renamed across a mount, be it of the same file system
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    source = os.open(tree, flags | os.O_NOFOLLOW)
    try:
        target = os.open(place, flags)
        try:
            root = os.fstat(source)  # before its entries go, which changes its times
            if root.st_dev != os.fstat(target).st_dev:
                return False
            empty(target)
            if not _rename_all(source, target):
                os.utime(source, ns=(root.st_atime_ns, root.st_mtime_ns))
                return False
            _take_attributes(root, source, target)
        finally:
            os.close(target)
    finally:
        os.close(source)
    return True


def _rename_all(source: int, target: int) -> bool:
    with os.scandir(source) as listing:
        names = [item.name for item in listing]
    for number, name in enumerate(names):
        try:
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
        except OSError as error:
            if error.errno != errno.EXDEV:  # another mount, or a directory with a project quota of its own
                raise
            for moved in names[:number]:
                os.rename(moved, moved, src_dir_fd=target, dst_dir_fd=source)
            return False
    return True


def _take_attributes(found: os.stat_result, source: int, target: int) -> None:
    """The tree's own root stays where it is: an overlay has it open."""
    os.fchown(target, found.st_uid, found.st_gid)
    set_xattrs(reached(target), read_xattrs(reached(source), follow=True))
    os.fchmod(target, stat.S_IMODE(found.st_mode))
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def discard_all(directory: Path) -> None:
    """Remove a directory of staged trees, as `discard` does each."""
    with suppress(OSError):
        for one in list(directory.iterdir()):
            discard(one)
    discard(directory)
