"""A real Kubernetes for the tests of this tier: one cluster in a lab for all of them, and none for those that come after."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from podferry.lab import Lab
from podferry.lab.kubernetes import daemons
from podferry.lab.progress import phases

from .installing import NODES, footprint, is_installed, uninstall


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not (missing := daemons.missing()):
        return
    reason = f"no Kubernetes here: {daemons.DIRECTORY} (PODFERRY_KUBE_BIN) lacks {', '.join(missing)}"
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="package")
def cluster() -> Iterator[Lab]:
    """A lab with Kubernetes on two nodes and nothing of podferry, up for the first test that needs it."""
    lab = Lab(f"test-{os.getpid()}-cluster")
    try:
        lab.up(2, agent=False, kubernetes=True, progress=phases(print))
        yield lab
    finally:
        lab.down()


@pytest.fixture(scope="package")
def before(cluster: Lab) -> dict[str, str]:
    """What an installation changes on the nodes, as it was before."""
    return {node: footprint(cluster, node) for node in NODES}


@pytest.fixture
def installed(cluster: Lab, before: dict[str, str]) -> Lab:
    """The cluster with podferry on it, by deploy/; it stays until a test wants the cluster bare."""
    assert len(before) == len(NODES)
    if not is_installed(cluster):
        cluster.deploy(phases(print))
    return cluster


@pytest.fixture(scope="module")
def bare(cluster: Lab, before: dict[str, str]) -> Lab:
    """The cluster without podferry, for tests that bring agents of their own."""
    assert len(before) == len(NODES)
    if is_installed(cluster):
        uninstall(cluster)
    return cluster
