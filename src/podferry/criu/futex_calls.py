"""Threads that were frozen in a futex(2) call of which the kernel must find the page in place.

With the operations on mutexes that inherit priority the kernel writes to the futex itself. Where its page is not there it asks
for the page in a way that may not wait (`fault_in_user_writeable` in kernel/futex/core.c, without FAULT_FLAG_ALLOW_RETRY), and
of an area with a userfaultfd, which can only be waited for, it gets none (`handle_userfault` in mm/userfaultfd.c): the call
fails with EFAULT, and glibc ends the process. A thread that begins such a call has just looked at the futex, so that its page
is there. But a thread that was frozen in one begins it again with its first instruction.
"""

from __future__ import annotations

import os
from pathlib import Path

from podferry.criu.dump_images import parse_entries
from podferry.criu.rights import MAGIC
from podferry.protos.pagemap_pb2 import Aarch64Thread, X86Thread
from podferry.protos.rights_pb2 import Core

_FUTEX = {"x86_64": 202, "aarch64": 98}
"""The number of the call (asm/unistd.h)."""
_FLAGS = 128 | 256  # FUTEX_PRIVATE_FLAG, FUTEX_CLOCK_REALTIME
_OF_ONE = frozenset({6, 7, 8, 13})  # FUTEX_LOCK_PI, FUTEX_UNLOCK_PI, FUTEX_TRYLOCK_PI, FUTEX_LOCK_PI2
_OF_TWO = frozenset({5, 11, 12})  # FUTEX_WAKE_OP, FUTEX_WAIT_REQUEUE_PI, FUTEX_CMP_REQUEUE_PI


def futexes(images: Path, machine: str = os.uname().machine) -> dict[int, tuple[int, ...]]:
    """The addresses of the futexes by thread, as the job's pid namespace numbers it. Raises `PeerMisbehaved` and `OSError`.

    Empty for a machine whose calls are not known.
    """
    found: dict[int, tuple[int, ...]] = {}
    for path in images.glob("core-*.img"):
        [core] = parse_entries(path, MAGIC["core"], Core)
        number, futex, operation, second = _call(core, machine)
        operation &= ~_FLAGS
        if number == _FUTEX.get(machine) and operation in _OF_ONE | _OF_TWO:
            found[int(path.stem.removeprefix("core-"))] = (futex, second) if operation in _OF_TWO else (futex,)
    return found


def _call(core: Core, machine: str) -> tuple[int | None, int, int, int]:
    """A call's number, and its first, second and fifth argument."""
    if machine == "x86_64":
        registers = X86Thread.FromString(core.thread_info).gpregs
        return registers.ax, registers.di, registers.si, registers.r8
    every = list(Aarch64Thread.FromString(core.ti_aarch64).gpregs.regs)
    return (every[8], every[0], every[1], every[4]) if len(every) > 8 else (None, 0, 0, 0)
