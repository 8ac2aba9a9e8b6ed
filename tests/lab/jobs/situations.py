"""A job in one situation, by name: it counts, `COUNT TIME` on a line, while all is well; else it says why, and exits 7."""

import ctypes
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)
SITUATIONS = {}
INTERVAL = 0.01


def situation(function):
    SITUATIONS[function.__name__] = function
    return function


def bad(*why):
    print("BAD", *why, flush=True)
    os._exit(7)


def count(step, gap=0.02):
    number = 0
    while True:
        step(number)
        print(number, time.monotonic_ns(), flush=True)
        number += 1
        time.sleep(gap)


def nothing(number):
    pass


# Timers.


def fires(timer, timeout=5.0):
    if not select.select([timer], [], [], timeout)[0]:
        bad("the timer does not fire")
    return int.from_bytes(os.read(timer, 8), sys.byteorder)


def periodic(clock, flags=0):
    timer = os.timerfd_create(clock)
    first = time.clock_gettime(clock) + INTERVAL if flags else INTERVAL
    os.timerfd_settime(timer, flags=flags, initial=first, interval=INTERVAL)
    count(lambda number: fires(timer))


@situation
def timerfd_monotonic():
    periodic(time.CLOCK_MONOTONIC)


@situation
def timerfd_boottime():
    periodic(time.CLOCK_BOOTTIME)


@situation
def timerfd_realtime():
    periodic(time.CLOCK_REALTIME)


@situation
def timerfd_monotonic_absolute():
    periodic(time.CLOCK_MONOTONIC, os.TFD_TIMER_ABSTIME)


@situation
def timerfd_realtime_absolute():
    periodic(time.CLOCK_REALTIME, os.TFD_TIMER_ABSTIME)


def never_early(clock):
    """Single points in time, a second apart: none comes before its time."""
    timer = os.timerfd_create(clock)

    def step(number):
        point = time.clock_gettime_ns(clock) + 700_000_000
        os.timerfd_settime_ns(timer, flags=os.TFD_TIMER_ABSTIME, initial=point)
        fires(timer, 10.0)
        if (early := point - time.clock_gettime_ns(clock)) > 0:
            bad("early by", early, "ns")

    count(step)


@situation
def timerfd_points_of_monotonic():
    never_early(time.CLOCK_MONOTONIC)


@situation
def timerfd_points_of_realtime():
    never_early(time.CLOCK_REALTIME)


@situation
def timerfd_disarmed():
    """An interval without a value: disarmed, and so it stays."""
    timer = os.timerfd_create(time.CLOCK_MONOTONIC)
    os.timerfd_settime(timer, initial=0, interval=INTERVAL)

    def step(number):
        if select.select([timer], [], [], 0)[0]:
            bad("a disarmed timer fired")

    count(step)


def signalled(arm):
    fired = [0]
    signal.signal(signal.SIGALRM, lambda number, frame: fired.__setitem__(0, fired[0] + 1))
    arm()

    def step(number):
        before, waited = fired[0], time.monotonic()
        while fired[0] == before:
            if time.monotonic() - waited > 5:
                bad("the timer does not fire")
            time.sleep(0.005)

    count(step)


@situation
def setitimer_real():
    signalled(lambda: signal.setitimer(signal.ITIMER_REAL, INTERVAL, INTERVAL))


def posix_timer(clock):
    class Spec(ctypes.Structure):
        _fields_ = [(name, ctypes.c_long) for name in ("isec", "insec", "vsec", "vnsec")]

    def arm():
        id = ctypes.c_void_p()
        if libc.timer_create(clock, None, ctypes.byref(id)):  # no sigevent: SIGALRM
            bad("timer_create")
        nanoseconds = int(INTERVAL * 1e9)
        if libc.timer_settime(id, 0, ctypes.byref(Spec(0, nanoseconds, 0, nanoseconds)), None):
            bad("timer_settime")

    signalled(arm)


@situation
def posix_timer_monotonic():
    posix_timer(time.CLOCK_MONOTONIC)


@situation
def posix_timer_realtime():
    posix_timer(time.CLOCK_REALTIME)


@situation
def posix_timer_boottime():
    posix_timer(time.CLOCK_BOOTTIME)


# Memory.


@situation
def shared_mappings_by_the_thousand():
    """CRIU writes two images for each."""
    mappings = [mmap.mmap(-1, 8192) for _ in range(6000)]
    for number, mapping in enumerate(mappings):
        mapping[0] = number % 250
        libc.mprotect(ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + 4096, 4096, 0)

    def step(number):
        if mappings[number % 6000][0] != number % 6000 % 250:
            bad("another mapping")

    count(step)


# Processes.


@situation
def starts_programs_all_the_time():
    """A parent waits in vfork for a child that may be frozen before it has become another program."""

    def start():
        while True:
            subprocess.run(["/bin/true"], check=True)

    for _ in range(3):
        threading.Thread(target=start, daemon=True).start()
    count(nothing)


if __name__ == "__main__":
    SITUATIONS[sys.argv[1]]()
