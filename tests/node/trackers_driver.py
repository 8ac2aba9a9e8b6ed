"""A program whose memory is never at rest, for test_trackers.py. Run as `python3 -SI trackers_driver.py SOCKET`.

It connects, says its process id and what it is, and obeys lines: `step SEED COUNT` (that many random changes of its
address space), `fork`, `exec`, `exit`, `do EXPRESSION`. Every line is answered by one line. A fork connects anew.
"""

import ctypes
import mmap
import os
import random
import signal
import socket
import sys
from pathlib import Path

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
for name in ("mmap", "mremap", "sbrk"):
    getattr(LIBC, name).restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
for name in ("munmap", "madvise", "mprotect", "mlock", "munlock"):
    getattr(LIBC, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int][: 3 if name[1] in "ap" else 2]
LIBC.sbrk.argtypes = [ctypes.c_long]

PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
DROPPABLE_ANONYMOUS = 0x08 | mmap.MAP_ANONYMOUS
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
MAYMOVE, FIXED, DONTUNMAP = 1, 2, 4
DONTNEED, FREE, HUGEPAGE, GUARD_INSTALL, GUARD_REMOVE = 4, 8, 14, 102, 103
HUGE = 2 << 20

areas: list[tuple[int, int]] = []  # address, pages: readable and writable
guarded: set[int] = set()


def pick(rng: random.Random) -> tuple[int, int]:
    if not areas:
        map_one(rng)
    return rng.choice(areas)


def part(rng: random.Random) -> tuple[int, int]:
    """Some pages of an area, as address and length in bytes."""
    address, pages = pick(rng)
    first = rng.randrange(pages)
    return address + first * PAGE, rng.randint(1, pages - first) * PAGE


