"""The pseudo-terminals of a job: what waits to be read in them, and how a dump that is undone leaves them.

CRIU reads what waits and writes it back, and with that changes it. To read, it has both ends wait for nothing (O_NONBLOCK), which
holds for the job as well; it takes that back where the dump fails, but not where its images are whole (`tty_dump_queued_data` in
its criu/tty.c), as those of every dump are that is undone here.

Only pairs count whose master the job has open itself, as `script`, `tmux` and `expect` do. What a person has typed into
the container's own console is the business of whoever is attached.
"""

from __future__ import annotations

import array
import fcntl
import os
import stat
import termios
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from podferry.node.descriptors import second

MASTER = (5, 2)
"""/dev/ptmx."""
SLAVES = range(136, 144)
TIOCGPTN = 0x80045430 if os.uname().machine in ("x86_64", "aarch64", "riscv64", "s390x") else 0x40045430
"""asm-generic/ioctls.h: the number of a master's other end."""
MOST = 4096
"""Descriptors of a process that are looked at: the job stands still."""


def unread(init: int, pids: Collection[int]) -> tuple[str, ...]:
    """The terminals of the processes `pids` with something that nobody has read yet. The container's first process is `init`."""
    if not _has_terminals(init):
        return ()
    numbers: dict[int, bool] = {}
    waiting: dict[int, int] = {}
    for pid, descriptor, found in _terminals(pids):
        with suppress(OSError), second(pid, descriptor) as one:
            if (os.major(found.st_rdev), os.minor(found.st_rdev)) == MASTER:
                number = _asked(one, TIOCGPTN)
                numbers[number] = numbers.get(number, False) or bool(_asked(one, termios.FIONREAD))
            elif (size := _asked(one, termios.FIONREAD)) > 0:
                minor = os.minor(found.st_rdev) + (os.major(found.st_rdev) - SLAVES.start) * 256
                waiting[minor] = size
    return tuple(f"/dev/pts/{one}" for one in sorted(numbers) if numbers[one] or one in waiting)


Flags = tuple[tuple[int, int, int], ...]
"""Of pseudo-terminals: the pid that has it open, by which descriptor, and the flags of the open file (F_GETFL)."""


def flags(pids: Collection[int]) -> Flags:
    """The flags of the terminals that the processes `pids` of a container have open, its first process first."""
    if not any(map(_has_terminals, islice(pids, 1))):
        return ()
    found = []
    for pid, descriptor, _ in _terminals(pids):
        with suppress(OSError), second(pid, descriptor) as one:
            found.append((pid, descriptor, fcntl.fcntl(one, fcntl.F_GETFL)))
    return tuple(found)


def put_back(pids: Collection[int], noted: Flags) -> None:
    """Give terminals of the processes `pids`, which stand still since, the flags that were noted."""
    for pid, descriptor, had in noted:
        if pid in pids:
            with suppress(OSError), second(pid, descriptor) as one:
                fcntl.fcntl(one, fcntl.F_SETFL, had)


def _has_terminals(init: int) -> bool:
    with suppress(OSError):
        return any(name.isdigit() for name in os.listdir(f"/proc/{init}/root/dev/pts"))  # noqa: PTH208 - of another root
    return False


def _terminals(pids: Iterable[int]) -> Iterator[tuple[int, int, os.stat_result]]:
    for pid in pids:
        with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as listing:
            for entry in islice(listing, MOST):
                with suppress(OSError):
                    found = Path(entry.path).stat()
                    number = os.major(found.st_rdev), os.minor(found.st_rdev)
                    if stat.S_ISCHR(found.st_mode) and (number == MASTER or number[0] in SLAVES):
                        yield pid, int(entry.name), found


def _asked(descriptor: int, what: int) -> int:
    """The number that the terminal answers with."""
    answer = array.array("i", [0])
    fcntl.ioctl(descriptor, what, answer)
    return answer[0]
