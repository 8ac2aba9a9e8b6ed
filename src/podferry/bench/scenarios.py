"""What is measured: jobs, and the ways in which each is moved in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from podferry.bench.moves import Method, Podferry
from podferry.bench.pulls import Crowd, Measurement, Pulls
from podferry.bench.runc import Runc
from podferry.bench.twins import Restart, unmoved
from podferry.bench.workload import JobWork, Pattern, Workload
from podferry.errors import UsageError

FLOOR = "floor"
"""The method that moves nothing: what runc and CRIU need for an idle `sleep` that stays where it is."""

LIVE, STOP, POSTCOPY = Podferry("live"), Podferry("stop"), Podferry("postcopy")
CRIU, CRIU_LAZY = Runc(), Runc(lazy=True)


@dataclass(frozen=True)
class Scenario:
    """A job, the methods that move it (`None` for the floor), and the rate of the link; or what is measured without a job.

    `most` is how often it is run at most, however many repetitions are asked for: where runs differ little, or only how they end
    counts.
    """

    name: str
    about: str
    workload: Workload | None
    methods: Mapping[str, Method | Measurement | None]
    link: str = "1gbit"
    nodes: int = 2
    most: int = 1000


def lost(name: str, about: str, workload: Workload, link: str = "1gbit") -> Scenario:
    """A scenario of lost work: moved, stopped and copied, begun again, and the twin that stays as the control."""
    return Scenario(
        name,
        about,
        workload,
        {"unmoved": unmoved(workload, link), "live": LIVE, "stop": STOP, "restart": Restart()},
        link,
    )


SCENARIOS = {
    one.name: one
    for one in (
        Scenario(
            "downtime",
            "1 GiB, 50 MB/s written: podferry beside everything there was before",
            Workload(1024, 50),
            {FLOOR: None, "live": LIVE, "stop": STOP, "criu": CRIU, "criu-lazy": CRIU_LAZY},
        ),
        Scenario("small", "64 MiB, 50 MB/s written", Workload(64, 50), {"live": LIVE}),
        Scenario("large", "4 GiB, 50 MB/s written", Workload(4096, 50), {"live": LIVE}),
        Scenario("stop-256", "256 MiB, moved in mode stop", Workload(256, 50), {FLOOR: None, "stop": STOP}),
        Scenario("stop-1024", "1 GiB, moved in mode stop", Workload(1024, 50), {FLOOR: None, "stop": STOP}),
        Scenario("cpu", "512 MiB that computes", Workload(512, 10, work=JobWork.CPU), {"live": LIVE}),
        Scenario("random", "1 GiB read here and there", Workload(1024, 0, work=JobWork.RANDOM), {"live": LIVE}),
        lost("lost-tick", "lost work: 1 GiB, 50 MB/s written, looks at the clock", Workload(1024, 50)),
        lost("lost-cpu", "lost work: 1 GiB, 50 MB/s written, computes", Workload(1024, 50, work=JobWork.CPU)),
        lost(
            "lost-random",
            "lost work: 1 GiB, 50 MB/s written, reads here and there",
            Workload(1024, 50, work=JobWork.RANDOM),
        ),
        lost(
            "lost-stream",
            "lost work: 1 GiB, read and written (50 MB/s) from end to end",
            Workload(1024, 50, pattern=Pattern.SEQUENTIAL, work=JobWork.STREAM),
        ),
        Scenario(
            "drain",
            "1 GiB: memory of the agents, of the lazy-pages daemon and of the page store",
            Workload(1024, 50),
            {"live": Podferry("live", watch=True)},
            most=3,
        ),
        Scenario(
            "storm",
            "256 MiB, 400 MB/s written, faster than the link",
            Workload(256, 400),
            {
                "throttle": LIVE,
                "postcopy-allowed": Podferry("live", {"allow_throttle": False, "allow_postcopy": True}),
                "neither": Podferry("live", {"allow_throttle": False}),
            },
            most=3,
        ),
        Scenario(
            "postcopy", "1 GiB, 50 MB/s written, fetched after the resume", Workload(1024, 50), {"postcopy": POSTCOPY}
        ),
        Scenario(
            "hot",
            "1 GiB of which 64 MiB are written at 200 MB/s",
            Workload(1024, 200, pattern=Pattern.HOT, hot=64),
            {"live": LIVE},
        ),
        Scenario(
            "shared",
            "256 MiB of shared memory, 50 MB/s written: copied while the job runs, or while it stands still",
            Workload(256, 50, shared=True),
            {"live": LIVE, "stop": STOP},
        ),
        Scenario(
            "sequential",
            "1 GiB written from end to end at 50 MB/s",
            Workload(1024, 50, pattern=Pattern.SEQUENTIAL),
            {"live": LIVE},
        ),
        Scenario(
            "compressible",
            "1 GiB that compresses well, 50 MB/s written",
            Workload(1024, 50, compressible=True),
            {"live": LIVE},
        ),
        Scenario(
            "many",
            "256 MiB, 50 threads and 20 open files that grow",
            Workload(256, 20, threads=50, files=20),
            {"live": LIVE},
        ),
        Scenario(
            "images",
            "an image of 500 MB: the first node's pull, the second node's start, and imports from it",
            None,
            {"overlayfs": Pulls(), "erofs": Pulls("erofs"), "dir": Pulls("dir")},
        ),
        Scenario(
            "crowd",
            "the same image, asked for by ten nodes at once",
            None,
            {"erofs": Crowd("erofs"), "dir": Crowd("dir")},
            nodes=10,
        ),
        Scenario(
            "smoke",
            "32 MiB: whether the benchmark itself works",
            Workload(32, 5),
            {FLOOR: None, "live": LIVE, "criu": CRIU},
        ),
    )
}


def chosen(names: list[str]) -> list[Scenario]:
    """The scenarios of these names. Raises `UsageError` for one that there is not."""
    for name in names:
        if name not in SCENARIOS:
            raise UsageError(f"there is no scenario {name!r}", remedy=f"there are {', '.join(SCENARIOS)}")
    return [SCENARIOS[name] for name in names]


def restricted(scenarios: list[Scenario], methods: list[str]) -> list[Scenario]:
    """The scenarios with these of their methods alone; without names, as they are.

    Raises `UsageError` for a method that none of them has, and where a scenario would be left with none.
    """
    there = {name for scenario in scenarios for name in scenario.methods}
    if unknown := set(methods) - there:
        raise UsageError(
            f"there is no method {min(unknown)!r} in these scenarios", remedy=f"there are {', '.join(sorted(there))}"
        )
    if not methods:
        return scenarios
    kept = [
        replace(one, methods={name: method for name, method in one.methods.items() if name in methods})
        for one in scenarios
    ]
    if empty := [one.name for one in kept if not one.methods]:
        raise UsageError(
            f"no method is left of scenario {empty[0]!r}", remedy="name one of its methods, or leave it out"
        )
    return kept
