"""Disasters in every phase of a migration: afterwards the job runs once, the record says what happened, and nothing is left.

The phases are those of the transition table. For each disaster one migration is held at the door of each phase, at the same
time; then it strikes all of them at once. `make test` has a tenth of all disasters and modes, chosen by the seed that it prints
(PODFERRY_SEED, otherwise the day); the marker `slow` has the others.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import faults
import pytest
from chance import SEED
from moving import A, B, Cluster, Record, Witness, other, until

from podferry.cli.agent_client import AgentUnreachable
from podferry.core.phases import SOURCE_ENDS, SOURCE_MAY_RUN, TARGET_ENDS, SourcePhase, TargetPhase
from podferry.lab import Lab
from podferry.model import Mode

pytestmark = pytest.mark.lab
S, T = SourcePhase, TargetPhase
Phase = SourcePhase | TargetPhase
MEBIBYTES = "8"
MINUTE = 60_000.0
STALLED = 20.0


@dataclass(frozen=True)
class Door:
    """The door of a phase, in front of which an agent can be held, in a move of some mode."""

    phase: Phase
    mode: Mode

    @property
    def role(self) -> str:
        return "source" if isinstance(self.phase, SourcePhase) else "target"

    @property
    def name(self) -> str:
        """The door's, and the job's that is held there."""
        return f"{self.mode}-{self.role}-{self.phase}"

    def gate(self, phase: Phase | None = None) -> str:
        """The name of the gate there, or at another phase for the same job."""
        return f"{Door(phase or self.phase, self.mode).role}-{phase or self.phase}-{self.name}"


PHASES = [phase for phase in (*S, *T) if phase not in SOURCE_ENDS | TARGET_ENDS]
RUNS_THERE: list[Phase] = [S.SERVE, S.COMMIT, S.DRAIN, T.FILL]
"""Behind these doors the job has been started on the target."""
HELD: list[Phase] = [S.RESUME, S.LOST, S.SERVE, S.COMMIT, S.UNDO, T.READY, T.RESUME, T.GIVING_UP]
"""At these doors CRIU holds the frozen original."""
POISED: list[Phase] = [S.CUTOVER, S.RESUME, S.LOST, S.UNDO, T.PREPARED, T.READY, T.RESUME, T.GIVING_UP, *RUNS_THERE]
"""At these doors the target's shim is there."""


@dataclass(frozen=True)
class Disaster:
    """Something terrible. `strike` brings it about, `aid` ends it; `doors` are those at which there is something to strike."""

    name: str
    strike: Callable[[Cluster], object]
    aid: Callable[[Cluster], object] = lambda cluster: None
    phases: list[Phase] = field(default_factory=lambda: list(PHASES))
    cuts: bool = False
    stalls: bool = False
    """It may keep a migration from its end for as long as it lasts."""

    def marks(self, mode: Mode) -> list[pytest.MarkDecorator]:
        """What takes too long for every run is run by the marker `slow`."""
        return [] if (self.name, mode) in CHOSEN else [pytest.mark.slow]

    def doors(self, mode: Mode) -> list[Door]:
        """Where it strikes in moves of one mode. Only in post-copy is there memory to serve: that move joins the live ones."""
        doors = [Door(phase, mode) for phase in self.phases if phase is not S.SERVE]
        return doors + [Door(S.SERVE, Mode.POSTCOPY)] * (mode is Mode.LIVE and S.SERVE in self.phases)


def kill_shims(cluster: Cluster) -> None:
    """Kill them, and see them gone: who looks for a job then finds none."""
    doomed = [one for one in cluster.processes(B) if one.name.startswith("shim ")]
    for one in doomed:
        cluster.kill(B, one.name)
    until(lambda: not any(Path(f"/proc/{one.pid}").exists() for one in doomed), "the shims are gone")


