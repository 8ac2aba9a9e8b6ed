"""Where a cut-over cannot be finished, the job is given back in time, and whoever asked is told what took it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from moving import A, B, Cluster

from podferry.errors import TimedOut
from podferry.lab import Lab

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def cluster(lab: Lab) -> Cluster:
    cluster = Cluster(lab)
    cluster.install_gates()
    return cluster


@pytest.fixture
def name(cluster: Cluster) -> Iterator[str]:
    yield "still"
    cluster.open_breakpoints()
    cluster.stop("still")


@pytest.mark.parametrize("mode", ["live", "postcopy", "stop"])
def test_a_target_that_says_nothing_does_not_keep_the_job(cluster: Cluster, name: str, mode: str) -> None:
    """Its kernel goes on acknowledging what is sent, so nobody else would notice for half a minute."""
    cluster.start(name, "simple", "8")
    gate = f"source-cut-over-{name}"
    cluster.close_breakpoint(gate)
    going = cluster.begin(name, source=A, mode=mode, max_freeze_s=2.0)
    cluster.reached(gate, going)
    agents = [one.pid for one in cluster.processes(B) if one.name == "agent"]
    for pid in agents:
        os.kill(pid, signal.SIGSTOP)
    try:
        cluster.open_breakpoints(gate)
        record = going.result()
        cluster.goes_on(A, name)
    finally:
        for pid in agents:
            os.kill(pid, signal.SIGCONT)
    assert record["outcome"] == "rolled-back"
    assert record["error"]["code"] == TimedOut.code, record["error"]
    step = "last pages" if mode == "stop" else "check what arrived"
    assert step in record["error"]["why"], record["error"]
    assert cluster.ended(B, name)["outcome"] == "rolled-back"
    assert cluster.migrate(name, source=A, mode=mode)["outcome"] == "completed"
