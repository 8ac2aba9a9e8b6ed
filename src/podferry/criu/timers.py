"""Timers in CRIU's images, put right before they travel: what CRIU saves of a timerfd is not always what it was.

- **A periodic timer that has expired, and was not read since, shows no time until its next expiration** (`timerfd_get_remaining` in
  the kernel's fs/timerfd.c): its next period is begun by the read. CRIU saves that 0, and a timer that is set to 0 is disarmed: it
  never fires again. Jobs stand still for longer than a short interval, so such a timer is found in this state at every move. CRIU
  knows the like of other timers, and sets them to their interval (`decode_itimer`, `decode_posix_timer` in its criu/timer.c): so
  it is done here. A disarmed timer has nothing to be read.
- **A timer of `timer_create` that tells one thread (SIGEV_THREAD_ID)**, as those of glibc's SIGEV_THREAD and of Go's profiler do,
  is saved with -1 or with any other number for the thread: in a pid namespace CRIU reads the thread's number there before it has
  asked for it, from memory that nothing has been written to (`encode_notify_thread_id` in its criu/timer.c). The restore fails of
  that; the number is put there from what /proc told.
- **A timer that was set to a point in time** is set again to the current second and the rest that was left (`timerfd_arm` in its
  criu/pie/restorer.c, which says so): up to a second too early. On a clock that counts from a boot, which goes on in the job's time
  namespace, the rest is all there is to it, and is counted from the moment of the restore. On the clock of the wall the point in
  time is meant, and may be missed only by being late: its second is counted from this one, and its fraction is the point's own.

As of CRIU 4.2; where CRIU does better one day, this finds nothing to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from podferry.criu.dump_images import FILES_MAGIC, parse_entries, write_entries
from podferry.criu.rights import MAGIC
from podferry.node.timer_threads import TimerThreads
from podferry.protos.pagemap_pb2 import FileEntry, TaskTimers, TimerfdEntry
from podferry.protos.rights_pb2 import Core

SECOND = 10**9
ABSOLUTE = 1  # TFD_TIMER_ABSTIME, linux/timerfd.h
WALL_CLOCKS = frozenset({time.CLOCK_REALTIME, 8})  # 8: CLOCK_REALTIME_ALARM


def put_right(images: Path, wall_clock: Callable[[], int] = time.time_ns) -> int:
    """Put the timers in `files.img` right; how many were not. Raises `PeerMisbehaved` where it is no such image, and `OSError`."""
    path = images / "files.img"
    entries = parse_entries(path, FILES_MAGIC, FileEntry)
    changed = 0
    for entry in entries:
        if entry.HasField("tfd"):
            changed += _put_right(entry.tfd, wall_clock)
    if changed:
        write_entries(path, FILES_MAGIC, entries)
    return changed


def put_threads_right(images: Path, told: TimerThreads) -> int:
    """Name the threads that timers tell, where CRIU has not; in how many processes. Raises as `put_right`."""
    changed = 0
    for pid, threads in told.items():
        path = images / f"core-{pid}.img"
        [core] = parse_entries(path, MAGIC["core"], Core)
        timers = TaskTimers.FromString(core.tc.timers)
        wrong = [one for one in timers.posix if one.notify_thread_id != threads.get(one.it_id, one.notify_thread_id)]
        for one in wrong:
            one.notify_thread_id = threads[one.it_id]
        if wrong:
            core.tc.timers = timers.SerializeToString()
            write_entries(path, MAGIC["core"], [core])
            changed += 1
    return changed


def _put_right(timer: TimerfdEntry, wall_clock: Callable[[], int]) -> bool:
    before = timer.SerializeToString()
    if not (timer.vsec or timer.vnsec):
        if not timer.ticks or not (timer.isec or timer.insec):
            return False  # disarmed, or a single expiration that was
        timer.vsec, timer.vnsec = timer.isec, timer.insec
    if timer.settime_flags & ABSOLUTE:
        if timer.clockid in WALL_CLOCKS:
            now = wall_clock()
            point = now + timer.vsec * SECOND + timer.vnsec
            timer.vsec, timer.vnsec = point // SECOND - now // SECOND, point % SECOND
        else:
            timer.settime_flags &= ~ABSOLUTE
    return timer.SerializeToString() != before