def mend(cluster: Cluster) -> None:
    """Mend the link, and wait for what goes over it: a share that was away for long answers with errors, until its client has
    found the server again, and then neither a job on it nor its dump can read the image."""
    cluster.lab.mend(B)
    asked = ["sh", "-c", "ls /share >/dev/null && ! stat /share/there-is-no-such-thing 2>&1 | grep -v 'No such file'"]
    until(lambda: cluster.lab.exec(B, asked, check=False).returncode == 0, f"the share answers on {B}")


def full(name: str, node: str, where: str) -> Disaster:
    """A file system of `node` has no room for a while."""
    return Disaster(
        name,
        lambda cluster: faults.fill_up(cluster, node, where),
        lambda cluster: faults.make_room(cluster, node, where),
        stalls=True,
    )


def no_jump(cluster: Cluster) -> None:
    """The clocks jump to where they would be."""
    faults.jump(cluster, node_a=0.0, node_b=0.0)


DISASTERS = [
    Disaster("source agent killed", lambda cluster: cluster.kill(A, "agent")),
    Disaster("target agent killed", lambda cluster: cluster.kill(B, "agent")),
    Disaster("both agents killed", lambda cluster: (cluster.kill(A, "agent", again=False), cluster.kill(B, "agent"))),
    Disaster("holding CRIU killed", lambda cluster: cluster.kill(A, "criu"), phases=HELD),
    Disaster("target's shim killed", kill_shims, phases=POISED),
    Disaster("link cut", lambda cluster: cluster.lab.cut(B), mend, cuts=True),
    full("source's journals have no room", A, faults.JOURNALS),
    full("target's journals have no room", B, faults.JOURNALS),
    full("source's run has no room", A, faults.PAGES),
    full("target's run has no room", B, faults.PAGES),
    Disaster("clocks jump ahead", lambda cluster: faults.jump(cluster, node_a=86400.0, node_b=3600.0), no_jump),
    Disaster("clocks jump back", lambda cluster: faults.jump(cluster, node_a=-3600.0, node_b=-86400.0), no_jump),
    Disaster("clocks part", lambda cluster: faults.jump(cluster, node_a=-86400.0, node_b=86400.0), no_jump),
]
ALL = [(disaster.name, mode) for disaster in DISASTERS for mode in Mode]
CHOSEN = random.Random(SEED).sample(ALL, math.ceil(len(ALL) / 10))
CASES = [
    pytest.param(disaster, mode, door, marks=disaster.marks(mode), id=f"{disaster.name.replace(' ', '-')}-{door.name}")
    for disaster in DISASTERS
    for mode in Mode
    for door in disaster.doors(mode)
]


