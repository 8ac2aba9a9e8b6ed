"""What the tests inside a node share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from podferry.node.containerd import Containerd


@pytest.fixture
def client() -> Iterator[Containerd]:
    """The node's containerd."""
    with Containerd() as client:
        yield client
