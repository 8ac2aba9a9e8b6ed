"""What trackers do with single kinds of memory and of processes. Needs root and a kernel, no CRIU."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_trackers import KIND, Copy, needs_tracker
from trackers_zoo import Job, Zoo, wait_gone

from podferry.memory.kernel import uffd
from podferry.memory.kernel.maps import locked_bytes, private_anonymous, read_areas
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.kernel.pagemap import open_pagemap, read_entries
from podferry.memory.kernel.reader import Data, Gone, Piece, Reader, Zero
from podferry.memory.ranges import Runs
from podferry.memory.tracking.injector import Injector
from podferry.memory.tracking.tracker import AddressSpaceRound, Tracker, TrackerKind, choose, no_pause, probe
from podferry.memory.tracking.trackers import create
from podferry.memory.tracking.userfaultfd_owner import share_memory

FACTS = probe()
HUGE = 2 << 20

pytestmark = [pytest.mark.node, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
needs_uffd = pytest.mark.skipif(
    choose(FACTS).kind is not TrackerKind.UFFD, reason=f"no uffd tracker here: {choose(FACTS).reason}"
)


@pytest.fixture(scope="module")
def shared_zoo() -> Iterator[Zoo]:
    with tempfile.TemporaryDirectory() as directory, contextlib.closing(Zoo(Path(directory) / "zoo")) as made:
        yield made


@pytest.fixture
def zoo(shared_zoo: Zoo) -> Iterator[Zoo]:
    yield shared_zoo
    shared_zoo.clear()


@pytest.fixture
def follow(zoo: Zoo) -> Iterator[Callable[[], Tracker]]:
    """Makes trackers of all jobs in the zoo, of the kind that this kernel allows."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(contextlib.closing(create(KIND, lambda: list(zoo.jobs), pause=zoo.paused)))


def anonymous(job: Job, pages: int, flags: str = "PRIVATE_ANONYMOUS") -> Runs:
    """Have a job map memory, between guard pages, and return where."""
    start = int(job.do(f"LIBC.mmap(None, {(pages + 2) * PAGE}, 0, PRIVATE_ANONYMOUS, -1, 0)")) + PAGE
    job.do(f"LIBC.mmap({start}, {pages * PAGE}, READ_WRITE, {flags} | 0x10, -1, 0)")
    return Runs.of(start, start + pages * PAGE)


def fill(job: Job, where: Runs, byte: int = 1) -> None:
    for start, end in where:
        job.do(f"ctypes.memset({start}, {byte}, {end - start})")


def one(tracker: Tracker, job: Job) -> AddressSpaceRound:
    return tracker.collect().address_spaces[job.pid]


def finally_(tracker: Tracker, zoo: Zoo, job: Job) -> AddressSpaceRound:
    zoo.freeze()
    return tracker.final().address_spaces[job.pid]


