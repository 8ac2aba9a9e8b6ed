"""Dumps that leave private memory where it is, with real CRIU and runc: the images are those of an ordinary dump."""

from __future__ import annotations

from pathlib import Path

import pytest
from node_job import Arrival, Job

from podferry.core.preflight import GUARDING_CRIU, numbers
from podferry.criu.checkpoint import HeldDump
from podferry.criu.dump_images import PE_LAZY, PE_PRESENT, page_map, tasks
from podferry.criu.memory_skipping import MemorySkippingDump
from podferry.criu.skipped_pages import complete, population
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.kernel.pagemap import reports_guards
from podferry.memory.ranges import Runs
from podferry.node.containerd import Containerd
from podferry.node.records import TaskStatus
from podferry.protos.pagemap_pb2 import MmEntry
from podferry.workload.nodefacts import version

pytestmark = pytest.mark.node

# All kinds of memory; each process prints again and again what its own amounts to.
ZOO = """
import ctypes, hashlib, mmap, os, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
SIZE = 1 << 20
PRIVATE, SHARED, ANONYMOUS, HUGETLB = 2, 1, 0x20, 0x40000
NONE, READ, WRITE = 0, 1, 2

def address(area):
    return ctypes.addressof(ctypes.c_char.from_buffer(area))

def fill(area, seed, step=1):
    for page in range(0, len(area), step * mmap.PAGESIZE):
        area[page : page + 8] = hashlib.sha256(b"%d %d" % (seed, page)).digest()[:8]
    return area

def anonymous(kind=PRIVATE):
    return mmap.mmap(-1, SIZE, flags=kind | ANONYMOUS)

with open("/shared/mapped", "wb") as file:
    file.write(os.urandom(SIZE))
opened = os.open("/shared/mapped", os.O_RDWR)
memfd = os.memfd_create("zoo")
os.ftruncate(memfd, SIZE)
areas = [
    fill(anonymous(), 1),
    fill(anonymous(), 2, step=3),
    anonymous(),
    fill(anonymous(SHARED), 3, step=2),
    fill(mmap.mmap(opened, SIZE, flags=PRIVATE), 4, step=2),
    mmap.mmap(opened, SIZE, flags=SHARED),
    fill(mmap.mmap(memfd, SIZE, flags=SHARED), 5),
    fill(mmap.mmap(memfd, SIZE, flags=PRIVATE), 6, step=5),
]
bytes(areas[2])  # the zero page, again and again
locked = fill(mmap.mmap(-1, 4 * mmap.PAGESIZE, flags=PRIVATE | ANONYMOUS), 7)
libc.mlock(ctypes.c_void_p(address(locked)), ctypes.c_size_t(len(locked)))
transparent = mmap.mmap(-1, 8 * SIZE, flags=PRIVATE | ANONYMOUS)
transparent.madvise(mmap.MADV_HUGEPAGE)
areas += [locked, fill(transparent, 8)]
try:
    areas.append(fill(mmap.mmap(-1, 2 * SIZE, flags=PRIVATE | ANONYMOUS | HUGETLB), 9))
except OSError:
    pass  # no huge pages are set aside
hidden = fill(anonymous(), 10)

def protect(how):
    if libc.mprotect(ctypes.c_void_p(address(hidden)), ctypes.c_size_t(SIZE), how):
        raise OSError(ctypes.get_errno(), "mprotect")

def deep(level, bottom):
    here = bytearray(b"%d" % level) * 50
    below = deep(level - 1, bottom) if level else bottom()
    return below + hashlib.sha256(here).hexdigest()[:2]

def look():
    time.sleep(0.02)
    protect(READ | WRITE)
    whole = hashlib.sha256(b"".join(map(bytes, [*areas, hidden]))).hexdigest()
    protect(NONE)
    return whole

def say(name, work):
    while True:
        os.write(1, b"%s %s\\n" % (name.encode(), hashlib.sha256(work().encode()).hexdigest().encode()))

sys.setrecursionlimit(5000)
threading.stack_size(16 << 20)
if not os.fork():
    fill(areas[1], 11, step=7)  # a part of what was the parent's
    say("child", look)
for number in range(3):
    threading.Thread(target=say, args=(f"deep-{number}", lambda: deep(900, lambda: time.sleep(0.03) or ""))).start()
say("parent", look)
"""
SPEAKERS = {"parent", "child", "deep-0", "deep-1", "deep-2"}
STILL = (
    ZOO.replace("def say(name, work):\n    while True:", "def say(name, work):\n    if True:") + "\ntime.sleep(10000)\n"
)
STILL = STILL.replace('say("child", look)', 'say("child", look)\n    time.sleep(10000)')


def start(job: Job, script: str) -> None:
    """Start it with a directory that its successor has, too."""
    job.start(script, f"--mount=type=bind,src={job.place},dst=/shared,options=rbind:rw")


def wait_all(job: Job) -> dict[str, str]:
    """Wait until every speaker has spoken once more; what each says is always the same."""
    before = len(job.lines())
    for _ in range(100):
        job.wait_lines(1)
        said = [line.split() for line in job.lines() if len(line.split()) == 2]
        if {name for name, _ in said[before:]} >= SPEAKERS:
            break
    assert {name for name, _ in said[before:]} == SPEAKERS
    assert len({tuple(words) for words in said}) == len(SPEAKERS), "memory is what it was"
    return dict(said)


def held_skipping(job: Job, *, guards: bool = False) -> tuple[HeldDump, bool]:
    """As an agent holds it, with its images completed; and whether CRIU has left all memory where it is."""
    held = job.start_dump_early(skipping=True)
    job.cgroup.freeze()
    family = job.family()
    held.go_on(list(family.values()))
    found = {inside: population(pid) for inside, pid in family.items()}
    held.wait_ready()
    return held, complete(images_of(held), found, guards=guards)


