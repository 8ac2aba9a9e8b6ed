"""The beginning of jobs that are in one situation, by name, and count, `COUNT TIME` on a line, while all is well.

Else such a job says why, and exits 7. `Cluster.start` puts this before the file that has the situations.
"""

import ctypes
import os
import time
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
SITUATIONS = {}


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


def keeps(what, wanted, read):
    """What `read` returns is to stay what it was; of dictionaries the entries that differ are told."""

    def step(number):
        found = read()
        if found != wanted:
            if isinstance(found, dict):
                found = {
                    key: (wanted.get(key), found.get(key))
                    for key in wanted | found
                    if wanted.get(key) != found.get(key)
                }
            bad(what, found)

    count(step)


def soon(wanted, read, patience=5.0):
    """Read until it is as wanted: for what a thread itself sets again, some milliseconds after it goes on."""

    def again():
        deadline = time.monotonic() + patience
        while (found := read()) != wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        return found

    return again


def whole(connection, size):
    """So many bytes of a connection, which has to stay open."""
    got = b""
    while len(got) < size:
        try:
            piece = connection.recv(size - len(got))
        except OSError as error:
            bad("the connection failed:", error)
        if not piece:
            bad("the connection was closed")
        got += piece
    return got


def call(name, *arguments):
    """A function of libc, whose failure is the end."""
    result = getattr(libc, name)(*arguments)
    if result < 0:
        bad(name, os.strerror(ctypes.get_errno()))
    return result


def status(*fields):
    lines = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return [lines[field].strip() for field in fields]
