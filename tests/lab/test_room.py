"""Where memory on its way lies: not in the node's /run, which containerd and the kubelet need."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from moving import NODES, A, B, Cluster

from podferry.core.preflight import numbers
from podferry.lab import Lab

pytestmark = pytest.mark.lab


@pytest.fixture
def cluster(lab: Lab) -> Cluster:
    return Cluster(lab)


def mounts(cluster: Cluster, node: str) -> dict[str, str]:
    pid = cluster.lab.node(node).pid
    lines = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
    return {where: f"{kind} {options}" for _, where, kind, options, *_ in lines}


def test_memory_on_its_way_has_a_tmpfs_of_its_own(cluster: Cluster) -> None:
    for node in NODES:
        found = mounts(cluster, node)
        assert found["/run/podferry"].startswith("tmpfs ")
        if numbers(platform.release()) >= (6, 4):
            assert "noswap" in found["/run/podferry"]
        cluster.kill(node, "agent")
        where = Path(f"/proc/{cluster.lab.node(node).pid}/mounts").read_text().splitlines()
        assert sum(" /run/podferry " in line for line in where) == 1, "an agent that starts again mounts none over it"


def test_a_job_larger_than_run_moves_and_leaves_run_alone(cluster: Cluster) -> None:
    """/run of a node is what a distribution makes it; the lab's is of 64 MiB here."""
    cluster.lab.exec(B, ["mount", "-o", "remount,size=64m", "/run"])
    try:
        cluster.start("large", "simple", "256")
        assert cluster.migrate("large", source=A, mode="stop")["outcome"] == "completed"
        cluster.goes_on(B, "large")
    finally:
        cluster.stop("large")
        cluster.lab.exec(B, ["mount", "-o", "remount,size=10%", "/run"])
