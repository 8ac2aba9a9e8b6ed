"""Where two nodes do not meet any more after GO: a person decides, or a job dies with the node that it still needed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
from moving import A, B, Cluster, Witness, until

from podferry.core.phases import SourcePhase, TargetPhase
from podferry.errors import PodferryError
from podferry.lab import Lab, containers, root_images
from podferry.model import Mode
from podferry.node.process import Completed, run

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def cluster(lab: Lab) -> Cluster:
    cluster = Cluster(lab)
    cluster.install_gates()
    return cluster


@pytest.fixture
def job(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.node.name.split("[")[0].removeprefix("test_").replace("_", "-")
    cluster.start(name, "simple", "8")
    yield name
    cluster.open_breakpoints()
    cluster.lab.mend(B)
    cluster.stop(name)


def resolve(cluster: Cluster, id: str, node: str) -> Completed:
    program = [sys.executable, "-c", "from podferry.cli import main; main()", "resolve", id, "--run-on", node, "--json"]
    return run([*program, "--lab", cluster.lab.name], check=False)


def held(cluster: Cluster, name: str, phase: SourcePhase | TargetPhase, mode: Mode) -> str:
    """Begin to move `name`, and hold it at the door of a phase. The migration's id."""
    role = "source" if isinstance(phase, SourcePhase) else "target"
    gate = f"{role}-{phase}-{name}"
    cluster.close_breakpoint(gate)
    cluster.reached(gate, cluster.begin(name, source=A, mode=mode))
    return str(cluster.record(A, name)["id"])


def lost(cluster: Cluster, name: str) -> None:
    """Cut the link, let both go on, and wait until the source knows nothing of the target."""
    cluster.lab.cut(B)
    cluster.open_breakpoints()
    until(lambda: cluster.record(A, name)["phase"] == SourcePhase.LOST, f"the source of {name} lost contact")


def test_resolved_to_the_source_before_go_arrived(cluster: Cluster, job: str) -> None:
    with Witness(cluster, job) as witness:
        id = held(cluster, job, SourcePhase.RESUME, Mode.STOP)
        lost(cluster, job)
        assert cluster.ended(B, job)["outcome"] == "rolled-back"
        assert f"frozen {job}" in cluster.traces(A)
        verdict = resolve(cluster, id, A)
        assert json.loads(verdict.stdout)["outcome"] == "rolled-back", verdict.stderr
        cluster.goes_on(A, job)
        cluster.lab.mend(B)
        cluster.only_on(A, job)
        witness.testify(job)
    assert cluster.migrate(job, source=A)["outcome"] == "completed"


def test_resolved_to_the_target_where_it_runs(cluster: Cluster, job: str) -> None:
    """Which is asked first, and does not let the source have it."""
    with Witness(cluster, job) as witness:
        id = held(cluster, job, TargetPhase.RESUME, Mode.STOP)
        lost(cluster, job)
        cluster.goes_on(B, job)
        refused = resolve(cluster, id, A)
        assert refused.returncode == 3
        assert "runs here already" in refused.stdout + refused.stderr
        assert cluster.record(A, job)["phase"] == SourcePhase.LOST
        verdict = resolve(cluster, id, B)
        until(lambda: cluster.record(A, job)["outcome"] == "completed", f"the source of {job} is done")
        assert verdict.returncode == 0, verdict.stderr
        cluster.lab.mend(B)
        cluster.only_on(B, job)
        witness.testify(job)
    assert cluster.migrate(job, source=B)["outcome"] == "completed"


def test_no_verdict_kills_an_original_whose_memory_the_target_still_needs(cluster: Cluster, job: str) -> None:
    """The link is cut in post-copy: whoever says that the job shall run on the target would end it there."""
    with Witness(cluster, job) as witness:
        id = held(cluster, job, SourcePhase.SERVE, Mode.POSTCOPY)
        lost(cluster, job)
        refused = resolve(cluster, id, B)
        assert refused.returncode == 3
        assert "only the frozen original" in refused.stdout + refused.stderr
        assert f"frozen {job}" in cluster.traces(A)
        cluster.lab.mend(B)
        assert cluster.ended(A, job)["outcome"] == "completed"
        cluster.only_on(B, job)
        witness.testify(job)


@pytest.mark.slow
def test_the_source_node_dies_while_it_still_has_the_jobs_memory(own_lab: Lab) -> None:
    """A job that waits for its pages dies with them: when its source is back without them, or when a person ends it."""
    own_lab.up(2, "1gbit")
    containers.pull(own_lab, A, root_images.JOB_IMAGE)
    cluster = Cluster(own_lab)
    cluster.install_gates()
    waits, ended = "waits-for-its-source", "is-ended-by-a-person"
    for name in (waits, ended):
        cluster.start(name, "simple", "8")
        held(cluster, name, SourcePhase.SERVE, Mode.POSTCOPY)
    own_lab.kill_node(A)
    assert {cluster.record(B, name)["phase"] for name in (waits, ended)} == {TargetPhase.FILL}
    own_lab.exec(B, ["ctr", "task", "delete", "--force", ended])
    assert cluster.ended(B, ended)["outcome"] == "failed"
    assert "before all of its memory had arrived" in cluster.record(B, ended)["reason"]
    assert cluster.record(B, waits)["phase"] == TargetPhase.FILL
    own_lab.start_node(A)
    for name in (waits, ended):
        for node in (A, B):
            record = cluster.ended(node, name)
            assert record["outcome"] == "failed", record
        assert "died on the target" in cluster.record(A, name)["reason"]
    cluster.nothing_but({}, dead={A: [waits, ended]})
    for name in (waits, ended):
        with suppress(PodferryError):
            own_lab.exec(A, ["ctr", "container", "delete", name])
        cluster.start(name, "simple", "8")
        cluster.goes_on(A, name)
