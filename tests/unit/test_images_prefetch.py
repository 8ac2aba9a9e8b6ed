"""What containers read of a layer is noted, and read ahead where one starts."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from podferry.memory.ranges import Runs
from podferry.snapshotter import layout, prefetch
from podferry.snapshotter.collect import Collector
from podferry.snapshotter.deadlines import Guard
from podferry.snapshotter.erofs import IMAGE
from podferry.snapshotter.layer_ports import SystemClock
from podferry.snapshotter.opening import initialise, open_share
from podferry.snapshotter.posix import PosixShare
from podferry.snapshotter.prefetch import Prefetcher, cached

pytestmark = pytest.mark.unit

CHAIN = f"sha256:{'c' * 64}"
MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture
def share(tmp_path: Path) -> PosixShare:
    where = tmp_path / "share"
    where.mkdir()
    initialise(where)
    return open_share(where, guard=Guard(20.0))


@pytest.fixture
def image(share: PosixShare) -> Path:
    """A layer's image of which nothing is in memory."""
    directory = share.path(f"{layout.LAYERS}/{layout.name_of(CHAIN)}")
    directory.mkdir()
    path = directory / IMAGE
    path.write_bytes(os.urandom(SIZE))
    forget(path)
    if cached(path):
        pytest.skip(f"the file system of {path} keeps every page in memory (tmpfs?)")
    return path


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path, *runs: tuple[int, int]) -> Runs:
    """Read parts of a file, as page faults of a program would."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for start, end in runs:
            os.pread(file.fileno(), end - start, start)
    return Runs(runs)


def node(share: PosixShare, *, read_only: bool = False) -> Prefetcher:
    return Prefetcher(share, lambda: [CHAIN], read_only)


def test_what_one_nodes_containers_read_another_reads_ahead(share: PosixShare, image: Path) -> None:
    wanted = read(image, (0, MIB), (3 * MIB, 3 * MIB + 8192), (SIZE - 5000, SIZE))
    node(share).note()
    noted = node(share).known(CHAIN)
    assert not wanted - noted
    assert noted.size < 2 * MIB
    forget(image)
    assert not cached(image)

    asked: list[int] = []
    other = Prefetcher(share, list, asked=asked.append)
    other.starting([CHAIN])
    other.stop()
    other.run()
    assert sum(asked) == noted.size
    for _ in range(600):  # it comes in the background
        if not noted - cached(image):
            break
        threading.Event().wait(0.05)
    assert not noted - cached(image)
    assert cached(image).size < SIZE / 2


def test_a_list_grows_by_what_is_worth_it(share: PosixShare, image: Path) -> None:
    one = node(share)
    first = read(image, (0, 2 * MIB))
    one.note()
    read(image, (4 * MIB, 4 * MIB + 8192))
    one.note()
    assert 4 * MIB not in one.known(CHAIN)
    forget(image)
    second = read(image, (6 * MIB, 7 * MIB))
    one.note()
    assert not (first | second) - one.known(CHAIN), "what another node noted stays"


def test_a_layer_that_is_read_whole_has_no_list(
    share: PosixShare, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "MOST", MIB)
    read(image, (0, SIZE))
    node(share).note()
    assert not node(share).known(CHAIN)


def test_a_node_that_only_reads_notes_nothing(share: PosixShare, image: Path) -> None:
    read(image, (0, MIB))
    node(share, read_only=True).note()
    assert share.names(layout.READ) == []


def test_a_check_of_a_layer_is_not_taken_for_a_container(share: PosixShare, image: Path) -> None:
    share.digest(f"{layout.LAYERS}/{layout.name_of(CHAIN)}/{IMAGE}")
    node(share).note()
    assert share.names(layout.READ) == []


def test_a_layer_that_is_a_tree_or_gone_is_passed_over(share: PosixShare) -> None:
    node(share).note()
    one = node(share)
    one.starting([CHAIN])
    one.stop()
    one.run()
    assert share.names(layout.READ) == []


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"{",
        b"[]",
        b'{"read": 1}',
        b'{"read": [[4, 2]]}',
        b'{"read": [[-1, 2]]}',
        b'{"read": [[0, 1, 2]]}',
        b'{"read": [[0, 4611686018427387904]]}',
    ],
)
def test_a_torn_list_is_none(share: PosixShare, image: Path, bad: bytes) -> None:
    share.create(f"{layout.READ}/{layout.name_of(CHAIN)}", bad)
    assert not node(share).known(CHAIN)
    wanted = read(image, (0, MIB))
    node(share).note()
    assert not wanted - node(share).known(CHAIN)


def test_the_list_of_a_layer_that_is_gone_goes(share: PosixShare, image: Path) -> None:
    read(image, (0, MIB))
    node(share).note()
    collector = Collector(share, SystemClock())
    collector.collect()
    assert share.names(layout.READ) == [layout.name_of(CHAIN)]
    share.remove_tree(f"{layout.LAYERS}/{layout.name_of(CHAIN)}")
    collector.collect()
    assert share.names(layout.READ) == []
