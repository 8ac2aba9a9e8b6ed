"""Jobs that end as soon as they have been moved: each has run, once, and its end is its own."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from moving import A, B, Cluster, Record, Witness, until

from podferry.lab import Lab
from podferry.node.records import TaskStatus

pytestmark = pytest.mark.lab
ENDS = {"0": 0, "3": 3, "exec": 5, "daemon": 6, "stop": 8, "fault": 128 + signal.SIGSEGV}
"""How the job ends, and the exit status that containerd must have of it."""


@pytest.fixture(scope="module")
def cluster(lab: Lab) -> Cluster:
    cluster = Cluster(lab)
    cluster.install_gates()
    return cluster


@pytest.fixture
def name(cluster: Cluster) -> Iterator[str]:
    yield "brief"
    cluster.open_breakpoints()
    cluster.stop("brief")


def move(cluster: Cluster, name: str, mode: str, *, kill_agent_at: str = "") -> Record:
    """Move a job that looks out for a stop from the moment before the freeze on. `kill_agent_at` is a phase of the target, whose
    agent is killed in it."""
    gate = f"source-cut-over-{name}"
    cluster.close_breakpoint(gate)
    going = cluster.begin(name, source=A, mode=mode)
    cluster.reached(gate, going)
    cluster.containerd(A).kill_task(name, signal.SIGUSR1)
    if kill_agent_at:
        cluster.close_breakpoint(f"target-{kill_agent_at}-{name}")
    cluster.open_breakpoints(gate)
    if kill_agent_at:
        cluster.reached(f"target-{kill_agent_at}-{name}", going)
        cluster.kill(B, "agent")
        cluster.open_breakpoints()
    return going.result()


def ended_once(cluster: Cluster, witness: Witness, name: str, record: Record, how: str) -> None:
    """It ran on the target to its end, which containerd knows, and on the source no more."""
    assert record["outcome"] == "completed", (record["reason"], record["error"])
    until(lambda: cluster.containerd(B).task(name).status is TaskStatus.STOPPED, f"{name} has ended")
    assert cluster.containerd(B).wait_task(name, 10.0) == ENDS[how]
    assert not cluster.lines(A, name)
    witness.testify(name)
    assert cluster.ended(B, name)["outcome"] == "completed"


@pytest.mark.parametrize("attempt", range(3))
@pytest.mark.parametrize("mode", ["live", "postcopy"])
@pytest.mark.parametrize("how", ENDS)
def test_a_job_that_ends_as_soon_as_it_is_resumed(
    cluster: Cluster, name: str, how: str, mode: str, attempt: int
) -> None:
    cluster.start(name, "brief", how)
    with Witness(cluster, name) as witness:
        record = move(cluster, name, mode)
        ended_once(cluster, witness, name, record, how)


@pytest.mark.parametrize("phase", ["resume", "fill"])
@pytest.mark.parametrize("how", ["0", "3"])
def test_the_targets_agent_is_killed_as_the_job_ends(cluster: Cluster, name: str, how: str, phase: str) -> None:
    cluster.start(name, "brief", how)
    with Witness(cluster, name) as witness:
        record = move(cluster, name, "live", kill_agent_at=phase)
        ended_once(cluster, witness, name, record, how)
