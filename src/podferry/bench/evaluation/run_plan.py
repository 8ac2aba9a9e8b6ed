"""What an evaluation runs: scenarios along each axis, in rounds, as far as the machine's memory carries them. No I/O.

A round has every step once. So whatever the time is over at, each figure has as many runs as any other, to one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from podferry.bench.goals import MIB
from podferry.bench.moves import Method
from podferry.bench.pulls import Measurement, Pulls
from podferry.bench.runner import ERROR, rotated
from podferry.bench.scenarios import FLOOR, LIVE, POSTCOPY, SCENARIOS, STOP, Scenario
from podferry.bench.twins import Restart, unmoved
from podferry.bench.workload import JobWork, Pattern, Workload
from podferry.lab.network import bits_per_second

Record = dict[str, Any]
Key = tuple[str, str, int]

MEMORY_FACTOR = 2.3
"""A job's memory is there twice while it moves, in the job and in the page store, and the machine needs some itself."""
ROUNDS = 50
UNLIMITED_BITS = 5_000_000_000
FILL_BYTES = 300 << 20
"""How much memory the job fills in a second, in Python."""
CHECK_BYTES = 1 << 30
ALONE_SECONDS = 12.0
"""A run without any memory: starting the job, watching it before and after, removing it."""
IMAGES_SECONDS = 110.0
SECONDS_OF_FILES = 1 / 2500
LAZY_FACTOR = 6.0
"""CRIU's lazy migration of a job that reads everywhere takes several times as long as the link would."""

DIRTY_RATES = (0, 10, 100, 200, 400)
LINKS = ("100mbit", "1gbit", "10gbit", "none")


@dataclass(frozen=True)
class PlannedRun:
    """One run."""

    scenario: Scenario
    method: str
    number: int

    @property
    def key(self) -> Key:
        """By which its record is found in a results file."""
        return self.scenario.name, self.method, self.number

    def estimate(self, done: Sequence[Record] = ()) -> float:
        """Seconds that it takes: as runs of its kind that were `done`, or else by its memory and link."""
        known = [
            one["seconds"] for one in done if (one["scenario"], one["method"]) == self.key[:2] and "seconds" in one
        ]
        return float(median(known)) if known else seconds(self.scenario, self.method)


def seconds(scenario: Scenario, method: str) -> float:
    """How long a run takes about, before there is any to go by."""
    if scenario.workload is None:
        return IMAGES_SECONDS
    if method == FLOOR:
        return 5.0
    job = scenario.workload
    carried = (job.memory + job.upper) * MIB + job.small_files * 4096
    link = carried * 8 / (bits_per_second(scenario.link) or UNLIMITED_BITS)
    moving = 0.0 if method == "restart" else link * (LAZY_FACTOR if method == "criu-lazy" else 1.3)
    starts = 2 if method == "restart" else 1
    own = starts * (job.memory * MIB / FILL_BYTES + job.small_files * SECONDS_OF_FILES) + carried / CHECK_BYTES
    return ALONE_SECONDS + moving + own + job.small_files * SECONDS_OF_FILES


def _with(name: str, about: str, workload: Workload, link: str = "1gbit", most: int = 1000) -> Scenario:
    return Scenario(name, about, workload, {"live": LIVE}, link, most=most)


def _also(name: str, methods: Mapping[str, Method | Measurement | None]) -> Scenario:
    """A scenario that there is, with more methods."""
    one = SCENARIOS[name]
    return replace(one, methods={**one.methods, **methods})


