"""The lazy-pages daemon with real CRIU: a container of several processes that remap, drop and fork while they are being fed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_job import Arrival, Job

from podferry.lazypages.daemon_status import DaemonState, read_status
from podferry.memory.kernel.page_size import PAGE
from podferry.node.containerd import Containerd

pytestmark = pytest.mark.node

PROCESSES = 3
CALM = 5120
"""Pages of each process that are only looked at: these at least are fed, however late the freeze and the first look come."""
WILD = """
import ctypes, faulthandler, mmap, os, random
faulthandler.enable()
PAGES, PAGE, RW = 8192, 4096, mmap.PROT_READ | mmap.PROT_WRITE
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
me = next((n for n in range(PROCESSES - 1) if os.fork() == 0), PROCESSES - 1)
chance = random.Random(f"{me} ATTEMPT")
BASE = libc.mmap(None, (PAGES + CALM) * PAGE, RW, 0x22, -1, 0)
want = [0] * (PAGES + CALM)

def say(*words):
    # In one piece: the processes share the pipe.
    os.write(1, (" ".join(map(str, (me, *words))) + "\\n").encode())

def put(page, version):
    ctypes.memmove(BASE + page * PAGE, version.to_bytes(8, "little") * (PAGE // 8), PAGE)
    want[page] = version

def look(page):
    if ctypes.string_at(BASE + page * PAGE, PAGE) != want[page].to_bytes(8, "little") * (PAGE // 8):
        say("BAD", page, ctypes.string_at(BASE + page * PAGE, 8).hex(), "is not", want[page])
        os._exit(1)

def renew(page, count):
    libc.mmap(BASE + page * PAGE, count * PAGE, RW, 0x32, -1, 0)
    want[page:page + count] = [0] * count

def move(page, count, to):
    start, there = BASE + page * PAGE, BASE + to * PAGE
    count = min(count, (limit(start) - start) // PAGE)
    moved = want[page:page + count]
    if libc.mremap(start, count * PAGE, count * PAGE, 3, there) != there:
        say("BAD", "mremap", os.strerror(ctypes.get_errno()))
        os._exit(1)
    renew(page, count)
    want[to:to + count] = moved

def limit(address):
    # Where its area ends. What was mapped anew is no part of a neighbour that is still being fed, and one mremap of several
    # areas of which any has a userfaultfd fails, having moved those before it (Linux 6.17; none, before).
    # The kernel makes /proc/self/maps anew as it is read: a move between two reads would give one table's head and another's end.
    text = None
    while text != (text := open("/proc/self/maps").read()):
        pass
    for line in text.splitlines():
        start, end = (int(part, 16) for part in line.split(None, 1)[0].split("-"))
        if start <= address < end:
            return end

for page in range(PAGES + CALM):
    put(page, page + 1)
say("is", os.getpid())
turn = 0
while True:
    turn += 1
    for n in range(30):
        page, count, to = chance.randrange(PAGES - 64), chance.randint(1, 64), chance.randrange(PAGES - 64)
        what = chance.randrange(10)
        if what < 4:
            put(page, chance.getrandbits(60))
        elif what < 7:
            look(page)
        elif what == 7:
            libc.madvise(BASE + page * PAGE, count * PAGE, 4)
            want[page:page + count] = [0] * count
        elif what == 8:
            renew(page, count)
        elif abs(to - page) >= 64:
            move(page, count, to)
    child = os.fork()
    if child == 0:
        for n in range(200):
            look(chance.randrange(PAGES + CALM))
        os._exit(0)
    if how := os.waitpid(child, 0)[1]:
        say("BAD", "child", how)
        os._exit(1)
    say("turn", turn)
    if turn % 40 == 0:
        for page in range(PAGES + CALM):
            look(page)
        say("whole", turn)
""".replace("PROCESSES", str(PROCESSES)).replace("CALM", str(CALM))


@pytest.fixture
def job(client: Containerd) -> Iterator[Job]:
    place = Path("/run/feeder-tests")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    job = Job(client, "feeder-source", place)
    job.remove()
    yield job
    job.remove()
    shutil.rmtree(place)


@pytest.mark.parametrize("attempt", range(3))
def test_processes_that_turn_their_memory_over_are_fed_rightly(job: Job, client: Containerd, attempt: int) -> None:
    job.start(WILD.replace("ATTEMPT", str(attempt)))
    job.wait_lines(50)
    arrival = Arrival(job, "feeder-target")
    try:
        with arrival.telling():
            arrival.make_ready()
            hold = job.held()
            with arrival.fed(hold.work.parent / "images"):
                arrival.incoming.restore()
                assert arrival.created is not None
                arrival.created.result(60)
                client.start_task("feeder-target")
            assert hold.criu is not None
            hold.commit()
            here, names = arrival.job.family(), (line.split() for line in job.lines() if " is " in line)
            arrival.job.wait_reported("whole", {name: here[int(pid)] for name, _, pid in names})
            assert not any("BAD" in line for line in job.lines())
            status = read_status(job.place / "feeder.json")
            assert (status.state, status.bytes_left, status.error) == (DaemonState.DONE, 0, None)
            assert status.bytes_fed > PROCESSES * CALM * PAGE
            print(status)
    finally:
        arrival.close()
