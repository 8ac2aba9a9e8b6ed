"""The page store: what is written is there, what is dropped costs nothing, what is impossible is refused."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from podferry.errors import Failed, PeerMisbehaved
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.store.page_store import ADDRESS_LIMIT, LONGEST_WRITE, RECENT, RECORD, PageStore, Totals

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="the store's sparse files need a tmpfs at /dev/shm"),
]

HIGH = 0x7F00_0000_0000


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="store-"))
    yield path / "store"
    shutil.rmtree(path)


@pytest.fixture
def store(place: Path) -> Iterator[PageStore]:
    store = PageStore.create(place)
    yield store
    store.close()


def stored(place: Path, address_space: int, address: int, length: int) -> bytes:
    with (place / f"space-{address_space}").open("rb") as file:
        file.seek(address)
        return file.read(length)


def used(place: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in place.glob("space-*"))


def test_the_offset_is_the_address_and_the_last_write_wins(place: Path, store: PageStore) -> None:
    store.write(7, HIGH, b"a" * 2 * PAGE, 0)
    store.write(7, HIGH + PAGE, b"b" * PAGE, 1)
    store.write(8, HIGH, b"c" * PAGE, 1)
    assert stored(place, 7, HIGH, 2 * PAGE) == b"a" * PAGE + b"b" * PAGE
    assert stored(place, 8, HIGH, PAGE) == b"c" * PAGE
    assert store.totals() == Totals(address_spaces=2, pages=3, bytes=3 * PAGE)
    assert used(place) == 3 * PAGE


def test_what_is_dropped_costs_no_memory(place: Path, store: PageStore) -> None:
    store.write(7, HIGH, b"a" * 8 * PAGE, 0)
    store.drop(7, HIGH + 2 * PAGE, HIGH + 4 * PAGE)
    store.drop(9, HIGH, HIGH + PAGE)
    assert list(store.present(7)) == [(HIGH, HIGH + 2 * PAGE), (HIGH + 4 * PAGE, HIGH + 8 * PAGE)]
    assert used(place) == 6 * PAGE
    assert stored(place, 7, HIGH + 2 * PAGE, PAGE) == bytes(PAGE)


def test_a_store_opens_as_it_was_recorded(place: Path, store: PageStore) -> None:
    store.write(7, HIGH, b"a" * 4 * PAGE, 0)
    store.write(7, HIGH + 4 * PAGE, b"a" * PAGE, 0)
    store.write(7, HIGH + PAGE, b"b" * PAGE, 2)
    store.write(8, PAGE, b"c" * PAGE, 1)
    store.complete(7)
    store.sync()
    again = PageStore.open(place)
    assert again.address_spaces() == [7, 8]
    assert (again.is_complete(7), again.is_complete(8), again.is_complete(9)) == (True, False, False)
    assert again.present(7) == store.present(7)
    assert list(again.newest_first(7)) == [(HIGH + PAGE, HIGH + 2 * PAGE, 2), (HIGH, HIGH + 5 * PAGE, 0)]
    assert (again.first_round(7), again.first_round(8), again.first_round(9)) == (0, 1, 0)
    again.write(7, HIGH, b"d" * PAGE, 3)
    again.verify({7: Totals(1, 5, 5 * PAGE), 8: Totals(1, 1, PAGE)})
    again.close()


@pytest.mark.parametrize("cut", [0, 10, -1])
def test_a_damaged_record_is_refused(place: Path, store: PageStore, cut: int) -> None:
    store.write(7, HIGH, b"a" * PAGE, 0)
    store.sync()
    record = place / RECORD
    record.write_bytes(record.read_bytes()[:cut])
    with pytest.raises(Failed, match="cannot open the page store"):
        PageStore.open(place)


def test_no_store_is_made_over_another(place: Path, store: PageStore) -> None:
    store.write(7, HIGH, b"a" * PAGE, 0)
    with pytest.raises(Failed, match="not empty"):
        PageStore.create(place)
    store.discard()
    assert not list(place.iterdir())
    PageStore.create(place)


@pytest.mark.parametrize(
    ("address_space", "address", "length", "round"),
    [
        (-1, HIGH, PAGE, 0),
        (1 << 32, HIGH, PAGE, 0),
        (7, HIGH + 1, PAGE, 0),
        (7, -PAGE, PAGE, 0),
        (7, HIGH, 0, 0),
        (7, HIGH, PAGE - 1, 0),
        (7, ADDRESS_LIMIT, PAGE, 0),
        (7, ADDRESS_LIMIT - PAGE, 2 * PAGE, 0),
        (7, HIGH, LONGEST_WRITE + PAGE, 0),
        (7, HIGH, PAGE, -1),
        (7, HIGH, PAGE, 1 << 32),
    ],
)
def test_what_a_peer_cannot_mean_is_refused(
    place: Path, store: PageStore, address_space: int, address: int, length: int, round: int
) -> None:
    with pytest.raises(PeerMisbehaved):
        store.write(address_space, address, bytes(length), round)
    assert not list(place.iterdir())


def test_totals_that_differ_name_the_space(store: PageStore) -> None:
    store.write(7, HIGH, b"a" * PAGE, 0)
    with pytest.raises(PeerMisbehaved, match="space 7"):
        store.verify({7: Totals(1, 2, 2 * PAGE)})
    with pytest.raises(PeerMisbehaved, match=r"the source names \[7, 8\]"):
        store.verify({7: Totals(1, 1, PAGE), 8: Totals()})


def test_a_hundred_thousand_runs_stay_compact(place: Path, store: PageStore) -> None:
    page, count = b"x" * PAGE, 100_000
    chance = random.Random(1)
    for number in range(count):
        store.write(7, HIGH + 2 * number * PAGE, page, 0)
    for _ in range(1000):
        store.write(7, HIGH + 2 * chance.randrange(count) * PAGE, page, 1)
    assert len(store.present(7)) == count
    store.sync()
    assert (place / RECORD).stat().st_size < 50 * count
    assert PageStore.open(place).present(7) == store.present(7)


def test_only_the_last_writes_are_remembered_in_their_order(place: Path, store: PageStore) -> None:
    page, count = b"x" * PAGE, 3 * RECENT
    store.write(7, HIGH, page, 1)
    for number in range(count):
        store.write(7, HIGH + number % 100 * 2 * PAGE, page, 2 + number // RECENT)
    store.sync()
    again = PageStore.open(place)
    runs = list(again.newest_first(7))
    assert RECENT <= len(runs) <= 2 * RECENT
    assert [run.start for run in runs] == [HIGH + (count - 1 - i) % 100 * 2 * PAGE for i in range(len(runs))]
    assert (runs[0].value, again.first_round(7)) == (4, 1)
    assert again.totals(7) == Totals(1, 100, 100 * PAGE)
    again.close()
