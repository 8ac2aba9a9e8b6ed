"""The feeder with real CRIU: a container of several processes that remap, drop and fork while they are being fed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_job import Arrival, Job

from podferry.memory.feeder_status import State, read_status
from podferry.node.containerd import Containerd

pytestmark = pytest.mark.node

PROCESSES = 3
WILD = """
import ctypes, mmap, os, random, sys
PAGES, PAGE, RW = 8192, 4096, mmap.PROT_READ | mmap.PROT_WRITE
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
me = next((n for n in range(PROCESSES - 1) if os.fork() == 0), PROCESSES - 1)
chance = random.Random(me)
BASE = libc.mmap(None, PAGES * PAGE, RW, 0x22, -1, 0)
want = [0] * PAGES

def put(page, version):
    ctypes.memmove(BASE + page * PAGE, version.to_bytes(8, "little") * (PAGE // 8), PAGE)
    want[page] = version

def look(page):
    if ctypes.string_at(BASE + page * PAGE, PAGE) != want[page].to_bytes(8, "little") * (PAGE // 8):
        print("BAD", me, page, flush=True)
        os._exit(1)

for page in range(PAGES):
    put(page, page + 1)
turn = 0
while True:
    turn += 1
    for n in range(30):
        page, count = chance.randrange(PAGES - 64), chance.randint(1, 64)
        start, to = BASE + page * PAGE, chance.randrange(PAGES - 64)
        what = chance.randrange(10)
        if what < 4:
            put(page, chance.getrandbits(60))
        elif what < 7:
            look(page)
        elif what == 7:
            libc.madvise(start, count * PAGE, 4)
            want[page:page + count] = [0] * count
        elif what == 8:
            libc.mmap(start, count * PAGE, RW, 0x32, -1, 0)
            want[page:page + count] = [0] * count
        elif abs(to - page) >= 64:
            if libc.mremap(start, count * PAGE, count * PAGE, 3, BASE + to * PAGE) == BASE + to * PAGE:
                want[to:to + count] = want[page:page + count]
                libc.mmap(start, count * PAGE, RW, 0x32, -1, 0)
                want[page:page + count] = [0] * count
    child = os.fork()
    if child == 0:
        for n in range(200):
            look(chance.randrange(PAGES))
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        os._exit(1)
    print(me, turn, flush=True)
    if turn % 40 == 0:
        for page in range(PAGES):
            look(page)
        print("whole", me, turn, flush=True)
""".replace("PROCESSES", str(PROCESSES))


@pytest.fixture
def client() -> Iterator[Containerd]:
    with Containerd() as client:
        yield client


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
    job.start(WILD)
    job.wait_lines(50)
    arrival = Arrival(job, "feeder-target")
    try:
        arrival.poise()
        hold = job.hold()
        with arrival.fed(hold.work.parent / "images"):
            arrival.incoming.restore()
            assert arrival.created is not None
            arrival.created.result(60)
            client.start_task("feeder-target")
        assert hold.criu is not None
        hold.commit()
        for process in range(PROCESSES):
            while not any(line.startswith(f"whole {process} ") for line in arrival.job.lines()):
                arrival.job.wait_lines(1)
        assert not any("BAD" in line for line in job.lines() + arrival.job.lines())
        status = read_status(job.place / "feeder.json")
        assert (status.state, status.bytes_left, status.error) == (State.DONE, 0, None)
        assert status.bytes_fed > PROCESSES * 20 << 20
        print(status)
    finally:
        arrival.close()
