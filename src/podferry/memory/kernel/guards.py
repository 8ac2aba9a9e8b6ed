"""Guard pages (MADV_GUARD_INSTALL, Linux 6.13): places in an area that fault, which CRIU saves from 4.2 on and fails at before."""

from __future__ import annotations

import mmap
import os
from functools import cache

from podferry.memory.kernel.maps import read_areas
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.kernel.pagemap import Category, Scanner, ScanQuery, open_pagemap, reports_guards

_GUARD_INSTALL = 102  # MADV_GUARD_INSTALL of asm-generic/mman-common.h
_KERNELS = 1 << 63
"""Addresses from here on (x86's vsyscall page) are not the process's."""


def has_guards(pid: int) -> bool:
    """Whether a process has guard pages; no where it has ended, or the kernel does not tell (before 6.15)."""
    if not reports_guards():
        return False
    query = ScanQuery(Category.GUARD, Category(0), Category(0), Category.GUARD)
    try:
        windows = [(area.start, area.end) for area in read_areas(pid) if area.start < _KERNELS]
        pagemap = open_pagemap(pid)
        try:
            return bool(Scanner().scan(pagemap, windows, query).starts)
        finally:
            os.close(pagemap)
    except OSError:
        return False


@cache
def hides_guards() -> bool:
    """Whether processes may have guard pages here and the kernel does not tell where (Linux 6.13 and 6.14)."""
    if reports_guards():
        return False
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        try:
            page.madvise(_GUARD_INSTALL)
        except OSError:
            return False
    return True