def map_one(rng: random.Random) -> None:
    pages = rng.choice([1, 2, 7, 33, 64])
    flags = DROPPABLE_ANONYMOUS if rng.random() < 0.03 else PRIVATE_ANONYMOUS
    address = LIBC.mmap(None, pages * PAGE, READ_WRITE, flags, -1, 0)
    if address == ctypes.c_void_p(-1).value:  # a kernel without MAP_DROPPABLE
        address = LIBC.mmap(None, pages * PAGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
    areas.append((address, pages))


def map_over(rng: random.Random) -> None:
    address, length = part(rng)
    unguard(address, length)
    LIBC.mmap(
        address, length, READ_WRITE, PRIVATE_ANONYMOUS | mmap.MAP_FIXED if hasattr(mmap, "MAP_FIXED") else 0x32, -1, 0
    )


def write(rng: random.Random) -> None:
    address, length = part(rng)
    for page in range(address, address + length, PAGE):
        if page not in guarded and rng.random() < 0.5:
            kind = rng.random()
            if kind < 0.2:
                ctypes.memset(page, 0, PAGE)
            else:
                ctypes.memset(page + rng.randrange(PAGE - 8), rng.randrange(1, 256), 8)


def read_file_into(rng: random.Random) -> None:
    """Let the kernel do the writing."""
    address, _ = part(rng)
    if address in guarded:
        return
    with Path("/dev/urandom").open("rb", buffering=0) as file:
        file.readinto((ctypes.c_char * 64).from_address(address))


def touch(rng: random.Random) -> None:
    address, length = part(rng)
    for page in range(address, address + length, PAGE):
        if page not in guarded:
            ctypes.string_at(page, 1)


def advise(rng: random.Random) -> None:
    address, length = part(rng)
    LIBC.madvise(address, length, rng.choice([DONTNEED, DONTNEED, FREE]))


def guard(rng: random.Random) -> None:
    address, length = part(rng)
    if rng.random() < 0.5:
        unguard(address, length)
        LIBC.madvise(address, length, GUARD_REMOVE)
    elif LIBC.madvise(address, length, GUARD_INSTALL) == 0:
        guarded.update(range(address, address + length, PAGE))


def unguard(address: int, length: int) -> None:
    guarded.difference_update(range(address, address + length, PAGE))


def unmap(rng: random.Random) -> None:
    address, pages = areas.pop(rng.randrange(len(areas))) if areas else (0, 0)
    if not pages:
        return
    first = rng.randrange(pages)
    count = rng.randint(1, pages - first)
    LIBC.munmap(address + first * PAGE, count * PAGE)
    unguard(address + first * PAGE, count * PAGE)
    if first:
        areas.append((address, first))
    if first + count < pages:
        areas.append((address + (first + count) * PAGE, pages - first - count))


def move(rng: random.Random) -> None:
    address, pages = pick(rng)
    if any(page in guarded for page in range(address, address + pages * PAGE, PAGE)):
        return
    new = rng.choice([max(1, pages // 2), pages, pages + 5])
    flags, hint = MAYMOVE, None
    if rng.random() < 0.5:  # to a place that was something else a moment ago
        hint = LIBC.mmap(None, new * PAGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
        ctypes.memset(hint, 0xEE, PAGE)
        flags |= FIXED
    elif rng.random() < 0.3:
        new, flags = pages, MAYMOVE | DONTUNMAP
    result = LIBC.mremap(address, pages * PAGE, new * PAGE, flags, hint)
    failed = result == ctypes.c_void_p(-1).value  # two areas by now, of which the first may have moved
    if failed and hint:
        LIBC.munmap(hint, new * PAGE)
    if failed or not flags & DONTUNMAP:
        areas.remove((address, pages))
    if not failed:
        areas.append((result, new))


def protect(rng: random.Random) -> None:
    address, length = part(rng)
    LIBC.mprotect(address, length, 0)
    if rng.random() < 0.7:
        LIBC.mprotect(address, length, READ_WRITE)
        return
    for index, (start, pages) in enumerate(areas):  # stays unreadable for good
        if start <= address < start + pages * PAGE:
            del areas[index]
            break


def lock(rng: random.Random) -> None:
    address, length = part(rng)
    if not any(page in guarded for page in range(address, address + length, PAGE)):
        LIBC.mlock(address, length)
        LIBC.munlock(address, length)


def grow_heap(rng: random.Random) -> None:
    old = LIBC.sbrk(rng.randint(1, 20) * PAGE)
    if old != ctypes.c_void_p(-1).value:
        ctypes.memset(old, 7, PAGE)


def huge(rng: random.Random) -> None:
    address_space = LIBC.mmap(None, 2 * HUGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
    address = (address_space + HUGE - 1) // HUGE * HUGE
    LIBC.madvise(address, HUGE, HUGEPAGE)
    if rng.random() < 0.5:
        ctypes.string_at(address, 1)  # the huge zero page
    ctypes.memset(address + rng.randrange(512) * PAGE, 1, 9)
    areas.append((address, 512))


def deep(rng: random.Random) -> None:
    """Grow the stack."""

    def down(levels: int) -> int:
        return 1 + down(levels - 1) if levels else 0

    down(rng.randint(1, 300))


ORDINARY = [
    map_one,
    map_one,
    write,
    write,
    write,
    write,
    read_file_into,
    touch,
    advise,
    advise,
    unmap,
    move,
    protect,
    lock,
]
SELDOM = [grow_heap, deep, map_over, guard, guard, huge]


def step(seed: int, count: int) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        rng.choice(ORDINARY if rng.random() < 0.8 else SELDOM)(rng)


def connect(path: str, what: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    sock.sendall(f"{os.getpid()} {what}\n".encode())
    return sock


def main() -> None:
    path = sys.argv[1]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    sock = connect(path, "new")
    while True:
        line = b""
        while not line.endswith(b"\n"):
            if not (byte := sock.recv(1)):
                os._exit(0)
            line += byte
        verb, *words = line.decode().split(None, 1)
        answer = "ok"
        if verb == "step":
            seed, count = words[0].split()
            step(int(seed), int(count))
        elif verb == "fork":
            child = os.fork()
            if child == 0:
                sock = connect(path, "fork")
                continue
            answer = str(child)
        elif verb == "exec":
            sock.sendall(b"ok\n")
            os.execv(sys.executable, [sys.executable, "-S", "-I", __file__, path])
        elif verb == "exit":
            os._exit(0)
        elif verb == "do":
            answer = repr(eval(words[0], globals()))
        sock.sendall(answer.encode() + b"\n")


if __name__ == "__main__":
    main()
