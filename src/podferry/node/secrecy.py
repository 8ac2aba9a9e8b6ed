"""Memory of jobs passes through this process: none of it is left behind in a core dump."""

from __future__ import annotations

import ctypes

from podferry.fs.libc import checked, libc

PR_SET_DUMPABLE = 4  # linux/prctl.h


def no_core_dumps() -> None:
    """Whatever this process dies of, the kernel writes no core of it, neither to a file nor to a program, for
    which RLIMIT_CORE does not hold.

    A child has the same until it executes another program. Raises `OSError`.
    """
    checked(libc.prctl(PR_SET_DUMPABLE, ctypes.c_ulong(0), 0, 0, 0), "PR_SET_DUMPABLE")
