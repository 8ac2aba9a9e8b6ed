"""When layers are published: not while containerd is unpacking others, and not too late for nodes that wait."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from podferry.snapshotter.metadata import Metadata
from podferry.snapshotter.publisher import YIELDS_TO_PULLS, Publisher
from podferry.snapshotter.snapshot_row import SnapshotKind
from podferry.snapshotter.store import LayerStore

pytestmark = pytest.mark.unit
CHAIN = f"sha256:{'a' * 64}"


class Clock:
    """Time that passes when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def pause(self, seconds: float, stop: object = None) -> bool:
        self.now += seconds
        return False


@pytest.fixture
def metadata(tmp_path: Path) -> Iterator[Metadata]:
    metadata = Metadata(tmp_path / "metadata.db")
    yield metadata
    metadata.close()


def publisher(tmp_path: Path, metadata: Metadata, pulling: list[bool]) -> tuple[Publisher, Clock]:
    """One that is told, look by look, whether something is being pulled; the last answer stays."""
    clock = Clock()
    store = cast(LayerStore, SimpleNamespace(clock=clock, read_only=False))
    answers: Any = lambda: pulling.pop(0) if len(pulling) > 1 else pulling[0]  # noqa: E731
    return Publisher(tmp_path, metadata, store, pulling=answers), clock


def with_layer(metadata: Metadata) -> None:
    """A layer that waits to be published."""
    metadata.create(SnapshotKind.ACTIVE, "unpacking", "", {}, lambda made: None)
    metadata.commit(CHAIN, "unpacking", {}, size=(1, 1), chain=CHAIN, parent="")


def test_it_waits_for_the_pull_to_end(tmp_path: Path, metadata: Metadata) -> None:
    with_layer(metadata)
    pulling = [True, True, True, False]
    one, clock = publisher(tmp_path, metadata, pulling)
    one._yield_to_pulls()
    assert pulling == [False]
    assert 0 < clock.now < YIELDS_TO_PULLS


def test_it_does_not_wait_for_ever(tmp_path: Path, metadata: Metadata) -> None:
    with_layer(metadata)
    one, clock = publisher(tmp_path, metadata, [True])
    one._yield_to_pulls()
    assert YIELDS_TO_PULLS <= clock.now < YIELDS_TO_PULLS + 1


def test_with_nothing_to_publish_it_waits_for_nothing(tmp_path: Path, metadata: Metadata) -> None:
    one, clock = publisher(tmp_path, metadata, [True])
    one._yield_to_pulls()
    assert clock.now == 0
