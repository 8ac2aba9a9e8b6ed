"""Counts, and at each count writes to and looks at every kind of memory that there is. What is not as it should be is named, and
ends it with status 3. SIGTERM: exit 7. With the argument `guards` there are guards that madvise made. The kinds that this
kernel does not have are printed first."""

# ruff: noqa: SIM115

import ctypes
import mmap
import os
import signal
import sys
import threading
import time
from pathlib import Path

PAGE, PAGES, HUGE = 4096, 64, 2 << 20
ANONYMOUS, PRIVATE, SHARED, DROPPABLE, NORESERVE = 0x20, 0x02, 0x01, 0x08, 0x4000
LOCKED, HUGETLB, GROWSDOWN = 0x2000, 0x40000, 0x0100
HUGEPAGE, GUARD_INSTALL = 14, 102
READ_WRITE = 3
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.madvise.argtypes = LIBC.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
FAILED = ctypes.c_void_p(-1).value


def fail(what):
    print(f"{what} is wrong", flush=True)
    os._exit(3)


def need(truth, what):
    if not truth:
        fail(what)


def content(name, number, version):
    return (b"%s:%d:%d;" % (name.encode(), number, version) * (PAGE // 8))[:PAGE]


class Area:
    """Pages of one kind, of which every byte is known. `forgets`: the kernel may give zeros back."""

    def __init__(self, name, start, pages=PAGES, *, forgets=False):
        self.name, self.start, self.forgets = name, start, forgets
        self.versions = [0] * pages
        for number in range(pages):
            self.write(number, 0)

    def write(self, number, version):
        ctypes.memmove(self.start + number * PAGE, content(self.name, number, version), PAGE)
        self.versions[number] = version

    def check(self, number):
        found = ctypes.string_at(self.start + number * PAGE, PAGE)
        if self.forgets and not any(found):
            self.write(number, self.versions[number])
            return
        need(found == content(self.name, number, self.versions[number]), f"{self.name}, page {number}")

    def step(self, count):
        number = count * 17 % len(self.versions)
        self.check(number)
        self.write(number, count)
        if count % 20 == 0:
            for number in range(len(self.versions)):
                self.check(number)


areas = []


def add(name, flags, fd=-1, size=PAGES * PAGE, **more):
    start = LIBC.mmap(None, size, READ_WRITE, flags, fd, 0)
    if start in (None, FAILED):
        print(f"there is no {name}: {os.strerror(ctypes.get_errno())}", flush=True)
        return None
    areas.append(Area(name, start, size // PAGE, **more))
    return start


add("private", PRIVATE | ANONYMOUS)
add("shared", SHARED | ANONYMOUS)
add("reserved", PRIVATE | ANONYMOUS | NORESERVE)
add("droppable", DROPPABLE | ANONYMOUS, forgets=True)
memfd = os.memfd_create("memories")
os.ftruncate(memfd, PAGES * PAGE)
add("memfd", SHARED, memfd)
add("private-memfd", PRIVATE, memfd)
for name, where in (("file", "/memories"), ("tmpfs", "/dev/shm/memories")):
    file = Path(where).open("w+b", buffering=0)
    file.truncate(PAGES * PAGE)
    add(f"shared-{name}", SHARED, file.fileno())
    written = Path(f"{where}-private").open("w+b", buffering=0)
    written.write(b"below" * (PAGES * PAGE // 5 + 1))
    add(f"private-{name}", PRIVATE, written.fileno())
Path("/dev/shm/plain").write_bytes(b"in memory\n" * 10000)

whole = LIBC.mmap(None, 2 * HUGE, READ_WRITE, PRIVATE | ANONYMOUS, -1, 0)
aligned = (whole + HUGE - 1) // HUGE * HUGE
LIBC.madvise(aligned, HUGE, HUGEPAGE)
areas.append(Area("transparent-huge", aligned, HUGE // PAGE))

locked = add("locked", PRIVATE | ANONYMOUS)
if LIBC.mlock(locked, PAGES * PAGE):
    print("locked memory is not allowed", flush=True)

guarded = LIBC.mmap(None, (PAGES + 2) * PAGE, READ_WRITE, PRIVATE | ANONYMOUS, -1, 0)
for guard in (guarded, guarded + (PAGES + 1) * PAGE):
    if "guards" not in sys.argv or LIBC.madvise(guard, PAGE, GUARD_INSTALL):
        LIBC.mprotect(guard, PAGE, 0)
areas.append(Area("between-guards", guarded + PAGE))

hidden = LIBC.mmap(None, PAGES * PAGE, READ_WRITE, PRIVATE | ANONYMOUS, -1, 0)
secret = Area("unreadable", hidden)
LIBC.mprotect(hidden, PAGES * PAGE, 0)

mirror_fd = os.memfd_create("mirror")
os.ftruncate(mirror_fd, PAGE)
one, two = (mmap.mmap(mirror_fd, PAGE) for _ in range(2))


def deep(levels, seed):
    """Write a stack that grows, and look at it on the way back."""
    here = bytearray(content("stack", levels, seed))
    if levels:
        deep(levels - 1, seed)
    need(here == content("stack", levels, seed), f"the stack at {levels}")


stop = threading.Event()
threading.stack_size(4 << 20)


def digging():
    """A thread whose stack is deep for a while, and shallow for a while."""
    seed = 0
    while not stop.is_set():
        deep(seed * 37 % 300, seed)
        seed += 1
        time.sleep(0.005)


# A child shares pages with its parent until one of them writes; it looks at its own when it is asked.
ask, answer = os.pipe(), os.pipe()
if os.fork() == 0:
    children = [Area("childs-own", LIBC.mmap(None, PAGES * PAGE, READ_WRITE, PRIVATE | ANONYMOUS, -1, 0))]
    children += [area for area in areas if area.name in ("private", "transparent-huge")]
    os.close(ask[1])
    number = 0
    while os.read(ask[0], 1):
        for area in children:
            area.step(number)
        number += 1
        os.write(answer[1], b"y")
    os._exit(0)
os.close(ask[0])
threading.Thread(target=digging, daemon=True).start()

signal.signal(signal.SIGTERM, lambda number, frame: os._exit(7))
ledger = Path("/ledger").open("ab", buffering=0)
count = 0
while True:
    for area in areas:
        area.step(count)
    LIBC.mprotect(hidden, PAGES * PAGE, READ_WRITE)
    secret.step(count)
    LIBC.mprotect(hidden, PAGES * PAGE, 0)
    os.write(ask[1], b"?")
    need(os.read(answer[0], 1) == b"y", "the child")
    need(two[:8] == (b"%08d" % (count - 1) if count else bytes(8)), "memory that is mapped twice")
    one[:8] = b"%08d" % count
    if count % 20 == 0:
        need(Path("/dev/shm/plain").read_bytes() == b"in memory\n" * 10000, "a file in memory")
    ledger.write(b"%d\n" % count)
    print(count, time.monotonic_ns(), flush=True)
    count += 1
    time.sleep(0.01)
