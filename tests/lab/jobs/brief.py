"""Counts until SIGUSR1 has it look out for a stop; as soon as it notices one of 80 ms it ends, in the way that it was told.

Every line is `COUNT TIME`, also the one that it writes as it ends: what runs twice is seen.
"""

# ruff: noqa: PLW0603

import ctypes
import os
import signal
import sys
import time

how = sys.argv[1]
count = 0
armed = False


def arm(number, frame):
    global armed, before
    armed, before = True, time.monotonic()


def say():
    global count
    os.write(1, b"%d %d\n" % (count, time.monotonic_ns()))
    count += 1


def end():
    say()
    if how == "fault":
        ctypes.string_at(0)
    if how == "exec":
        os.execv("/bin/sh", ["sh", "-c", "exit 5"])
    if how == "daemon":
        if os.fork():
            os._exit(6)
        time.sleep(3600)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(8)
    if how == "memory":
        eaten = []
        while True:
            eaten.append(bytearray(b"x") * (1 << 20))
    os._exit(int(how))


signal.signal(signal.SIGUSR1, arm)
if how == "stop" and (child := os.fork()):  # the first process of a container cannot stop itself
    signal.signal(signal.SIGUSR1, lambda number, frame: os.kill(child, number))
    os.waitpid(child, os.WUNTRACED)
    os.kill(child, signal.SIGCONT)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
before = time.monotonic()
while True:
    now = time.monotonic()
    if armed and now - before > 0.08:
        end()
    before = now
    say()
    time.sleep(0.005)