def images_of(held: HeldDump) -> Path:
    return held.work.parent / "images"


def memory_in(images: Path) -> tuple[dict[int, Runs], dict[int, dict[int, bytes]]]:
    """What images leave to be fed, and what they have of pages."""
    lazy, present = {}, {}
    for pid in tasks(images):
        pages_id, entries = page_map(images, pid)
        lazy[pid] = Runs((start, end) for start, end, flags in entries if flags & PE_LAZY)
        data = (images / f"pages-{pages_id}.img").read_bytes()
        addresses = [at for start, end, flags in entries if flags & PE_PRESENT for at in range(start, end, PAGE)]
        assert len(data) == len(addresses) * PAGE
        present[pid] = {at: data[PAGE * number : PAGE * (number + 1)] for number, at in enumerate(addresses)}
        assert all(flags in (PE_LAZY, PE_PRESENT) for _, _, flags in entries)
    return lazy, present


def test_the_images_are_those_of_an_ordinary_dump(job: Job) -> None:
    start(job, STILL)
    job.wait_lines(len(SPEAKERS))
    held = job.held()
    ordinary = memory_in(images_of(held))
    held.rollback()
    held, skipping = held_skipping(job)
    assert skipping
    lazy, present = memory_in(images_of(held))
    assert lazy == ordinary[0]
    assert len(lazy) == 2 and all(runs.size > 1 << 20 for runs in lazy.values())
    assert present == ordinary[1]
    held.rollback()


def test_all_kinds_of_memory_move_whole(job: Job, client: Containerd) -> None:
    start(job, ZOO)
    said = wait_all(job)
    arrival = Arrival(job, "thin-target")
    try:
        arrival.make_ready()
        held, skipping = held_skipping(job)
        assert skipping
        with arrival.fed(images_of(held)):
            arrival.incoming.restore()
            assert arrival.created is not None
            pid = arrival.created.result(60)
            assert client.start_task("thin-target") == pid
            assert wait_all(arrival.job) == said
        held.commit()
        assert client.wait_task(job.id, 20) == 137
        assert wait_all(arrival.job) == said
        again, skipping = held_skipping(arrival.job)
        assert skipping
        again.rollback()
        assert wait_all(arrival.job) == said
    finally:
        arrival.close()


@pytest.mark.parametrize("after", ["ready", "restart of the agent", "death of CRIU"])
def test_a_thin_dump_is_rolled_back_as_another(job: Job, after: str) -> None:
    start(job, ZOO)
    said = wait_all(job)
    held, _ = held_skipping(job)
    if "restart" in after:
        held = HeldDump.from_dict(held.to_dict())
    if "death" in after:
        assert held.criu is not None
        held.criu.kill()
        assert held.criu.wait(10)
    held.rollback()
    assert wait_all(job) == said
    assert job.task.status is TaskStatus.RUNNING


@pytest.mark.parametrize("blind", ["one process", "all"])
def test_what_criu_finds_by_itself_makes_no_difference(job: Job, monkeypatch: pytest.MonkeyPatch, blind: str) -> None:
    """As where nothing can be shown, or not for every process."""
    start(job, STILL)
    job.wait_lines(len(SPEAKERS))
    claim, first = MemorySkippingDump.claim, job.task.pid
    monkeypatch.setattr(
        MemorySkippingDump,
        "claim",
        lambda self, pids: claim(self, [pid for pid in pids if blind != "all" and pid != first]),
    )
    held = job.held()  # the first, which leaves a page of code that is the process's own
    ordinary = memory_in(images_of(held))
    held.rollback()
    held, skipping = held_skipping(job)
    assert not skipping
    assert memory_in(images_of(held)) == ordinary
    held.rollback()


def test_nobody_else_sees_what_is_shown(job: Job) -> None:
    start(job, STILL)
    job.wait_lines(len(SPEAKERS))
    held, _ = held_skipping(job)
    assert "pagemap" not in Path("/proc/self/mountinfo").read_text()
    assert population(job.task.pid).held.size > 1 << 20
    held.rollback()
    assert not held.skipping


GUARDED = """
import ctypes, mmap, time
libc = ctypes.CDLL(None, use_errno=True)
area = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area[:] = bytes([1]) * len(area)
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
for page in (3, 4, 9):
    if libc.madvise(ctypes.c_void_p(start + page * mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 102):
        raise OSError(ctypes.get_errno(), "MADV_GUARD_INSTALL")
print("guarded", flush=True)
time.sleep(10000)
"""


def guards_in(images: Path) -> Runs:
    mm = MmEntry.FromString((images / "mm-1.img").read_bytes()[12:])
    return Runs((vma.start, vma.end) for vma in mm.vmas if vma.status & 1 << 16)


def test_guards_are_saved_as_in_an_ordinary_dump(job: Job) -> None:
    if numbers(version("criu")) < GUARDING_CRIU or not reports_guards():
        pytest.skip("CRIU saves guard pages from 4.2 on, where the kernel tells them (6.15)")
    start(job, GUARDED)
    job.wait_lines(1)
    held = job.held()
    ordinary, guards = memory_in(images_of(held)), guards_in(images_of(held))
    held.rollback()
    held, skipping = held_skipping(job, guards=True)
    assert skipping
    assert memory_in(images_of(held)) == ordinary
    assert guards_in(images_of(held)) == guards
    assert guards.size >= 3 * PAGE and len(guards) >= 2
    held.rollback()