class Aftermath:
    """What one disaster left of the migrations that were held at `doors`."""

    def __init__(self, cluster: Cluster, disaster: Disaster, doors: list[Door]) -> None:
        self.cluster, self.disaster = cluster, disaster
        self.failures: dict[str, Exception] = {}
        self.records: dict[str, Record] = {}
        self._witness = Witness(cluster, *(door.name for door in doors))
        try:
            with self._witness:
                self._try(lambda door: cluster.start(door.name, "simple", MEBIBYTES), doors)
                # To be lost is to have had one's agent killed: that comes before the others begin.
                self._try(lambda door: hold(cluster, door), [door for door in doors if door.phase is S.LOST])
                self._try(lambda door: hold(cluster, door), [door for door in doors if door.phase is not S.LOST])
                disaster.strike(cluster)
                cluster.open_breakpoints()
                if disaster.cuts:
                    self._try(self._rest, doors)
                if disaster.stalls:
                    self._wait_a_while(doors)
                disaster.aid(cluster)
                self._try(self._decide, [door for door in doors if self.needs_a_person(door)])
                self._try(self._see_the_end, doors)
                self._look_around(doors)
                self._try(self._move_again, doors)
        finally:
            cluster.open_breakpoints()
            disaster.aid(cluster)
            for door in doors:
                cluster.stop(door.name)

    def _try(self, step: Callable[[Door], object], doors: list[Door]) -> None:
        """Take a step at every door that has not failed, four at once; a failure is its door's."""

        def attempt(door: Door) -> None:
            try:
                step(door)
            except Exception as failure:  # noqa: BLE001 - raised by the test whose it is
                failure.add_note(self.cluster.said())
                self.failures[door.name] = failure

        with ThreadPoolExecutor(4) as four:
            list(four.map(attempt, [door for door in doors if door.name not in self.failures]))

    def _rest(self, door: Door) -> None:
        """Without contact a migration comes to its end, or to rest: frozen on the source until it hears from the target."""

        def rests() -> bool:
            record = self.cluster.record(A, door.name)
            return bool(record["outcome"]) or record["phase"] == S.LOST

        until(rests, f"{door.name} rests")
        if self.cluster.record(A, door.name)["phase"] == S.LOST:
            assert f"frozen {door.name}" in self.cluster.traces(A)
        elif door.phase in SOURCE_MAY_RUN:
            self.cluster.goes_on(A, door.name)

    def _wait_a_while(self, doors: list[Door]) -> None:
        """Until all have ended, or for so long that each has met the fault."""

        def over() -> bool:
            records = {one["name"]: one["outcome"] for one in self.cluster.records(A)}
            return time.monotonic() > until_then or all(records.get(door.name) for door in doors)

        until_then = time.monotonic() + STALLED
        until(over, "a while passes")

    def _see_the_end(self, door: Door) -> None:
        cluster, name = self.cluster, door.name
        self.records[name] = cluster.ended(A, name)
        if any(one["name"] == name for one in cluster.records(B)):
            cluster.ended(B, name)
        if self._survives(door):
            cluster.goes_on(self._home(door), name)
        if not self.needs_a_person(door):  # who may take it back to where it was frozen
            self._witness.testify(name)

    def needs_a_person(self, door: Door) -> bool:
        """A job that dies on the target before it has all its memory can only go on where it was frozen, if that is wanted."""
        short = door.mode is Mode.POSTCOPY and door.phase in (S.SERVE, T.FILL)
        return short and self.disaster.strike is kill_shims

    def _decide(self, door: Door) -> None:
        cluster, name = self.cluster, door.name
        until(lambda: "died" in cluster.record(A, name)["reason"], f"{name} says what happened")
        record = cluster.record(A, name)
        assert record["phase"] == S.LOST
        assert record["outcome"] is None
        assert "podferry resolve" in record["reason"]
        assert f"frozen {name}" in cluster.traces(A)
        until(lambda: f"running {name}" not in cluster.traces(B), f"nothing of {name} runs on {B}")
        with suppress(AgentUnreachable):
            cluster.agent(A).call("resolve", id=record["id"], run_on=A)

    def _look_around(self, doors: list[Door]) -> None:
        """What is left behind where, that no job accounts for. One that died where its move had ended left what any job does."""
        known = [door for door in doors if door.name in self.records]
        alive = [door for door in known if self._survives(door)]
        homes = {node: [door.name for door in alive if self._home(door) == node] for node in (A, B)}
        dead = [door.name for door in known if door not in alive and self._home(door) == B]
        try:
            self.cluster.nothing_but(homes, dead={B: dead}, besides=list(self.failures))
        except AssertionError as left:
            self.failures["surplus"] = left

    def _move_again(self, door: Door) -> None:
        if self._survives(door):
            here = self._home(door)
            again = self.cluster.migrate(door.name, source=here)
            assert again["outcome"] == "completed", again
            self.cluster.goes_on(other(here), door.name)

    def _home(self, door: Door) -> str:
        return B if self.records[door.name]["outcome"] == "completed" else A

    def _survives(self, door: Door) -> bool:
        """A container whose shim is killed is killed by containerd, whether it was moved or not."""
        killed = self.disaster.strike is kill_shims and door.phase in RUNS_THERE
        return not killed or self.needs_a_person(door)


