"""A small program of its own that has threads of other processes make a call which nobody can make for them, and CRIU did not.

    python -SI made_calls.py CALL...        CALL: TID:set_mempolicy:MODE:NODES or TID:personality:VALUE, in hexadecimal but for TID

A thread is stopped for some ten microseconds and makes the call itself, as in `inject.py`, of which this has all its care. It says
a line for each call: `TID`, and what went wrong if anything did. What a call points to stands below the thread's stack meanwhile,
where nobody has anything, and what was there is put back.
"""

# ruff: noqa: PTH100, PTH118, PTH120, PTH123
from __future__ import annotations

import os
import sys
import time

if __name__ == "__main__":  # started without a path to packages
    sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", "..")))

from podferry.memory.tracking.inject import ARCHITECTURE, MACHINE, Failure, Thread, _undisturbed, find_syscall, settle
from podferry.memory.tracking.registers import ARCHITECTURES, UnsupportedCode

PATIENCE = 3.0
"""Seconds for which a thread may be somebody else's, as a restored one is CRIU's for a moment, or not come to a stop."""
RETRY = 0.001
BYTES = 128
BELOW_STACK = 256 + BYTES
"""Beyond the red zone of x86-64's calling convention, 128 bytes."""


def make(tid: int, name: str, values: list[int]) -> None:
    """Have thread `tid` make one call. Raises `Failure`, `OSError`, `UnsupportedCode`, `ValueError`."""
    pointed = b""
    if name == "set_mempolicy":
        number, (mode, nodes) = ARCHITECTURE.set_mempolicy, values
        pointed = nodes.to_bytes(BYTES, "little") if nodes else b""
        arguments = [mode, 0, BYTES * 8]  # the kernel reads one bit less than that (mm/mempolicy.c, get_nodes)
    elif name == "personality":
        number, arguments = ARCHITECTURE.personality, values[:1]
    else:
        raise ValueError(f"no such call: {name}")
    with open(f"/proc/{tid}/mem", "r+b", buffering=0) as mem:
        where = find_syscall(tid, mem.fileno())
        thread = _seized(tid)
        try:
            thread.stop(PATIENCE)
            before = thread.registers()
            ARCHITECTURE.check(before)
            # Beyond the red zone no frame of the thread has data. The bytes are restored all the same, for programs that switch
            # stacks by themselves.
            place = ARCHITECTURE.stack_pointer(before) - BELOW_STACK & ~15
            kept = os.pread(mem.fileno(), len(pointed), place)
            if pointed:
                arguments[1] = place
            with _undisturbed(thread, before, mem.fileno()):
                os.pwrite(mem.fileno(), pointed, place)
                try:
                    result = thread.syscall(before, number, where, *arguments)
                finally:
                    os.pwrite(mem.fileno(), kept, place)
        finally:
            thread.release()
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def _seized(tid: int) -> Thread:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return Thread(tid)
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY)


def main(wanted: list[str]) -> None:
    """Do it for each, whatever becomes of the others."""
    for one in wanted:
        tid, name, *values = one.split(":")
        try:
            make(int(tid), name, [int(value, 16) for value in values])
        except (Failure, OSError, UnsupportedCode) as error:
            print(tid, error, flush=True)
        else:
            print(tid, flush=True)


if __name__ == "__main__":
    if MACHINE in ARCHITECTURES:
        settle()
        main(sys.argv[1:])
