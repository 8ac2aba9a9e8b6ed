"""What the snapshotter says of its share, by Prometheus metrics, while that comes and goes; and what it removes by the clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_images_share import CHAIN, OTHER, Clock, needs_root, store

from podferry.snapshotter import initialise, layout, open_share
from podferry.snapshotter.collect import Collector
from podferry.snapshotter.deadlines import Guard
from podferry.snapshotter.housekeeping import Chore, Housekeeping
from podferry.snapshotter.metadata import Metadata
from podferry.snapshotter.metrics import Metrics
from podferry.snapshotter.prefetch import Prefetcher
from podferry.snapshotter.publisher import Publisher
from podferry.snapshotter.snapshot_row import SnapshotKind

pytestmark = pytest.mark.unit


class House:
    """A node's housekeeping over a share that is a directory, and the time that its chores see."""

    def __init__(self, place: Path) -> None:
        self.at = place / "share"
        self.at.mkdir()
        initialise(self.at)
        self.share, self.clock, self.metrics = open_share(self.at, guard=Guard(20.0)), Clock(), Metrics()
        self.metadata = Metadata(place / "metadata.db")
        self.store = store(self.share, self.clock)
        self.publisher = Publisher(place, self.metadata, self.store)
        self.woken = 0
        self.publisher.wake = self._woken  # type: ignore[method-assign]
        collector = Collector(self.share, self.clock, grace=0.0)
        reader = Prefetcher(self.share, list, False, self.metrics.prefetched.inc)
        self.housekeeping = Housekeeping(self.share, self.publisher, collector, reader, self.metrics)

    def _woken(self) -> None:
        self.woken += 1

    def do(self, work: Callable[[], None]) -> None:
        self.housekeeping._do(Chore("a chore", 1.0, work))

    def look(self) -> dict[str, float]:
        """The metrics after a look at the share."""
        self.do(self.housekeeping._observe)
        samples = (sample for family in self.metrics.registry.collect() for sample in family.samples)
        return {" ".join((one.name, *one.labels.values())): one.value for one in samples}


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_a_share_that_vanishes_and_comes_back(house: House) -> None:
    assert house.look()["podferry_share_up"] == 1
    away = house.at.with_name("away")
    house.at.rename(away)
    gone = house.look()
    assert (gone["podferry_share_up"], gone["podferry_share_failures_total PF250"]) == (0, 1)
    assert house.look()["podferry_share_failures_total PF250"] == 2
    assert house.woken == 0
    away.rename(house.at)
    back = house.look()
    assert (back["podferry_share_up"], back["podferry_share_failures_total PF250"]) == (1, 2)
    assert back["podferry_share_free_bytes"] > 0
    assert house.woken == 1, "what waited is published at once"


def test_a_folder_that_is_gone_stops_nothing_else(house: House) -> None:
    """FileNotFoundError is no error of podferry's; the thread that does the chores ended with it, leases and all."""
    (house.at / layout.NODES).rmdir()
    house.do(house.housekeeping.publisher.store.references.heartbeat)
    assert house.look()["podferry_share_failures_total PF200"] == 1
    (house.at / layout.NODES).mkdir()
    house.do(house.housekeeping.publisher.store.references.heartbeat)
    assert len(house.share.names(layout.NODES)) == 1


def test_layers_that_wait_and_layers_in_use_are_counted(house: House) -> None:
    house.metadata.create(SnapshotKind.ACTIVE, "extract", "", {}, lambda made: None)
    house.metadata.commit("layer", "extract", {}, size=(1, 1), chain=CHAIN)
    house.store.references.add(OTHER)
    seen = house.look()
    assert (seen["podferry_layers_waiting"], seen["podferry_layers_referred"]) == (1, 1)
    assert seen["podferry_share_calls_stuck"] == 0


@needs_root
def test_what_nobody_uses_goes_and_is_counted(house: House, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    house.store.publish(CHAIN, source)
    house.store.references.drop(CHAIN)
    house.store.references.heartbeat()
    for _ in range(4):
        house.do(house.housekeeping._collect)
        house.clock.now += 1000
    assert house.share.names(layout.LAYERS) == []
    assert house.look()["podferry_layers_collected_total"] == 1
