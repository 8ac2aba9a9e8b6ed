"""What the tests inside a node share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_job import Job

from podferry.node.containerd import Containerd


@pytest.fixture
def client() -> Iterator[Containerd]:
    """The node's containerd."""
    with Containerd() as client:
        yield client


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of the test's own."""
    path = Path("/var/log/podferry/node-tests")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def job(client: Containerd, place: Path) -> Iterator[Job]:
    """A container, not started yet, and gone afterwards."""
    job = Job(client, "source", place)
    job.remove()
    yield job
    job.remove()
