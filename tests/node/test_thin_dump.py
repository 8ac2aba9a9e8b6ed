"""Dumps that leave private memory where it is, with real CRIU and runc: the images are those of an ordinary dump."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from node_job import Arrival, Job

from podferry.memory.criu_images import PE_LAZY, PE_PRESENT, page_map, tasks
from podferry.memory.ranges import Runs
from podferry.memory.thin_images import complete, is_thin
from podferry.memory.uffd import PAGE
from podferry.node.checkpoint import Hold
from podferry.node.containerd import Containerd
from podferry.node.records import Status
from podferry.node.thin import KERNDAT, TRACKING, View

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


@pytest.fixture(scope="module")
def view() -> View:
    view = View.here()
    assert view is not None, "CRIU of the lab's node takes the changed facts"
    return view


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


def held_thin(job: Job, view: View) -> Hold:
    """As an agent holds it."""
    hold = job.hold_early(thin=view)
    job.cgroup.freeze()
    hold.go_on()
    hold.wait_ready()
    return hold


def images_of(hold: Hold) -> Path:
    return hold.work.parent / "images"


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


def test_the_images_are_those_of_an_ordinary_dump(job: Job, view: View) -> None:
    start(job, STILL)
    job.wait_lines(len(SPEAKERS))
    hold = job.hold()
    assert not is_thin(images_of(hold))
    ordinary = memory_in(images_of(hold))
    hold.rollback()
    hold = held_thin(job, view)
    assert is_thin(images_of(hold))
    complete(images_of(hold), job.family())
    lazy, present = memory_in(images_of(hold))
    assert lazy == ordinary[0]
    assert len(lazy) == 2 and all(runs.size > 1 << 20 for runs in lazy.values())
    assert present == ordinary[1]
    hold.rollback()


def test_all_kinds_of_memory_move_whole(job: Job, client: Containerd, view: View) -> None:
    start(job, ZOO)
    said = wait_all(job)
    arrival = Arrival(job, "thin-target")
    try:
        arrival.poise()
        hold = held_thin(job, view)
        complete(images_of(hold), job.family())
        with arrival.fed(images_of(hold)):
            arrival.incoming.restore()
            assert arrival.created is not None
            pid = arrival.created.result(60)
            assert client.start_task("thin-target") == pid
            assert wait_all(arrival.job) == said
        hold.commit()
        assert client.wait_task(job.id, 20) == 137
        assert wait_all(arrival.job) == said
        again = held_thin(arrival.job, view)
        again.rollback()
        assert wait_all(arrival.job) == said
    finally:
        arrival.close()


@pytest.mark.parametrize("after", ["ready", "restart of the agent", "death of CRIU"])
def test_a_thin_dump_is_rolled_back_as_another(job: Job, view: View, after: str) -> None:
    start(job, ZOO)
    said = wait_all(job)
    hold = held_thin(job, view)
    if "restart" in after:
        hold = Hold.from_dict(hold.to_dict())
    if "death" in after:
        assert hold.criu is not None
        hold.criu.kill()
        assert hold.criu.wait(10)
    hold.rollback()
    assert wait_all(job) == said
    assert job.task.status is Status.RUNNING


def test_a_process_that_the_parent_does_not_know_is_dumped_as_ever(
    job: Job, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one would be that came from nowhere between the claim and CRIU's look."""
    start(job, STILL)
    job.wait_lines(len(SPEAKERS))
    hold = job.hold_early(thin=view)
    assert hold._thin is not None
    claim, first = hold._thin.claim, job.task.pid
    monkeypatch.setattr(hold._thin, "claim", lambda pids: claim(pid for pid in pids if pid != first))
    job.cgroup.freeze()
    hold.go_on()
    hold.wait_ready()
    assert is_thin(images_of(hold))
    complete(images_of(hold), job.family())
    lazy, _ = memory_in(images_of(hold))
    hold.rollback()
    ordinary = job.hold()
    assert lazy == memory_in(images_of(ordinary))[0]
    ordinary.rollback()


def test_where_the_facts_cannot_be_shown_the_dump_is_an_ordinary_one(
    job: Job, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    if view.kerndat is None:
        pytest.skip("this kernel tracks memory: nothing is shown")
    monkeypatch.setattr("podferry.node.thin.KERNDAT", Path("/run/nothing-of-that-name"))
    start(job, STILL)
    job.wait_lines(len(SPEAKERS))
    hold = held_thin(job, replace(view))
    assert not is_thin(images_of(hold))
    complete(images_of(hold), job.family())
    memory_in(images_of(hold))
    hold.rollback()


def test_nobody_else_sees_the_changed_facts(job: Job, view: View) -> None:
    def tracks() -> bool:
        return (
            subprocess.run(["criu", "check", "--feature", TRACKING], check=False, capture_output=True).returncode == 0
        )

    before, facts = tracks(), KERNDAT.read_bytes()
    start(job, STILL)
    job.wait_lines(len(SPEAKERS))
    hold = held_thin(job, view)
    assert tracks() == before
    assert KERNDAT.read_bytes() == facts
    assert "criu.kdat" not in Path("/proc/self/mountinfo").read_text()
    hold.rollback()
    assert KERNDAT.read_bytes() == facts