def hold(cluster: Cluster, door: Door) -> None:
    """Begin to move the door's job, and hold it there. Some doors are only reached by way of others."""
    way: dict[Phase, list[Phase]] = {S.LOST: [S.RESUME], S.UNDO: [T.READY], T.GIVING_UP: [T.READY, S.UNDO]}
    *before, gate = [door.gate(phase) for phase in (*way.get(door.phase, []), door.phase)]
    for one in (*before, gate):
        cluster.close_breakpoint(one)
    move = cluster.begin(door.name, source=A, mode=door.mode, max_downtime_ms=MINUTE)  # however busy the machine is
    if door.phase is S.LOST:
        cluster.reached(before[0], move)
        cluster.kill(A, "agent")
        return cluster.reached(gate)
    for passed in before:
        cluster.reached(passed, move)
        if passed is before[0]:
            cluster.cancel(A, door.name)
    if door.phase is S.UNDO:
        return cluster.reached(gate, move)
    for passed in before:
        cluster.open_breakpoints(passed)
    return cluster.reached(gate, move)


@pytest.fixture(scope="module")
def cluster(lab: Lab) -> Iterator[Cluster]:
    cluster = Cluster(lab)
    faults.prepare(cluster)
    cluster.install_gates()
    yield cluster
    faults.clear_away(cluster)


@pytest.fixture(scope="module")
def aftermaths(cluster: Cluster, request: pytest.FixtureRequest) -> Callable[[Disaster, Mode], Aftermath]:
    """What became of the selected tests' migrations; each disaster is brought about when it is first asked for."""
    selected = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    known: dict[tuple[str, Mode], Aftermath | Exception] = {}

    def of(disaster: Disaster, mode: Mode) -> Aftermath:
        if (disaster.name, mode) not in known:
            struck = [one for one in selected if one.get("disaster") is disaster and one.get("mode") is mode]
            doors = [one["door"] for one in struck if "door" in one]
            try:
                known[disaster.name, mode] = Aftermath(cluster, disaster, doors)
            except Exception as failure:  # noqa: BLE001 - of each of its tests: none brings it about once more
                known[disaster.name, mode] = failure
        if isinstance(found := known[disaster.name, mode], Exception):
            raise found
        return found

    return of


@pytest.mark.parametrize(("disaster", "mode", "door"), CASES)
def test_after(disaster: Disaster, mode: Mode, door: Door, aftermaths: Callable[[Disaster, Mode], Aftermath]) -> None:
    """The job runs on exactly one node, the record has ended and tells the truth, and it can be moved again."""
    aftermath = aftermaths(disaster, mode)
    if door.name in aftermath.failures:
        raise aftermath.failures[door.name]
    record = aftermath.records[door.name]
    wanted = ["completed", "rolled-back"]
    if disaster.stalls and door.phase is S.CHECK:
        wanted.append("refused")  # a node without room says so before anything begins
    if door.phase in (S.UNDO, T.GIVING_UP):
        wanted = ["cancelled", "rolled-back"]
    if door.phase in RUNS_THERE:
        wanted = ["completed", "failed"] if aftermath.disaster.strike is kill_shims else ["completed"]
    if aftermath.needs_a_person(door):
        wanted = ["rolled-back"]
    assert record["outcome"] in wanted, record
    assert record["reason"]


@pytest.mark.parametrize(
    ("disaster", "mode"),
    [
        pytest.param(one, mode, marks=one.marks(mode), id=f"{one.name.replace(' ', '-')}-{mode}")
        for one in DISASTERS
        for mode in Mode
    ],
)
def test_nothing_is_left(disaster: Disaster, mode: Mode, aftermaths: Callable[[Disaster, Mode], Aftermath]) -> None:
    """Neither processes nor files, mounts, cgroups, containers or snapshots, on either node."""
    if surplus := aftermaths(disaster, mode).failures.get("surplus"):
        raise surplus
