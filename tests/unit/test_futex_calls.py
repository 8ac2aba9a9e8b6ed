"""Threads that are put back into a futex call of which the kernel must find the page in place."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
from pathlib import Path

import pytest

from podferry.criu.dump_images import parse_entries, write_entries
from podferry.criu.futex_calls import futexes
from podferry.criu.rights import MAGIC
from podferry.memory.kernel.reader import touch
from podferry.protos.pagemap_pb2 import Aarch64Registers, Aarch64Thread, X86Registers, X86Thread
from podferry.protos.rights_pb2 import Core

pytestmark = pytest.mark.unit

FUTEX, OTHER = 0x7F0000001008, 0x7F0000002010
LOCK_PI, WAIT, CMP_REQUEUE_PI, PRIVATE = 6, 0, 12, 128


def saved(images: Path, thread: int, machine: str, number: int, operation: int) -> None:
    """CRIU's own image of a process, with the registers of a thread that is about to make a system call."""
    path = images / f"core-{thread}.img"
    shutil.copy(Path(__file__).parent / "criu_images" / "core-1.img", path)
    [core] = parse_entries(path, MAGIC["core"], Core)
    if machine == "x86_64":
        registers = X86Registers(ax=number, di=FUTEX, si=operation, r8=OTHER)
        core.thread_info = X86Thread(gpregs=registers).SerializeToString()
    else:
        every = [FUTEX, operation, 0, 0, OTHER, 0, 0, 0, number]
        core.ti_aarch64 = Aarch64Thread(gpregs=Aarch64Registers(regs=every)).SerializeToString()
    write_entries(path, MAGIC["core"], [core])


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 202), ("aarch64", 98)])
def test_threads_in_calls_that_cannot_wait_for_their_page_are_found(tmp_path: Path, machine: str, number: int) -> None:
    saved(tmp_path, 7, machine, number, LOCK_PI | PRIVATE)
    saved(tmp_path, 8, machine, number, CMP_REQUEUE_PI)
    saved(tmp_path, 9, machine, number, WAIT | PRIVATE)  # the kernel only reads it, and waits for the page
    saved(tmp_path, 10, machine, number + 1, LOCK_PI)
    assert futexes(tmp_path, machine) == {7: (FUTEX,), 8: (FUTEX, OTHER)}


def test_of_a_machine_whose_calls_are_not_known_nothing_is_found(tmp_path: Path) -> None:
    saved(tmp_path, 7, "x86_64", 202, LOCK_PI)
    assert futexes(tmp_path, "riscv64") == {}


def test_a_page_is_touched_where_there_is_one() -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        one = ctypes.c_char.from_buffer(memory)
        assert touch(os.getpid(), ctypes.addressof(one))
        del one
    assert not touch(os.getpid(), 0)
