"""Directories of the node that an agent in a pod needs, and that its pod does not mount since not every node has them.

A copy of the node's mount is attached in the agent's container, at the same path: what is handed to the node's programs and what
specs say are paths of the node. It receives the mounts that the node makes below later on, and gives none back.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from podferry.errors import Failed
from podferry.fs.libc import checked, libc, system_call
from podferry.node import outside

# linux/mount.h, and numbers that are the same on all architectures
OPEN_TREE, MOVE_MOUNT = 428, 429
OPEN_TREE_CLONE, AT_RECURSIVE, AT_FDCWD, MOVE_MOUNT_F_EMPTY_PATH = 1, 0x8000, -100, 4
MS_REC, MS_SLAVE = 0x4000, 1 << 19


def show(path: Path, *, below: bool = True, make: bool = False) -> bool:
    """Have the node's directory `path` in this container, with what is mounted `below` it; false where the node has none.

    Nothing is done where it is the node's already, or this is no pod. `make` makes it on the node. Raises `Failed`.
    """
    node = outside.root() / str(path).lstrip("/")
    if make:
        node.mkdir(mode=0o711, parents=True, exist_ok=True)
    if not node.is_dir():
        return False
    if not outside.in_pod() or (path.is_dir() and path.samefile(node)):
        return True
    try:
        tree = outside.among_node_mounts(lambda: _copy(path, below=below))
        try:
            path.mkdir(parents=True, exist_ok=True)
            checked(libc.syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(path), MOVE_MOUNT_F_EMPTY_PATH))
            checked(libc.mount(b"none", os.fsencode(path), None, ctypes.c_ulong(MS_REC | MS_SLAVE), None))
        finally:
            os.close(tree)
    except OSError as error:
        raise Failed.because(f"cannot show the node's {path} in the agent's container", error) from error
    return True


def _copy(path: Path, *, below: bool) -> int:
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC | (AT_RECURSIVE if below else 0)
    return system_call(OPEN_TREE, AT_FDCWD, os.fsencode(path), flags)