def full() -> list[Scenario]:
    """Every axis: memory, methods, dirty rate, link, pattern, processes, shared memory, files, kinds of work, images."""
    gib = SCENARIOS["downtime"].workload
    assert gib is not None
    return [
        SCENARIOS["small"],
        _with("memory-256", "256 MiB, 50 MB/s written", Workload(256, 50)),
        _also("downtime", {"unmoved": unmoved(gib, "1gbit"), "restart": Restart(), "postcopy": POSTCOPY}),
        *(_with(f"dirty-{rate}", f"512 MiB, {rate} MB/s written", Workload(512, rate)) for rate in DIRTY_RATES),
        *(_with(f"link-{rate}", f"256 MiB, 5 MB/s written, {rate}", Workload(256, 5), rate) for rate in LINKS),
        _with("sequential-512", "512 MiB, written in order", Workload(512, 50, pattern=Pattern.SEQUENTIAL)),
        _with("hot-512", "512 MiB, 64 of them written", Workload(512, 50, pattern=Pattern.HOT, hot=64)),
        _with("processes-1", "512 MiB in one process", Workload(512, 50)),
        _with("processes-8", "512 MiB in 8 processes", Workload(512, 50, processes=8)),
        _with("processes-64", "512 MiB in 64 processes", Workload(512, 50, processes=64)),
        _with("shared-256", "256 MiB of shared memory", Workload(256, 50, shared=True)),
        _with("upper-128", "64 MiB, and 128 MiB of files", Workload(64, 10, upper=128)),
        *(_paired(name, work, pattern) for name, work, pattern in _WORKS),
        _with("large", "4 GiB, 50 MB/s written", Workload(4096, 50), most=3),
        _with("upper-1024", "64 MiB, and 1 GiB of files", Workload(64, 10, upper=1024), most=2),
        _with("small-files", "64 MiB, and 100,000 files of 1 KiB", Workload(64, 10, small_files=100_000), most=2),
        _with("memory-8192", "8 GiB, 50 MB/s written", Workload(8192, 50), most=2),
        replace(SCENARIOS["images"], methods={"overlayfs": Pulls(), "erofs": Pulls("erofs")}, most=2),
    ]


_WORKS = (
    ("work-cpu", JobWork.CPU, Pattern.RANDOM),
    ("work-random", JobWork.RANDOM, Pattern.RANDOM),
    ("work-stream", JobWork.STREAM, Pattern.SEQUENTIAL),
)


def _paired(name: str, work: JobWork, pattern: Pattern) -> Scenario:
    """Moved, and the twin that stays."""
    workload = Workload(1024, 50, work=work, pattern=pattern)
    return Scenario(
        name, f"1 GiB, 50 MB/s written, {work}", workload, {"unmoved": unmoved(workload, "1gbit"), "live": LIVE}
    )


def quick() -> list[Scenario]:
    """What two minutes have room for: the floor, a move and its control."""
    idle, busy = Workload(64, 20), Workload(64, 5, work=JobWork.CPU)
    return [
        Scenario("quick", "64 MiB, 20 MB/s written", idle, {FLOOR: None, "live": LIVE, "stop": STOP}),
        Scenario("quick-cpu", "64 MiB that computes", busy, {"unmoved": unmoved(busy, "1gbit"), "live": LIVE}),
    ]


def needed_bytes(scenario: Scenario) -> float:
    """The memory that the machine must have free."""
    return scenario.workload.memory * MIB * MEMORY_FACTOR if scenario.workload else 0.0


def carried(scenarios: Iterable[Scenario], free_bytes: float) -> tuple[list[Scenario], list[Scenario]]:
    """Those that the machine's memory carries, and those that it does not."""
    there = list(scenarios)
    fits = [one for one in there if needed_bytes(one) <= free_bytes]
    return fits, [one for one in there if one not in fits]


def steps(scenarios: Sequence[Scenario], rounds: int = ROUNDS) -> Iterator[PlannedRun]:
    """Every run, a round after the other; each round begins with another of a scenario's methods."""
    for number in range(1, rounds + 1):
        for scenario in scenarios:
            if number <= scenario.most:
                for name in rotated(list(scenario.methods), number - 1):
                    yield PlannedRun(scenario, name, number)


def done(records: Iterable[Record]) -> set[Key]:
    """What need not be run again: everything but what the benchmark itself could not do."""
    return {_key(one) for one in records if one["outcome"] != ERROR}


def latest(records: Iterable[Record]) -> list[Record]:
    """One record of each run: the last, where it was repeated."""
    return list({_key(one): one for one in records}.values())


def spent(records: Iterable[Record]) -> float:
    """Seconds that the runs of a results file took."""
    return sum(float(one.get("seconds", 0.0)) for one in records)


def _key(record: Record) -> Key:
    return record["scenario"], record["method"], record["run"]
