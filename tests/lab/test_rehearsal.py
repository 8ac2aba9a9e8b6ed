"""Rehearsals between two real nodes: a job stands still for a moment and goes on; they find what a look does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
from moving import PATIENCE, A, B, Cluster, Witness, until

from podferry.cli.agent_client import AgentUnreachable
from podferry.core.phases import SourcePhase
from podferry.criu.checkpoint import CheckpointFailed
from podferry.lab import Lab

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def cluster(lab: Lab) -> Cluster:
    return Cluster(lab)


@pytest.fixture
def name(cluster: Cluster) -> Iterator[str]:
    yield "rehearsed"
    cluster.stop("rehearsed")


def test_a_job_goes_on_and_its_move_is_forecast(cluster: Cluster, name: str) -> None:
    cluster.start(name, "counting situations", "idle_with_shared_memory")
    with Witness(cluster, name) as witness:
        for _ in range(3):
            answer = cluster.agent(A).call("check", timeout=None, name=name, to=B, rehearse=True, max_freeze_s=PATIENCE)
            assert answer["movable"], answer
            told = answer["rehearsal"]
            assert told["outcome"] == "rehearsed"
            assert 0 < told["stood_still_ms"] < 60_000
            assert told["forecast_ms"] > 0
            assert told["image_bytes"] > 64 << 20, "shared memory is in CRIU's images"
            record = cluster.record(A, name)
            assert record["wire_bytes"] < 8 << 20, "and stays where it is"
            assert cluster.record(B, name)["outcome"] == "rehearsed"
            cluster.only_on(A, name)
        assert cluster.migrate(name, source=A, mode="live")["outcome"] == "completed"
        cluster.goes_on(B, name)
        witness.testify(name)


def test_an_agent_that_is_killed_in_the_middle_leaves_the_job_running(cluster: Cluster, name: str) -> None:
    """The job is dumped, and frozen, when its agent dies."""
    cluster.start(name, "counting situations", "idle_with_shared_memory")
    with Witness(cluster, name) as witness:

        def ask() -> None:
            with suppress(AgentUnreachable):
                cluster.agent(A).call("check", timeout=None, name=name, to=B, rehearse=True, max_freeze_s=PATIENCE)

        asked = cluster._pool.submit(ask)
        until(lambda: is_frozen(cluster, name), "the job is frozen")
        cluster.kill(A, "agent")
        asked.result()
        record = cluster.ended(A, name)
        assert record["outcome"] == "rolled-back"
        assert "the agent was restarted" in record["reason"]
        assert SourcePhase.CUTOVER in record["phases"]
        cluster.only_on(A, name)
        witness.testify(name)


def test_what_a_look_does_not_see_a_rehearsal_finds(cluster: Cluster, name: str) -> None:
    """CRIU is asked, and what it says is the reason: here it breaks off whenever it is to dump."""
    cluster.start(name, "counting situations", "idle_with_shared_memory")
    found = cluster.lab.exec(A, ["sh", "-c", "command -v criu"]).stdout.strip()
    criu = cluster.root(A) / found.lstrip("/")
    real = criu.with_name("criu.real")
    criu.rename(real)
    criu.write_text(f'#!/bin/sh\ncase "$*" in *swrk*) exit 1;; esac\nexec {found}.real "$@"\n')
    criu.chmod(0o755)
    try:
        answer = cluster.agent(A).call("check", timeout=None, name=name, to=B, rehearse=True, max_freeze_s=PATIENCE)
    finally:
        real.rename(criu)
    assert answer["rehearsal"]["outcome"] == "rolled-back", answer
    assert answer["movable"] is False
    assert answer["refusals"][0]["code"] == CheckpointFailed.code
    cluster.only_on(A, name)


def is_frozen(cluster: Cluster, name: str) -> bool:
    """Whether the job's cgroup on the source is frozen."""
    groups = cluster.root(A) / "sys/fs/cgroup"
    with suppress(OSError):
        return "FROZEN" in (groups / "freezer/default" / name / "freezer.state").read_text()
    with suppress(OSError):
        return "frozen 1" in (groups / "default" / name / "cgroup.events").read_text()
    return False
