"""Memory that processes share, or that is mapped in an unusual way. Put after counting.py."""

# ruff: noqa: F821, PTH123, PTH108, SIM115
import array
import ctypes
import mmap
import os
import struct
import sys
import threading
import time
from multiprocessing import shared_memory

PAGE = mmap.PAGESIZE
libc.shmat.restype = ctypes.c_void_p


def written_on(memory, pages, peer=None):
    """Each step writes one page and reads another back; `peer` sees the same memory by another mapping."""
    model = dict.fromkeys(range(pages), 0)

    def step(number):
        page = number * 7919 % pages
        memory[page * PAGE : page * PAGE + 8] = number.to_bytes(8, "big")
        model[page] = number
        other = number * 104729 % pages
        for view in (memory, *([peer] if peer is not None else [])):
            if int.from_bytes(view[other * PAGE : other * PAGE + 8], "big") != model[other]:
                bad("page", other, "is another")

    count(step)


def answered(memory):
    """A child doubles what the parent leaves in the first words of memory that both have."""
    words = memoryview(memory).cast("Q")
    if os.fork() == 0:
        while True:
            if words[1] != words[0]:
                words[2] = words[0] * 2
                words[1] = words[0]
            time.sleep(0.001)

    def step(number):
        words[0] = number + 1
        deadline = time.monotonic() + 20
        while words[1] != number + 1:
            if time.monotonic() > deadline:
                bad("the other process answers no more")
            time.sleep(0.001)
        if words[2] != 2 * (number + 1):
            bad("another answer", words[2])

    count(step)


@situation
def memfd_shared():
    fd = os.memfd_create("shared")
    os.ftruncate(fd, 1024 * PAGE)
    written_on(mmap.mmap(fd, 1024 * PAGE), 1024, mmap.mmap(fd, 1024 * PAGE))


@situation
def memfd_private():
    """A private mapping of a memfd: what is written stays with the process."""
    fd = os.memfd_create("private")
    os.write(fd, bytes(256 * PAGE))
    written_on(mmap.mmap(fd, 256 * PAGE, flags=mmap.MAP_PRIVATE), 256)


@situation
def memfd_with_a_child():
    fd = os.memfd_create("family")
    os.ftruncate(fd, PAGE)
    answered(mmap.mmap(fd, PAGE))


@situation
def memfd_without_a_mapping():
    """Read and written by its descriptor alone."""
    fd = os.memfd_create("unmapped")
    os.ftruncate(fd, 64 * PAGE)

    def step(number):
        os.pwrite(fd, number.to_bytes(8, "big"), number % 64 * PAGE)
        if number > 5 and int.from_bytes(os.pread(fd, 8, (number - 5) % 64 * PAGE), "big") != number - 5:
            bad("another word")

    count(step)


@situation
def anonymous_with_a_child():
    answered(mmap.mmap(-1, PAGE))


@situation
def anonymous_over_three_generations():
    memory = mmap.mmap(-1, PAGE)
    if os.fork() == 0:
        if os.fork() == 0:
            answered(memory)
        time.sleep(1e6)
    time.sleep(1e6)


@situation
def sysv_shared_memory():
    id = call("shmget", 0x51, 64 * PAGE, 0o1600)
    address = libc.shmat(id, None, 0)
    written_on(memoryview((ctypes.c_char * (64 * PAGE)).from_address(address)).cast("B"), 64)


@situation
def sysv_shared_memory_marked_to_go():
    """Removed while it is attached: it lives as long as it is."""
    id = call("shmget", 0, 16 * PAGE, 0o1600)
    address = libc.shmat(id, None, 0)
    call("shmctl", id, 0, None)  # IPC_RMID
    written_on(memoryview((ctypes.c_char * (16 * PAGE)).from_address(address)).cast("B"), 16)


@situation
def sysv_semaphores():
    id = call("semget", 0x52, 3, 0o1600)

    def operate(amount):
        operation = struct.pack("hhh", 1, amount, 0)
        call("semop", id, operation, 1)

    def step(number):
        operate(2)
        operate(-1)
        if (value := libc.semctl(id, 1, 12)) != number + 1:  # GETVAL
            bad("the semaphore is", value)

    count(lambda number: step(number) if number < 30000 else None)


@situation
def sysv_messages():
    id = call("msgget", 0x53, 0o1600)
    for number in range(3):
        call("msgsnd", id, struct.pack("lQ", 1, number), 8, 0)

    def step(number):
        buffer = ctypes.create_string_buffer(16)
        call("msgrcv", id, buffer, 8, 0, 0)
        if struct.unpack("lQ", buffer.raw)[1] != number:
            bad("another message")
        call("msgsnd", id, struct.pack("lQ", 1, number + 3), 8, 0)

    count(step)


