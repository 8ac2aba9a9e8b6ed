"""What a benchmark's job does, and what it said of itself afterwards."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

from podferry.bench import load
from podferry.errors import Failed

DIRECTORY = "var/tmp/bench"
"""Where the job keeps its files and reports, below its root."""

BIN_FIELDS = 5


class Pattern(StrEnum):
    """Which page is written next: the next one, one far away, or one of a few."""

    SEQUENTIAL = "sequential"
    RANDOM = "random"
    HOT = "hot"


class JobWork(StrEnum):
    """What the job does beside writing: look at the clock every millisecond, compute, or read memory here and there or in order."""

    TICK = "tick"
    CPU = "cpu"
    RANDOM = "random"
    STREAM = "stream"


@dataclass(frozen=True)
class Workload:
    """A job. `memory` in MiB, of it `hot` written with the hot pattern; `dirty` in MB (10^6 bytes) a second.

    `processes` share memory and writes evenly. `upper` MiB in one file and `small_files` of 1 KiB are written before it begins.
    """

    memory: int
    dirty: float = 0.0
    pattern: Pattern = Pattern.RANDOM
    hot: int = 0
    work: JobWork = JobWork.TICK
    threads: int = 1
    files: int = 0
    compressible: bool = False
    processes: int = 1
    shared: bool = False
    upper: int = 0
    small_files: int = 0

    def argv(self) -> list[str]:
        """The command that runs it in a container."""
        pages = (self.memory << 20) // load.PAGE
        settings = {
            "directory": f"/{DIRECTORY}",
            "pages": pages,
            "hot_pages": (self.hot << 20) // load.PAGE if self.pattern is Pattern.HOT else pages,
            "scattered": self.pattern is not Pattern.SEQUENTIAL,
            "bytes_per_second": self.dirty * 1e6,
            "work": str(self.work),
            "threads": self.threads,
            "files": self.files,
            "compressible": self.compressible,
            "processes": self.processes,
            "shared": self.shared,
            "upper_bytes": self.upper << 20,
            "small_files": self.small_files,
        }
        return ["python3", "-c", inspect.getsource(load), json.dumps(settings)]

    def to_dict(self) -> dict[str, Any]:
        """The job as a record carries it."""
        return asdict(self)


@dataclass(frozen=True)
class Bin:
    """20 ms and more of the job's life: when it began and ended (ns), what was done in it, and on how much processor."""

    start: int
    end: int
    units: int
    written: int
    cpu: int
    waited: int


@dataclass(frozen=True)
class Speed:
    """Units of work a second: by the clock, and by the processor time that the job was given."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Report:
    """What the job saw. `gaps` are (start, end) in ns, in order; `damaged` lists pages, `damaged_files` files, and `diagnoses`
    says what the first of the pages hold instead."""

    bins: tuple[Bin, ...]
    gaps: tuple[tuple[int, int], ...]
    written: int
    damaged: tuple[int, ...]
    damaged_files: tuple[int, ...]
    diagnoses: tuple[str, ...]

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Report:
        """Decode what the job published. Raises `Failed` where it is no report."""
        try:
            rows = list(zip(*[iter(data["bins"])] * BIN_FIELDS, strict=True))
            return Report(
                bins=tuple(_bin(before, row) for before, row in pairwise(rows)),
                gaps=tuple((int(start), int(end)) for start, end in data["gaps"]),
                written=int(data["written"]),
                damaged=tuple(data["damaged"]),
                damaged_files=tuple(data["damaged_files"]),
                diagnoses=tuple(data["diagnoses"]),
            )
        except (KeyError, TypeError, ValueError) as wrong:
            raise Failed.because("the job's report cannot be read", wrong) from wrong

    def gap_at(self, moment: int) -> tuple[int, int] | None:
        """The gap that `moment` (ns) falls into; `None` where the job went on through it."""
        return next(((start, end) for start, end in self.gaps if start <= moment <= end), None)

    def longest_gaps(self, start: int, end: int) -> list[int]:
        """The gaps (ns) of 3 ms or more that begin from `start` to `end`, longest first."""
        return sorted((stop - begin for begin, stop in self.gaps if start <= begin <= end), reverse=True)

    def speed(self, start: int, end: int) -> Speed | None:
        """How fast the job was from `start` to `end` (ns); `None` where no whole bin lies there."""
        bins = [one for one in self.bins if start <= one.start and one.end <= end]
        units, wall = sum(one.units for one in bins), sum(one.end - one.start for one in bins)
        cpu = sum(one.cpu for one in bins)
        return Speed(units * 1e9 / wall, units * 1e9 / max(cpu, 1)) if bins else None

    def written_between(self, start: int, end: int) -> int:
        """How many bytes the job wrote from `start` to `end` (ns), to the bin."""
        return sum(one.written for one in self.bins if start < one.end and one.start < end) * load.PAGE


def _bin(before: tuple[int, ...], row: tuple[int, ...]) -> Bin:
    # A restored thread counts its processor time from nothing again.
    cpu, waited = (now - then if now >= then else now for then, now in zip(before[3:], row[3:], strict=True))
    return Bin(before[0], row[0], row[1] - before[1], row[2] - before[2], cpu, waited)
