"""The benchmark's job. It runs in a container (`python3 -c`, the standard library alone) and watches itself being moved.

One thread does everything in turn, so that nothing but the machine can hold it up: a unit of work, a look at the clock, the
writes that are due. Times are nanoseconds of unix time, since CRIU restores into a time namespace in which CLOCK_MONOTONIC has not
seen the move. SIGUSR1 asks for a report: gaps, speed, and whether the memory holds what it must.

Memory follows a rule in closed form: write number k goes to page `k * stride % span`, so the number of writes alone tells what
every page must hold, and a page that was lost, stale, torn or swapped with another shows.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import mmap
import os
import random
import select
import signal
import struct
import sys
import threading
import time
from array import array
from pathlib import Path
from typing import Any

PAGE = 4096
POOL = 8 << 20
LEAST_POOL = 1 << 20
VERSION_STEP = (2 << 20) + 64
"""Moves a page's content within the pool at each write: pages of one megabyte never share content, so nothing compresses."""

TICK_NS = 1_000_000
BIN_NS = 20_000_000
GAP_NS = 3_000_000
MOST_GAPS = 300
MOST_DIAGNOSES = 20
CATCH_UP_NS = 20_000_000
READS = 16
"""Random reads in a unit of work: few, since each may be a wait."""
STREAM_PAGES = 16
"""What a streaming job reads in a unit of work."""
SMALL_FILE = 1 << 10
FILES_IN_DIRECTORY = 1000
CHILD_SECONDS = 0.01
"""How long a child sleeps between two writes."""
REPORT = "report-{}.json"


