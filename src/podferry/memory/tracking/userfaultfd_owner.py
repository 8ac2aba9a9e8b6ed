"""The queries of a tracker about one process."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from podferry.fs.libc import libc

_KCMP = {"x86_64": 312, "aarch64": 272}  # arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h
_KCMP_VM = 1


def share_memory(one: int, other: int) -> bool:
    """Whether two processes have the same address space, by kcmp(2); no where the kernel cannot tell."""
    number = _KCMP.get(os.uname().machine)
    if number is None:
        return False
    return int(libc.syscall(ctypes.c_long(number), one, other, _KCMP_VM, 0, 0)) == 0


def owns_userfaultfd(pid: int) -> bool:
    """Whether a process has a userfaultfd open. Raises OSError if it is gone."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(descriptor.readlink()) == "anon_inode:[userfaultfd]":
                return True
        except FileNotFoundError:
            continue
    return False


def uses_direct_io(pid: int) -> bool:
    """Whether a process has a file open with O_DIRECT. Raises OSError if it is gone."""
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            text = info.read_bytes()
        except FileNotFoundError:
            continue
        flags = text.partition(b"flags:")[2].split(None, 1)[0]
        if int(flags, 8) & os.O_DIRECT:
            return True
    return False