@situation
def posix_shared_memory():
    one = shared_memory.SharedMemory(create=True, size=64 * PAGE, name="posix")
    other = shared_memory.SharedMemory(name="posix")
    written_on(one.buf, 64, other.buf)


@situation
def posix_shared_memory_unlinked():
    one = shared_memory.SharedMemory(create=True, size=16 * PAGE, name="gone")
    one.unlink()
    written_on(one.buf, 16)


@situation
def file_of_tmpfs_mapped():
    with open("/dev/shm/mapped", "w+b") as file:
        file.truncate(64 * PAGE)
        written_on(mmap.mmap(file.fileno(), 64 * PAGE), 64)


@situation
def file_mapped_shared():
    with open("/tmp/mapped", "w+b") as file:
        file.truncate(64 * PAGE)
        written_on(mmap.mmap(file.fileno(), 64 * PAGE), 64)


@situation
def file_mapped_and_unlinked():
    with open("/tmp/gone", "w+b") as file:
        file.truncate(16 * PAGE)
        memory = mmap.mmap(file.fileno(), 16 * PAGE)
    os.unlink("/tmp/gone")
    written_on(memory, 16)


@situation
def file_mapped_beyond_its_end():
    """The mapping is longer than the file, which has been cut since."""
    with open("/tmp/cut", "w+b") as file:
        file.truncate(16 * PAGE)
        memory = mmap.mmap(file.fileno(), 16 * PAGE)
        file.truncate(4 * PAGE)
    written_on(memory, 4)


@situation
def a_terabyte_reserved():
    reserved = mmap.mmap(-1, 1 << 40, flags=mmap.MAP_PRIVATE | 0x4000, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    for page in range(64):
        reserved[page << 33] = page

    def step(number):
        if reserved[number % 64 << 33] != number % 64:
            bad("another byte")

    count(step)


@situation
def thousands_of_private_areas():
    """More than 10,000 mappings, every other one without access."""
    areas = [mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(6000)]
    for number, area in enumerate(areas):
        area[0] = number % 250
        libc.mprotect(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(area)) + PAGE), PAGE, 0)

    def step(number):
        if areas[number % 6000][0] != number % 6000 % 250:
            bad("another area")

    count(step)


@situation
def memory_that_grows_and_goes():
    held = []

    def step(number):
        held.append(array.array("Q", [number]) * 50_000)
        if len(held) > 40:
            first = held.pop(0)
            if set(first[::4999]) != {number - 40}:
                bad("another array")

    count(step)


@situation
def deep_stack():
    sys.setrecursionlimit(30_000)
    threading.stack_size(256 << 20)

    def descend(depth):
        here = depth * 3
        if depth == 0:
            count(nothing)
        descend(depth - 1)
        if here != depth * 3:
            bad("the stack")

    thread = threading.Thread(target=descend, args=(20_000,), daemon=True)
    thread.start()
    thread.join()


@situation
def memory_not_inherited():
    """MADV_DONTFORK: a child has a hole there; and it is still so after a move."""
    area = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_DONTFORK)
    area[0] = 42
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))

    def step(number):
        if area[0] != 42:
            bad("another byte")
        if number % 20:
            return
        if (child := os.fork()) == 0:
            here = any(
                int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
                for line in open("/proc/self/maps")
            )
            os._exit(1 if here else 0)
        if os.waitpid(child, 0)[1]:
            bad("a child has inherited it")

    count(step)


@situation
def code_made_at_run_time():
    """A page is written, made executable and called, as just-in-time compilers do."""
    if os.uname().machine != "x86_64":
        count(nothing)
    area = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
    area.write(b"\x8d\x47\x01\xc3")  # lea eax, [rdi + 1]; ret
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(area)))

    def step(number):
        if function(number) != number + 1:
            bad("another sum")

    count(step)


@situation
def memory_moved_to_another_place():
    """mremap: the tracker has seen it elsewhere."""
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    size = 64 * PAGE
    here = libc.mmap(None, ctypes.c_size_t(size), 3, 0x22, -1, ctypes.c_long(0))

    def step(number):
        nonlocal here, size
        for page in range(64):
            if number and ctypes.c_uint64.from_address(here + page * PAGE).value != number - 1 + page:
                bad("page", page, "is another")
            ctypes.c_uint64.from_address(here + page * PAGE).value = number + page
        if number % 10 == 9:
            other = 64 * PAGE * (1 + number // 10 % 3)
            here = libc.mremap(ctypes.c_void_p(here), ctypes.c_size_t(size), ctypes.c_size_t(other), 1)
            size = other

    count(step)


SITUATIONS[sys.argv[1]]()
