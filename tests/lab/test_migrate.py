"""Moves that work: there and back again, and what containerd sees afterwards."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from moving import A, B, Cluster, Witness, other, until

from podferry.core.preflight import GUARDING_CRIU, numbers
from podferry.lab import Lab
from podferry.model import Mode

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def cluster(lab: Lab) -> Cluster:
    return Cluster(lab)


@pytest.fixture
def name(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.node.name.split("[")[0].removeprefix("test_").replace("_", "-")
    yield name
    cluster.stop(name)


def in_container(cluster: Cluster, node: str, name: str, *argv: str) -> str:
    return cluster.lab.exec(node, ["ctr", "task", "exec", "--exec-id", "look", name, *argv]).stdout


def there_and_back(cluster: Cluster, name: str, moves: int, mode: str, **options: float) -> str:
    """Move `name` so often, beginning on node A. Returns where it is then."""
    here = A
    with Witness(cluster, name) as witness:
        open_before = {}
        for number in range(moves):
            record = cluster.migrate(name, source=here, mode=mode, **options)
            assert record["outcome"] == "completed", (record["reason"], record["error"])
            assert record["downtime_ms"] > 0
            here = other(here)
            cluster.goes_on(here, name)
            if number == 1:
                open_before = {node: cluster.descriptors(node) for node in (A, B)}
        cluster.only_on(here, name)
        witness.testify(name)
        until(
            lambda: all(cluster.descriptors(node) <= open_before.get(node, 1 << 20) for node in (A, B)),
            "descriptors closed",
        )
    return here


def ledger_agrees(cluster: Cluster, node: str, name: str) -> None:
    """The file that the job appends to has what its output has, and nothing twice."""
    counted = cluster.counted(node, name)
    lines = in_container(cluster, node, name, "cat", "/ledger").splitlines()
    assert [int(line) for line in lines] == list(range(len(lines)))
    assert len(lines) >= counted


@pytest.mark.parametrize("mode", ["stop", "live"])
@pytest.mark.parametrize(("mebibytes", "moves"), [(256, 4), pytest.param(256, 10, marks=pytest.mark.slow)])
def test_simple(cluster: Cluster, name: str, mebibytes: int, moves: int, mode: str) -> None:
    cluster.start(name, "simple", str(mebibytes))
    here = there_and_back(cluster, name, moves, mode)
    ledger_agrees(cluster, here, name)
    cluster.lab.exec(here, ["ctr", "task", "kill", "-s", "SIGUSR1", name])
    until(
        lambda: in_container(cluster, here, name, "sh", "-c", "cat /whole 2>/dev/null || :"),
        "the job checks its memory",
    )
    cluster.goes_on(here, name)


@pytest.mark.parametrize("mode", ["stop", "live"])
@pytest.mark.parametrize("moves", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_family(cluster: Cluster, name: str, moves: int, mode: str) -> None:
    cluster.start(name, "family")
    here = there_and_back(cluster, name, moves, mode)
    ledger_agrees(cluster, here, name)


@pytest.mark.parametrize("mode", ["stop", "live", "postcopy"])
def test_every_kind_of_memory(cluster: Cluster, name: str, mode: str) -> None:
    cluster.start(name, "memories")
    here = there_and_back(cluster, name, 2, mode)
    cluster.goes_on(here, name)
    ledger_agrees(cluster, here, name)


def test_guards_that_madvise_made_are_refused_where_criu_would_lose_them(cluster: Cluster, name: str) -> None:
    cluster.start(name, "memories", "guards")
    record = cluster.migrate(name, source=A, mode="live")
    criu = numbers(cluster.lab.exec(A, ["criu", "--version"]).stdout.split()[1])
    if record["outcome"] == "completed":
        assert criu >= GUARDING_CRIU
        cluster.goes_on(B, name)
    else:
        assert "guard pages" in record["error"]["why"]
        assert criu < GUARDING_CRIU
        cluster.goes_on(A, name)


@pytest.mark.parametrize("mode", ["live", pytest.param("postcopy", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("processes", "threads"), [(200, 0), (1, 500)])
def test_a_crowd(cluster: Cluster, name: str, processes: int, threads: int, mode: str) -> None:
    cluster.start(name, "crowd", str(processes), str(threads))
    # However slow the machine is: each of the crowd writes 200 KB as often as it wakes up, and two busy processors do not copy
    # so much in the 50 ms that the default leaves to the last pages.
    here = there_and_back(cluster, name, 2, mode, max_downtime_ms=60_000.0)
    ledger_agrees(cluster, here, name)


@pytest.mark.smoke
def test_an_ordinary_task(cluster: Cluster, name: str) -> None:
    """stdio, exec, signals and the exit status are containerd's, as of any container."""
    cluster.start(name, "simple", "8")
    cluster.migrate(name, source=A)
    containerd = cluster.containerd(B)
    task = containerd.task(name)
    assert task.status.name == "RUNNING"
    assert task.pid in containerd.pids(name)
    assert in_container(cluster, B, name, "cat", "/proc/1/comm") == "python3\n"
    cluster.lab.exec(B, ["ctr", "task", "pause", name])
    assert containerd.task(name).status.name == "PAUSED"
    cluster.lab.exec(B, ["ctr", "task", "resume", name])
    cluster.goes_on(B, name)
    containerd.kill_task(name, signal.SIGTERM)
    assert containerd.wait_task(name, 30.0) == 7
    assert containerd.delete_task(name) == 7
    containerd.delete_container(name)


def test_killed_after_the_move(cluster: Cluster, name: str) -> None:
    cluster.start(name, "family")
    cluster.migrate(name, source=A)
    cluster.lab.exec(B, ["ctr", "task", "kill", "-s", "SIGKILL", name])
    assert cluster.containerd(B).wait_task(name, 30.0) == 128 + signal.SIGKILL


def test_the_name_can_be_used_again(cluster: Cluster, name: str) -> None:
    """A container that came by a migration leaves nothing that the next of its name could stumble over."""
    cluster.start(name, "simple", "8")
    cluster.migrate(name, source=A)
    cluster.only_on(B, name)
    cluster.stop(name)
    cluster.start(name, "simple", "8", node=B)
    cluster.only_on(B, name)


def test_there_and_back_with_cgroup_v2_alone(own_lab: Lab) -> None:
    """As on a machine without v1, and here without a single controller: the freezer is part of v2 itself."""
    own_lab.up(2, "1gbit", cgroup="v2")
    cluster = Cluster(own_lab)
    kind = own_lab.exec(A, ["stat", "-f", "-c", "%T", "/sys/fs/cgroup"]).stdout.strip()
    assert kind == "cgroup2fs"
    cluster.start("job", "family")
    here = A
    with Witness(cluster, "job") as witness:
        for mode in (Mode.STOP, Mode.LIVE, Mode.POSTCOPY):
            record = cluster.migrate("job", source=here, mode=mode, max_downtime_ms=60_000.0)  # however busy it is here
            assert record["outcome"] == "completed", str(record)
            here = other(here)
            cluster.only_on(here, "job")
        witness.testify("job")