class Memory:
    """`pages` pages of private or shared memory under the rule above; the first `hot` of them are written again and again."""

    def __init__(self, pages: int, hot: int, *, scattered: bool, compressible: bool, shared: bool = False) -> None:
        self.pages, self.span, self.written = pages, hot, 0
        self.stride = _coprime(int(hot * 0.618), hot) if scattered else 1
        self._unstride = pow(self.stride, -1, hot)
        seed = random.Random(1)
        self._size = size = min(
            POOL, max(LEAST_POOL, pages * PAGE // 4)
        )  # one of many processes has little beside its memory
        pool = seed.randbytes(64) * (size // 64) if compressible else seed.randbytes(size)
        self._pool = pool + pool[:PAGE]
        kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        self.data = mmap.mmap(-1, pages * PAGE, flags=kind | mmap.MAP_ANONYMOUS)
        for page in range(pages):
            self._put(page, 0)

    def _put(self, page: int, version: int) -> None:
        start, source = page * PAGE, (page * PAGE + version * VERSION_STEP) % self._size
        self.data[start : start + PAGE] = self._pool[source : source + PAGE]
        struct.pack_into("<II", self.data, start, page, version)

    def write(self, count: int) -> None:
        """The next `count` writes of a page each."""
        for number in range(self.written, self.written + count):
            self._put(number * self.stride % self.span, number // self.span + 1)
        self.written += count

    def damaged(self) -> list[int]:
        """The pages that do not hold what they must."""
        return [page for page in range(self.pages) if not self._holds(page, self._version(page))]

    def diagnosis(self, page: int) -> str:
        """What a damaged page holds instead."""
        content, version = self.data[page * PAGE : (page + 1) * PAGE], self._version(page)
        if not any(content):
            return f"page {page}: zeros instead of version {version}"
        found, found_version = struct.unpack_from("<II", content)
        if found != page:
            return f"page {page}: version {found_version} of page {found} instead of version {version}"
        kind = "whole" if self._holds(page, found_version) else "torn"
        return f"page {page}: {kind} version {found_version} instead of version {version}"

    def _version(self, page: int) -> int:
        """How often the page has been written."""
        rounds, more = divmod(self.written, self.span)
        return 0 if page >= self.span else rounds + (page * self._unstride % self.span < more)

    def _holds(self, page: int, version: int) -> bool:
        start, source = page * PAGE, (page * PAGE + version * VERSION_STEP) % self._size
        content = self.data[start : start + PAGE]
        return (
            content[:8] == struct.pack("<II", page, version) and content[8:] == self._pool[source + 8 : source + PAGE]
        )


class Log:
    """What the job saw of itself: bins of 20 ms, and the longest gaps between two looks at the clock."""

    def __init__(self, now: int) -> None:
        self.bins = array("Q")
        self.gaps: list[tuple[int, int]] = []
        self._last, self._bin_end, self._units = now, now + BIN_NS, 0

    def look(self, now: int) -> None:
        """The job goes on at this moment; if the look before is long ago, that was a gap."""
        if (gap := now - self._last) >= GAP_NS:
            (heapq.heappush if len(self.gaps) < MOST_GAPS else heapq.heappushpop)(self.gaps, (gap, self._last))
        self._last = now

    def done(self, written: int) -> bool:
        """A unit of work is done, as of when it looked at the clock last. True where a bin ended with it."""
        self._units += 1
        if self._last < self._bin_end:
            return False
        self.bins.extend((self._last, self._units, written, time.thread_time_ns(), waited_ns()))
        self._bin_end = self._last + BIN_NS
        return True


class Files:
    """Open files that grow by a line in turn, and what they must hold."""

    def __init__(self, directory: Path, count: int) -> None:
        self._files = [(directory / f"file-{number}").open("w+") for number in range(count)]
        self._lines = 0

    def grow(self) -> None:
        """Append the next line to the next file."""
        if self._files:
            file = self._files[self._lines % len(self._files)]
            file.write(f"{self._lines}\n")
            file.flush()
            self._lines += 1

    def damaged(self) -> list[int]:
        """The files that do not hold their lines."""
        count, found = len(self._files), []
        for number, file in enumerate(self._files):
            file.seek(0)
            if file.read() != "".join(f"{line}\n" for line in range(number, self._lines, count)):
                found.append(number)
            file.seek(0, os.SEEK_END)
        return found


class UpperFiles:
    """What the job writes to its root before it begins: one file of `size` bytes, `count` small ones. They stay as they are."""

    def __init__(self, directory: Path, size: int, count: int) -> None:
        self._expected: dict[Path, str] = {}
        pool = random.Random(2).randbytes(1 << 20)
        if size:
            digest = hashlib.blake2b()
            with (directory / "large").open("wb") as file:
                for start in range(0, size, len(pool)):
                    piece = start.to_bytes(8, "little") + pool[8 : size - start]
                    file.write(piece)
                    digest.update(piece)
            self._expected[directory / "large"] = digest.hexdigest()
        self._directory, self._count = directory, count
        for number in range(count):
            path = self._small(number)
            if number % FILES_IN_DIRECTORY == 0:
                path.parent.mkdir()
            path.write_bytes(number.to_bytes(SMALL_FILE, "little"))

    def _small(self, number: int) -> Path:
        return self._directory / f"small-{number // FILES_IN_DIRECTORY}" / str(number)

    def damaged(self) -> list[int]:
        """The files that do not hold what they must: numbers of small ones, and one more than these for the large one."""
        found = [number for number in range(self._count) if not self._holds(number)]
        for path, digest in self._expected.items():
            try:
                with path.open("rb") as file:
                    same = hashlib.file_digest(file, "blake2b").hexdigest() == digest
            except OSError:
                same = False
            found += [] if same else [self._count]
        return found

    def _holds(self, number: int) -> bool:
        try:
            return self._small(number).read_bytes() == number.to_bytes(SMALL_FILE, "little")
        except OSError:
            return False


class Children:
    """Processes beside the first one. Each has memory of its own under the same rule and writes its part of what is written."""

    def __init__(self, count: int, settings: dict[str, Any]) -> None:
        self._links: list[tuple[int, int]] = []
        for _ in range(count):
            asked, ask = os.pipe()
            answers, answer = os.pipe()
            if os.fork() == 0:
                for descriptor in (ask, answers, *(one for link in self._links for one in link)):
                    os.close(descriptor)
                try:
                    _serve(asked, answer, settings)
                finally:
                    os._exit(0)
            os.close(asked)
            os.close(answer)
            self._links.append((ask, answers))
            os.read(answers, 4)  # its memory is filled

    def damaged(self) -> int:
        """How many of their pages do not hold what they must; all of a process that does not answer count as one."""
        found = 0
        for ask, answers in self._links:
            try:
                os.write(ask, b"?")
                found += int.from_bytes(os.read(answers, 4) or b"\1", "little")
            except OSError:
                found += 1
        return found


def _serve(asked: int, answer: int, settings: dict[str, Any]) -> None:
    """A child's life: write what is due, and check the memory when asked; it ends with the first process."""
    memory, since, owed = _memory(settings), time.monotonic(), 0.0
    os.write(answer, bytes(4))
    questions = select.poll()
    questions.register(asked, select.POLLIN)
    while True:
        if questions.poll(CHILD_SECONDS * 1000):
            if not os.read(asked, 1):
                return
            os.write(answer, len(memory.damaged()).to_bytes(4, "little"))
            since = time.monotonic()
        now = time.monotonic()
        owed += min(now - since, CATCH_UP_NS / 1e9) * settings["bytes_per_second"] / PAGE
        since = now
        memory.write(int(owed))
        owed -= int(owed)


def _memory(settings: dict[str, Any]) -> Memory:
    """One process's part of the memory."""
    pages = max(settings["pages"], 1)
    return Memory(
        pages,
        settings["hot_pages"] or pages,
        scattered=settings["scattered"],
        compressible=settings["compressible"],
        shared=settings["shared"],
    )


class Work:
    """What a unit of work is: waiting for the next millisecond, computing, or reading memory here and there or from end to end."""

    def __init__(self, kind: str, memory: Memory) -> None:
        units = {"tick": self._tick, "cpu": self._cpu, "random": self._random, "stream": self._stream}
        self.unit = units[kind]
        self._memory = memory
        self._block = bytes(1 << 16)
        self._at = 0

    def _tick(self) -> None:
        time.sleep((TICK_NS - time.time_ns() % TICK_NS) / 1e9)

    def _cpu(self) -> None:
        hashlib.sha256(self._block).digest()

    def _random(self) -> None:
        data, pages, at, total = self._memory.data, self._memory.pages, self._at, 0
        for _ in range(READS):
            at = (at * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF  # Knuth's MMIX generator
            total += data[(at >> 33) % pages * PAGE]
        self._at = at

    def _stream(self) -> None:
        pages = self._memory.pages
        start = self._at
        self._block = self._memory.data[start * PAGE : (start + STREAM_PAGES) * PAGE]  # a copy, so all of it is read
        self._at = start + STREAM_PAGES if start + STREAM_PAGES < pages else 0


def waited_ns() -> int:
    """How long this thread has waited for a processor (Documentation/scheduler/sched-stats.rst); 0 where nobody counts."""
    try:
        descriptor = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    except OSError:
        return 0
    try:
        return int(os.read(descriptor, 100).split()[1])
    finally:
        os.close(descriptor)


def _coprime(near: int, span: int) -> int:
    """The first number from `near` on that visits every page of `span` before it comes back."""
    number = max(near, 1)
    while math.gcd(number, span) != 1:
        number += 1
    return number


def publish(directory: Path, name: str, value: dict[str, Any]) -> None:
    """Write a report that is whole as soon as it is there."""
    new = directory / f"{name}.new"
    new.write_text(json.dumps(value))
    new.rename(directory / name)


def share(settings: dict[str, Any], processes: int) -> dict[str, Any]:
    """What one of `processes` does of the whole."""
    parts = {key: settings[key] // processes for key in ("pages", "hot_pages")}
    return {**settings, **parts, "bytes_per_second": settings["bytes_per_second"] / processes}


def main(settings: dict[str, Any]) -> None:
    """Run for ever."""
    directory = Path(settings["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    asked: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
    settings = share(settings, settings["processes"])
    children = Children(settings["processes"] - 1, settings)
    for _ in range(settings["threads"] - 1):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    memory = _memory(settings)
    upper = UpperFiles(directory, settings["upper_bytes"], settings["small_files"])
    files, unit = Files(directory, settings["files"]), Work(settings["work"], memory).unit
    pages_per_ns = settings["bytes_per_second"] / PAGE / 1e9
    publish(directory, REPORT.format(0), {"pid": os.getpid()})
    began = time.time_ns()
    log, reports, since, owed = Log(began), 0, began, 0.0
    while True:
        unit()
        now = time.time_ns()
        log.look(now)
        if log.done(memory.written):
            files.grow()
        owed += min(now - since, CATCH_UP_NS) * pages_per_ns
        since = now
        while owed >= 1:
            memory.write(1)
            log.look(time.time_ns())  # each page may be a wait of its own
            owed -= 1
        if asked:
            asked.clear()
            reports += 1
            bins, gaps = list(log.bins), sorted((start, start + gap) for gap, start in log.gaps)
            damaged = memory.damaged()
            in_children = children.damaged()
            report = {
                "bins": bins,
                "gaps": gaps,
                "written": memory.written,
                "damaged": damaged + [memory.pages + number for number in range(in_children)],
                "diagnoses": [memory.diagnosis(page) for page in damaged[:MOST_DIAGNOSES]],
                "damaged_files": files.damaged() + upper.damaged(),
            }
            publish(directory, REPORT.format(reports), report)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