@needs_tracker
def test_writes_are_seen_once_and_page_by_page(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job, tracker = zoo.fork(), follow()
    where = anonymous(job, 64)
    fill(job, where)
    first = one(tracker, job)
    assert first.fresh
    assert not first.untracked
    assert (first.stopped > 0) == (KIND is TrackerKind.UFFD)
    assert first.written & where == where
    assert not one(tracker, job).written & where
    wanted = Runs([(where.start + 3 * PAGE, where.start + 4 * PAGE), (where.end - 2 * PAGE, where.end)])
    fill(job, wanted, 2)
    second = one(tracker, job)
    assert second.written & where == wanted
    assert not second.fresh
    assert second.stopped == 0


@needs_tracker
def test_memory_only_read_or_never_touched_costs_nothing(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job, tracker = zoo.fork(), follow()
    where = anonymous(job, 64)
    job.do(f"ctypes.string_at({where.start}, {where.size // 2}).count(1)")
    assert not one(tracker, job).written & where


@needs_tracker
def test_memory_given_back_is_dropped(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job, tracker = zoo.fork(), follow()
    where = anonymous(job, 16)
    fill(job, where)
    one(tracker, job)
    given = where.clip(where.start + 2 * PAGE, where.start + 5 * PAGE)
    job.do(f"LIBC.madvise({given.start}, {given.size}, DONTNEED)")
    assert one(tracker, job).dropped & where == given
    again = given.clip(given.start, given.start + PAGE)
    fill(job, again)
    seen = one(tracker, job)
    assert seen.written & where == again
    assert not seen.dropped & where
    job.do(f"LIBC.munmap({where.start}, {where.size})")
    assert one(tracker, job).dropped & where == where - (given - again)


@needs_tracker
def test_memory_given_back_that_is_read_again_is_dropped(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    """It is there at either look, and was not written; what it held is gone."""
    job, tracker = zoo.fork(), follow()
    where = anonymous(job, 3 * HUGE // PAGE)
    job.do(f"LIBC.madvise({where.start}, {where.size}, HUGEPAGE)")
    fill(job, where)
    one(tracker, job)
    job.do(f"LIBC.madvise({where.start}, {where.size}, DONTNEED)")
    job.do(f"ctypes.string_at({where.start}, {where.size}).count(1)")
    seen = one(tracker, job)
    assert seen.dropped & where == where
    assert not seen.written & where


@needs_tracker
def test_a_fork_is_seen_whole(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    """Its pages are its parent's, which nobody has written since the final scan; it comes in a round, or with the freeze."""
    job, tracker, copy = zoo.fork(), follow(), Copy()
    where = anonymous(job, 16)
    fill(job, where)
    copy.apply(tracker.collect())
    child = zoo.fork(job)
    copy.apply(tracker.collect())
    late = zoo.fork(job)
    zoo.freeze()
    copy.apply(tracker.final(dropped=False))
    for pid in (job.pid, child.pid, late.pid):
        copy.check(pid)


def move_over(job: Job, tracker: Tracker, where: Runs, there: Runs) -> None:
    """Move memory over other memory, both known to the tracker, and see that it says so."""
    fill(job, where)
    fill(job, there, 9)
    one(tracker, job)
    job.do(f"LIBC.mremap({where.start}, {where.size}, {where.size}, MAYMOVE | FIXED, {there.start})")
    seen = one(tracker, job)
    assert seen.dropped & where == where
    assert seen.written & there == there


@needs_tracker
def test_moved_memory_is_written_there_and_dropped_here(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job, tracker = zoo.fork(), follow()
    where, there = anonymous(job, 8), anonymous(job, 8)
    move_over(job, tracker, where, there)
    fill(job, there.clip(there.start, there.start + PAGE))
    assert one(tracker, job).written & there == Runs.of(there.start, there.start + PAGE)


@needs_tracker
def test_memory_moved_by_whole_page_tables_is_written_where_other_memory_was(
    zoo: Zoo, follow: Callable[[], Tracker]
) -> None:
    job, tracker = zoo.fork(), follow()
    address_spaces = [anonymous(job, 3 * HUGE // PAGE) for _ in range(2)]
    starts = [(address_space.start + HUGE - 1) // HUGE * HUGE for address_space in address_spaces]
    for start in starts:
        job.do(f"LIBC.madvise({start}, {HUGE}, 15)")  # MADV_NOHUGEPAGE
    where, there = (Runs.of(start, start + HUGE) for start in starts)
    move_over(job, tracker, where, there)


@needs_tracker
def test_exec_forgets_the_old_program(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job, tracker = zoo.fork(), follow()
    where = anonymous(job, 16)
    fill(job, where)
    one(tracker, job)
    job = zoo.exec(job)
    seen = one(tracker, job)
    assert seen.fresh
    assert seen.dropped & where == where
    assert seen.written
    assert not seen.written & where


@needs_uffd
def test_droppable_memory_comes_with_the_freeze(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job, tracker = zoo.fork(), follow()
    where = anonymous(job, 4, "DROPPABLE_ANONYMOUS")
    fill(job, where)
    if not read_entries(open_pagemap(job.pid), where).present:
        pytest.skip("this kernel has no MAP_DROPPABLE")
    for _ in range(2):
        seen = one(tracker, job)
        assert seen.deferred & where == where
        assert not seen.written & where
        assert not seen.foreign_uffd
    last = finally_(tracker, zoo, job)
    assert last.written & where == where
    assert not last.deferred


@needs_uffd
def test_a_process_with_a_userfaultfd_of_its_own_is_reported(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job, tracker = zoo.fork(), follow()
    number = 323 if os.uname().machine == "x86_64" else 282
    assert int(job.do(f"LIBC.syscall({number}, 1)")) >= 0
    where = anonymous(job, 4)
    fill(job, where)
    for _ in range(2):
        seen = one(tracker, job)
        assert seen.foreign_uffd
        assert seen.untracked
        assert seen.written & where == where


@needs_uffd
def test_an_area_of_another_userfaultfd_is_deferred(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job, tracker = zoo.fork(), follow()
    where = anonymous(job, 4)
    fill(job, where)
    with Injector() as injector:
        other = injector.open_userfaultfd(job.pid).uffd
    uffd.api(other)
    uffd.register(other, where.start, where.size, uffd.RegisterMode.MISSING)
    seen = one(tracker, job)
    assert seen.foreign_uffd
    assert seen.deferred & where == where
    assert not seen.untracked
    os.close(other)
    seen = one(tracker, job)
    assert not seen.foreign_uffd
    assert seen.written & where == where


@needs_uffd
def test_two_trackers_do_not_take_each_others_writes(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job, early, late = zoo.fork(), follow(), follow()
    where = anonymous(job, 4)
    fill(job, where)
    assert one(early, job).written & where == where
    seen = one(late, job)
    assert seen.untracked
    assert seen.foreign_uffd
    assert seen.written & where == where
    fill(job, where)
    one(late, job)
    assert one(early, job).written & where == where
    early.close()
    seen = one(late, job)
    assert not seen.untracked
    assert not seen.foreign_uffd
    assert seen.written & where == where
    assert not one(late, job).written & where


@needs_tracker
def test_locked_memory_is_tracked_and_told(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job, tracker = zoo.fork(), follow()
    where = anonymous(job, 8)
    assert locked_bytes(job.pid) == 0
    assert job.do(f"LIBC.mlock({where.start}, {where.size})") == "0"
    fill(job, where)
    assert locked_bytes(job.pid) == where.size
    assert one(tracker, job).written & where == where
    assert not one(tracker, job).written & where
    flagged = [area for area in read_areas(job.pid, flags=True) if area.start == where.start]
    assert [area.precopied for area in flagged] == [False]


@needs_tracker
def test_guards_are_not_copied(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job, tracker = zoo.fork(), follow()
    where = anonymous(job, 8)
    fill(job, where)
    one(tracker, job)
    guarded = where.clip(where.start + PAGE, where.start + 3 * PAGE)
    if job.do(f"LIBC.madvise({guarded.start}, {guarded.size}, GUARD_INSTALL)") != "0":
        pytest.skip("this kernel has no guard regions")
    seen = one(tracker, job)
    assert not seen.written & where
    assert seen.dropped & where == guarded
    with Reader(job.pid) as reader:
        pieces = list(reader.read(where))
    assert Runs((piece.start, piece.end) for piece in pieces if isinstance(piece, Gone)) == guarded


@needs_tracker
def test_a_growing_stack_and_heap_are_followed(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job, tracker, copy = zoo.fork(), follow(), Copy()
    for levels in (1, 200, 100, 280):
        job.do(f"(deep(random.Random({levels})), grow_heap(random.Random({levels})))")
        copy.apply(tracker.collect())
    job.do("grow_heap(random.Random(9))")
    zoo.freeze()
    copy.apply(tracker.final())
    copy.check(job.pid)


@needs_tracker
def test_huge_pages_are_followed_page_by_page(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job, tracker = zoo.fork(), follow()
    whole = anonymous(job, 3 * HUGE // PAGE)
    where = Runs.of((whole.start + HUGE - 1) // HUGE * HUGE, (whole.start + HUGE - 1) // HUGE * HUGE + HUGE)
    job.do(f"LIBC.madvise({where.start}, {HUGE}, HUGEPAGE)")
    fill(job, where)
    assert one(tracker, job).written & where == where
    assert not one(tracker, job).written & where
    wanted = where.clip(where.start + 100 * PAGE, where.start + 101 * PAGE)
    fill(job, wanted, 5)
    seen = one(tracker, job).written & where
    assert seen == wanted or (KIND is TrackerKind.SOFT_DIRTY and seen == where)  # a huge page has one soft-dirty bit
    job.do(f"LIBC.madvise({where.start}, {HUGE}, DONTNEED)")
    assert one(tracker, job).dropped & where == where


@needs_tracker
def test_the_kernels_writes_count(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job, tracker = zoo.fork(), follow()
    where = anonymous(job, 4)
    fill(job, where)
    one(tracker, job)
    job.do(f"Path('/dev/zero').open('rb', buffering=0).readinto((ctypes.c_char * 9).from_address({where.start}))")
    assert one(tracker, job).written & where == Runs.of(where.start, where.start + PAGE)


@needs_tracker
def test_with_direct_io_open_everything_is_reported_twice(
    zoo: Zoo, follow: Callable[[], Tracker], tmp_path: Path
) -> None:
    job, tracker = zoo.fork(), follow()
    where = anonymous(job, 4)
    fill(job, where)
    (tmp_path / "file").write_bytes(bytes(PAGE))
    descriptor = int(job.do(f"os.open({str(tmp_path / 'file')!r}, os.O_RDONLY | os.O_DIRECT)"))
    seen = [one(tracker, job).written & where for _ in range(3)]
    assert seen == [where, where, Runs()]
    fill(job, where)
    assert one(tracker, job).written & where == where
    job.do(f"os.close({descriptor})")
    assert finally_(tracker, zoo, job).written & where == where
    os.kill(job.pid, signal.SIGCONT)


@needs_tracker
def test_after_a_rollback_tracking_goes_on(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job, tracker, copy = zoo.fork(), follow(), Copy()
    for seed in range(6):
        job.ask(f"step {seed} 30")
        copy.apply(tracker.collect())
        job.ask(f"step {seed + 100} 20")
        zoo.freeze()
        copy.apply(tracker.final())
        copy.check(job.pid)
        os.kill(job.pid, signal.SIGCONT)


@needs_tracker
def test_the_quick_last_look_misses_nothing_written(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    """Pages that vanished stay in the copy then: which pages exist, the dump itself says."""
    job, tracker, copy = zoo.fork(), follow(), Copy()
    for seed in range(8):
        job.ask(f"step {seed} 40")
        copy.apply(tracker.collect(dropped=seed % 3 == 0))
        job.ask(f"step {seed + 50} 10")
        zoo.freeze()
        last = tracker.final(dropped=False)
        assert not last.address_spaces[job.pid].dropped
        copy.apply(last)
        with contextlib.closing(create(TrackerKind.NONE, lambda: [job.pid])) as eyes:
            there = eyes.final().address_spaces[job.pid].written
        kept = {page: data for page, data in copy.pages[job.pid].items() if page in there}
        exact = Copy()
        exact.pages[job.pid] = kept
        exact.check(job.pid)
        os.kill(job.pid, signal.SIGCONT)


@needs_tracker
def test_shared_address_spaces_are_copied_once(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    job = zoo.fork()
    child = int(
        job.do(
            "LIBC.clone(LIBC.pause, ctypes.c_void_p(LIBC.mmap(None, 65536, READ_WRITE, 0x22, -1, 0) + 65536), 0x111, None)"
        )
    )
    assert share_memory(job.pid, child)
    assert not share_memory(job.pid, os.getpid())
    pids = [child, job.pid]
    with contextlib.closing(create(KIND, lambda: pids, pause=zoo.paused)) as tracker:
        seen = tracker.collect()
        assert len(seen.address_spaces) == 1
        assert seen.shared in ({child: job.pid}, {job.pid: child})
        assert not next(iter(seen.address_spaces.values())).untracked
        os.kill(child, signal.SIGKILL)
        pids.remove(child)
        seen = tracker.collect()
        assert set(seen.address_spaces) == {job.pid}
        assert not seen.shared
        assert not seen.address_spaces[job.pid].foreign_uffd
        where = anonymous(job, 4)
        fill(job, where)
        assert one(tracker, job).written & where == where
        assert not one(tracker, job).written & where


@needs_tracker
def test_200_processes_come_and_go(zoo: Zoo, follow: Callable[[], Tracker]) -> None:
    tracker, copy = follow(), Copy()
    for _ in range(200):
        zoo.fork()
    seen = tracker.collect()
    assert seen.new == set(zoo.jobs)
    assert not any(address_space.untracked for address_space in seen.address_spaces.values())
    copy.apply(seen)
    leaving = list(zoo.jobs.values())[::2]
    for job in leaving:
        zoo.exit(job)
    for number, job in enumerate(zoo.jobs.values()):
        job.ask(f"step {number} 5")
    wait_gone(job.pid for job in leaving)
    seen = tracker.collect()
    assert seen.gone == {job.pid for job in leaving}
    copy.apply(seen)
    zoo.freeze()
    copy.apply(tracker.final())
    for pid in list(zoo.jobs)[::10]:
        copy.check(pid)


@needs_tracker
def test_a_zombie_has_no_memory(follow: Callable[[], Tracker]) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with contextlib.closing(create(KIND, lambda: [child, 2], pause=no_pause)) as tracker:
        seen = tracker.collect()
    os.waitpid(child, 0)
    assert not seen.address_spaces
    assert not seen.gone


@needs_uffd
def test_closing_leaves_nothing_behind(zoo: Zoo) -> None:
    job = zoo.fork()
    before = {fd.name for fd in Path("/proc/self/fd").iterdir()}
    tracker = create(TrackerKind.UFFD, lambda: list(zoo.jobs))
    tracker.collect()
    assert any("uw" in area.flags for area in read_areas(job.pid, flags=True))
    tracker.close()
    assert not any("uw" in area.flags for area in read_areas(job.pid, flags=True))
    assert {fd.name for fd in Path("/proc/self/fd").iterdir()} == before


def test_without_tracking_all_memory_is_written_every_time(zoo: Zoo) -> None:
    job, copy = zoo.fork(), Copy()
    job.ask("step 5 60")
    zoo.freeze()
    with contextlib.closing(create(TrackerKind.NONE, lambda: list(zoo.jobs))) as tracker:
        for _ in range(2):
            seen = tracker.final()
            copy.apply(seen)
            copy.check(job.pid)
            assert seen.address_spaces[job.pid].untracked
        assert seen.written >= 100 * PAGE


def test_the_reader_tells_every_page_once(zoo: Zoo) -> None:
    """Data, zeroes, unreadable and unmapped pages, in runs larger and smaller than the buffer."""
    job = zoo.fork()
    where = anonymous(job, 40)
    fill(job, where, 7)
    page = [where.start + number * PAGE for number in range(40)]
    job.do(f"ctypes.memset({page[3]}, 0, {2 * PAGE})")
    job.do(f"LIBC.mprotect({page[10]}, {4 * PAGE}, 0)")
    job.do(f"LIBC.munmap({page[20]}, {5 * PAGE})")
    job.do(f"LIBC.madvise({page[30]}, {PAGE}, DONTNEED)")
    wanted = Runs([(page[0], page[1]), (page[2], page[18]), (page[19], page[22]), (page[23], page[39])])
    with Reader(job.pid, piece=4 * PAGE) as reader:
        seen = [copied(piece) for piece in reader.read(wanted)]
    told = [span for span, _ in seen]
    assert Runs(told) == wanted
    assert told == sorted(told)
    assert sum(end - start for start, end in told) == wanted.size
    assert spans_of(seen, Gone) == wanted & Runs.of(page[20], page[25])
    assert spans_of(seen, Zero) == Runs([(page[3], page[5]), (page[30], page[31])])
    assert all(piece == b"\7" * (end - start) for (start, end), piece in seen if isinstance(piece, bytes))


def test_reading_a_process_that_ends_is_no_error(zoo: Zoo) -> None:
    job = zoo.fork()
    areas = Runs((area.start, area.end) for area in private_anonymous(read_areas(job.pid)))
    with Reader(job.pid) as reader:
        zoo.exit(job)
        wait_gone([job.pid])
        assert Runs((piece.start, piece.end) for piece in reader.read(areas) if isinstance(piece, Gone)) == areas


def copied(piece: Piece) -> tuple[tuple[int, int], bytes | type]:
    if isinstance(piece, Data):
        return (piece.address, piece.address + len(piece.memory)), piece.memory.tobytes()
    return (piece.start, piece.end), type(piece)


def spans_of(seen: list[tuple[tuple[int, int], bytes | type]], kind: type) -> Runs:
    return Runs(span for span, what in seen if what is kind)
