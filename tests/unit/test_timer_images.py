"""Timers in CRIU's images: armed timers stay armed, disarmed ones disarmed, and none comes too early."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from podferry.criu.dump_images import FILES_MAGIC, parse_entries, write_entries
from podferry.criu.rights import MAGIC
from podferry.criu.timers import ABSOLUTE, SECOND, put_right, put_threads_right
from podferry.errors import PeerMisbehaved
from podferry.node.timer_threads import timer_threads
from podferry.protos.pagemap_pb2 import FileEntry, PosixTimer, TaskTimers, TimerfdEntry
from podferry.protos.rights_pb2 import Core

pytestmark = pytest.mark.unit

REALTIME, MONOTONIC, BOOTTIME, REALTIME_ALARM = 0, 1, 7, 8
MS = 10**6
PERIODIC = (0, 10 * MS)


def timer(
    clock: int = MONOTONIC,
    *,
    left: tuple[int, int] = (0, 0),
    interval: tuple[int, int] = (0, 0),
    ticks: int = 0,
    flags: int = 0,
) -> FileEntry:
    tfd = TimerfdEntry(
        clockid=clock,
        ticks=ticks,
        settime_flags=flags,
        vsec=left[0],
        vnsec=left[1],
        isec=interval[0],
        insec=interval[1],
    )
    return FileEntry(type=17, id=3, tfd=tfd)


def after(tmp_path: Path, entry: FileEntry, now: int = 0) -> TimerfdEntry:
    write_entries(tmp_path / "files.img", FILES_MAGIC, [entry])
    put_right(tmp_path, lambda: now)
    (found,) = parse_entries(tmp_path / "files.img", FILES_MAGIC, FileEntry)
    assert (found.type, found.id) == (17, 3)
    return found.tfd


@pytest.mark.parametrize("clock", [REALTIME, MONOTONIC, BOOTTIME, REALTIME_ALARM, 9])
def test_a_periodic_timer_that_expired_goes_on(tmp_path: Path, clock: int) -> None:
    found = after(tmp_path, timer(clock, interval=PERIODIC, ticks=1))
    assert (found.vsec, found.vnsec, found.ticks) == (0, 10 * MS, 1)


@pytest.mark.parametrize(
    "entry",
    [
        timer(),
        timer(interval=PERIODIC),  # timerfd_settime with an interval and no value disarms
        timer(ticks=1),  # a single expiration that nobody has read yet
        timer(left=(1, 2), interval=PERIODIC, ticks=1),
    ],
)
def test_all_others_stay_as_they_are(tmp_path: Path, entry: FileEntry) -> None:
    assert after(tmp_path, entry) == entry.tfd


def test_a_point_in_time_on_a_clock_of_the_boot_is_what_is_left_until_it(tmp_path: Path) -> None:
    found = after(tmp_path, timer(BOOTTIME, left=(5, 7), flags=ABSOLUTE))
    assert (found.vsec, found.vnsec, found.settime_flags) == (5, 7, 0)


@pytest.mark.parametrize("restored_after", [0, 200 * MS, 950 * MS, 3 * SECOND])
@pytest.mark.parametrize("now", [1000 * SECOND, 1000 * SECOND + 100 * MS, 1000 * SECOND + 999 * MS])
@pytest.mark.parametrize("left", [(0, 300 * MS), (4, 950 * MS)])
@pytest.mark.parametrize("clock", [REALTIME, REALTIME_ALARM])
def test_a_point_of_the_wall_clock_is_never_early_and_at_most_the_downtime_late(
    tmp_path: Path, clock: int, left: tuple[int, int], now: int, restored_after: int
) -> None:
    found = after(tmp_path, timer(clock, left=left, flags=ABSOLUTE | 2), now)
    assert found.settime_flags == ABSOLUTE | 2
    meant = now + left[0] * SECOND + left[1]
    criu_adds = (now + restored_after) // SECOND * SECOND
    late = criu_adds + found.vsec * SECOND + found.vnsec - meant
    assert 0 <= late < restored_after + SECOND


def test_what_is_not_in_our_protos_is_kept(tmp_path: Path) -> None:
    """Another kind of file, with fields that only CRIU knows; and the timer's own id and owner."""
    other = bytes.fromhex("0801 1007 1a 02 0805".replace(" ", ""))
    ours = timer(interval=PERIODIC, ticks=2).SerializeToString()
    path = tmp_path / "files.img"
    parts = b"".join(struct.pack("<I", len(one)) + one for one in (other, ours))
    path.write_bytes(struct.pack("<II", 0x54564319, FILES_MAGIC) + parts)
    assert put_right(tmp_path) == 1
    assert other in path.read_bytes()


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "files.img").write_bytes(b"nothing of the kind")
    with pytest.raises(PeerMisbehaved):
        put_right(tmp_path)


def core(path: Path) -> Core:
    [found] = parse_entries(path, MAGIC["core"], Core)
    return found


def test_a_timer_tells_its_thread_again(tmp_path: Path) -> None:
    """CRIU's own image of a process, to which timers are added: two whose thread it has not read, and one that tells none."""
    path = tmp_path / "core-1.img"
    shutil.copy(Path(__file__).parent / "criu_images" / path.name, path)
    before = core(path)
    timers = TaskTimers.FromString(before.tc.timers)
    timers.posix.extend(
        [
            PosixTimer.FromString(saved(0, -1)),
            PosixTimer.FromString(saved(1, 1504790000)),
            PosixTimer.FromString(saved(2, None)),
        ]
    )
    before.tc.timers = timers.SerializeToString()
    write_entries(path, MAGIC["core"], [before])
    assert put_threads_right(tmp_path, {1: {0: 7, 1: 8}}) == 1
    after = core(path)
    found = TaskTimers.FromString(after.tc.timers)
    assert [one.notify_thread_id for one in found.posix] == [7, 8, 0]
    assert put_threads_right(tmp_path, {1: {0: 7}}) == 0
    timers.posix[0].notify_thread_id, timers.posix[1].notify_thread_id = 7, 8
    before.tc.timers = timers.SerializeToString()
    assert after.SerializeToString() == before.SerializeToString(), "nothing else has changed"


def saved(id: int, thread: int | None) -> bytes:
    """A timer as CRIU writes it, with fields that podferry has no names for."""
    fields = [(1, id), (2, 1), (3, 12), (4, 4), (5, 0), (6, 0), (7, 0), (8, 10**7), (9, 0), (10, 10**6)]
    if thread is not None:
        fields.append((11, thread & (1 << 64) - 1))
    return b"".join(varint(number << 3) + varint(value) for number, value in fields)


def varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


TIMER = """
import ctypes, struct, threading
libc, id = ctypes.CDLL(None), ctypes.c_int()
def tell():
    event = struct.pack("QiiI52x", 0, 12, 4, threading.get_native_id())
    print(libc.syscall(NUMBER, 1, event, ctypes.byref(id)), id.value, threading.get_native_id(), flush=True)
    input()
threading.Thread(target=tell).start()
"""


def test_threads_that_timers_tell_are_found() -> None:
    number = {"x86_64": 222, "aarch64": 107}[os.uname().machine]
    argv = [sys.executable, "-c", TIMER.replace("NUMBER", str(number))]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        failed, id, thread = map(int, child.stdout.readline().split())
        if failed or not Path(f"/proc/{child.pid}/timers").exists():
            pytest.skip(
                "the kernel has no timer_create, or does not tell of timers in /proc (CONFIG_CHECKPOINT_RESTORE)"
            )
        me = os.getpid()
        assert timer_threads([me, child.pid]) == {child.pid: {id: thread}}
        child.kill()
