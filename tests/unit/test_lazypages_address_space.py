"""The translation of addresses against a model: a dictionary with one entry per page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.lazypages.address_space import AddressSpace
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.kernel.uffd import Remap
from podferry.memory.ranges import Runs
from podferry.memory.store.runs import Run, RunMap

pytestmark = pytest.mark.unit

PAGES = 24


@dataclass
class Model:
    """Page by page: what is mapped (True where a child does not inherit), and which origin it holds."""

    mapped: dict[int, bool]
    origin: dict[int, int]

    def unmap(self, first: int, last: int) -> None:
        for page in range(first, last):
            self.mapped.pop(page, None)
            self.origin.pop(page, None)

    def remap(self, first: int, last: int, to: int, *, leave: bool = False) -> None:
        areas = {page: self.mapped[page] for page in range(first, last) if page in self.mapped}
        origins = {page: self.origin.pop(page) for page in range(first, last) if page in self.origin}
        self.unmap(to, to + last - first)
        if not leave:
            self.unmap(first, last)
        self.mapped.update({page + to - first: wiped for page, wiped in areas.items()})
        self.origin.update({page + to - first: origin for page, origin in origins.items()})


def build(pages: set[int], areas: dict[int, bool]) -> tuple[AddressSpace, Model]:
    runs = Runs((page * PAGE, (page + 1) * PAGE) for page in pages)
    known = RunMap(Run(page * PAGE, (page + 1) * PAGE, int(wiped)) for page, wiped in sorted(areas.items()))
    model = Model({**dict.fromkeys(pages, False), **areas}, {page: page for page in pages})
    return AddressSpace(runs, known), model


def same(address_space: AddressSpace, model: Model) -> None:
    found = {page: address_space.origin(page * PAGE) for page in range(PAGES)}
    assert {page: origin // PAGE for page, origin in found.items() if origin is not None} == model.origin
    for page, origin in model.origin.items():
        target = address_space.target(origin * PAGE, PAGE)
        assert target is not None
        assert target == (origin * PAGE, (origin + 1) * PAGE, page * PAGE)
    placed = set(model.origin.values())
    assert not any(address_space.target(origin * PAGE, PAGE) for origin in range(PAGES) if origin not in placed)


def lost_pages(runs: list[Run]) -> set[int]:
    return {page for run in runs for page in range(run.start // PAGE, run.end // PAGE)}


def apply(address_space: AddressSpace, model: Model, change: tuple[str, int, int, int]) -> None:
    """One change of a single-threaded job: the kernel unmaps what is in the way of a move, and reports that first."""
    kind, first, count, to = change
    last = min(first + count, PAGES)
    before = set(model.origin.values())
    lost: set[int] = set()
    if kind == "unmap":
        lost |= lost_pages(address_space.unmap(first * PAGE, last * PAGE))
        model.unmap(first, last)
    elif kind == "look":
        origins = {
            origin // PAGE
            for run in address_space.origins(first * PAGE, last * PAGE)
            for origin in range(run.start, run.end, PAGE)
        }
        assert origins == {model.origin[page] for page in range(first, last) if page in model.origin}
    elif to + last - first <= PAGES and (to >= last or to + last - first <= first):
        lost |= lost_pages(address_space.unmap(to * PAGE, (to + last - first) * PAGE))
        address_space.remap(Remap(first * PAGE, to * PAGE, (last - first) * PAGE))
        assert not address_space.unsettled()
        if kind == "remap":
            assert address_space.unmap(first * PAGE, last * PAGE) == []
        model.remap(first, last, to, leave=kind == "leave")
    assert lost == before - set(model.origin.values())


pages = st.sets(st.integers(0, PAGES - 1))
areas = st.dictionaries(st.integers(0, PAGES - 1), st.booleans())
numbers = st.integers(0, PAGES - 1)
changes = st.lists(
    st.tuples(st.sampled_from(["unmap", "remap", "remap", "leave", "look"]), numbers, st.integers(1, 8), numbers)
)


@given(pages, areas, changes)
def test_it_follows_a_job(pages: set[int], areas: dict[int, bool], changes: list[tuple[str, int, int, int]]) -> None:
    address_space, model = build(pages, areas)
    same(address_space, model)
    for change in changes:
        apply(address_space, model, change)
        same(address_space, model)


@given(pages, areas, changes, changes)
def test_a_child_goes_its_own_way(
    pages: set[int],
    areas: dict[int, bool],
    before: list[tuple[str, int, int, int]],
    after: list[tuple[str, int, int, int]],
) -> None:
    address_space, model = build(pages, areas)
    for change in before:
        apply(address_space, model, change)
    child, lost = address_space.fork()
    inherited = {page: origin for page, origin in model.origin.items() if not model.mapped[page]}
    assert lost_pages(lost) == set(model.origin.values()) - set(inherited.values())
    childs = Model(dict(model.mapped), inherited)
    for change in after:
        apply(child, childs, change)
    same(address_space, model)
    same(child, childs)


A, B, C, D = 0, 6, 12, 18
SIZE = 4


def move(start: int, to: int) -> list[tuple[str, int, int]]:
    """How the kernel reports an mremap: in two steps."""
    return [("remap", start, to), ("unmap", start, start)]


def report(address_space: AddressSpace, change: tuple[str, int, int]) -> None:
    kind, first, to = change
    if kind == "unmap":
        address_space.unmap(first * PAGE, (first + SIZE) * PAGE)
    else:
        address_space.remap(Remap(first * PAGE, to * PAGE, SIZE * PAGE))


def merges(*threads: list[tuple[str, int, int]]) -> Iterator[list[tuple[int, tuple[str, int, int]]]]:
    """Every order in which the reports of threads can be read, each with its thread's number."""
    order = [number for number, steps in enumerate(threads) for _ in steps]
    for shuffled in sorted(set(permutations(order))):
        rest = [iter(steps) for steps in threads]
        yield [(number, next(rest[number])) for number in shuffled]


FREEING = [[("unmap", A, A)], move(A, D)]


@pytest.mark.parametrize("freeing", FREEING, ids=["unmap", "move"])
def test_reports_of_three_threads_may_come_in_any_order(freeing: list[tuple[str, int, int]]) -> None:
    """The first frees A, the second's mremap gets A for what is at B, the third's gets B for what is at C."""
    for merged in merges(freeing, move(B, A), move(C, B)):
        address_space, model = build({page + n for page in (A, B, C) for n in range(SIZE)}, {})
        for _, change in merged:
            report(address_space, change)
        if len(freeing) == 1:
            model.unmap(A, A + SIZE)
        else:
            model.remap(A, A + SIZE, D)
        model.remap(B, B + SIZE, A)
        model.remap(C, C + SIZE, B)
        assert not address_space.unsettled(), merged
        same(address_space, model)


@pytest.mark.parametrize("freeing", FREEING, ids=["unmap", "move"])
def test_a_child_has_what_its_thread_has_moved(freeing: list[tuple[str, int, int]]) -> None:
    """Thread 2 gets A for what is at B, and forks once its mremap has returned, whatever of thread 1 is unread."""
    for merged in merges(freeing, move(B, A)):
        address_space, _ = build({page + n for page in (A, B) for n in range(SIZE)}, {})
        left = 2
        for thread, change in merged:
            report(address_space, change)
            left -= thread
            if thread and not left:
                child, _ = address_space.fork()
                assert not child.unsettled()
                assert child.origin(A * PAGE) == B * PAGE, merged
                assert child.target(B * PAGE, PAGE) == (B * PAGE, (B + 1) * PAGE, A * PAGE)
        assert address_space.origin(A * PAGE) == B * PAGE


@pytest.mark.parametrize(
    ("sequel", "place"), [([("unmap", A, A)], None), (move(A, C), C)], ids=["unmapped again", "moved again"]
)
def test_pages_in_flight_can_go_on(sequel: list[tuple[str, int, int]], place: int | None) -> None:
    """Thread 1 has moved A away, its second report is late. Thread 2 moves B to A and at once does more with it."""
    for merged in merges([("unmap", A, A)], [*move(B, A), *sequel]):
        address_space, _ = build({page + n for page in (A, B) for n in range(SIZE)}, {})
        report(address_space, ("remap", A, D))
        for _, change in merged:
            report(address_space, change)
        assert not address_space.unsettled()
        found = address_space.target(B * PAGE, SIZE * PAGE)
        assert (found.value // PAGE if found else None) == place, merged
        assert address_space.origin(D * PAGE) == A * PAGE


def test_pages_in_flight_can_be_dropped() -> None:
    address_space, _ = build({A, B}, {})
    report(address_space, ("remap", B, A))
    assert address_space.unsettled()
    assert B in lost_pages(address_space.origins(A * PAGE, (A + 1) * PAGE))


def test_what_is_in_flight_in_vain_lands_once_nothing_is_under_way() -> None:
    address_space, model = build({0, 1}, {})
    address_space.remap(Remap(0, PAGE, PAGE))
    assert address_space.unsettled()
    assert address_space.target(0, PAGE) is None
    assert lost_pages(address_space.settle()) == {1}
    model.remap(0, 1, 1)
    same(address_space, model)


def test_what_has_grown_is_in_the_way_until_its_unmapping_is_reported() -> None:
    """Nobody reports that an area has grown, only, when it moves, how long it is by then."""
    address_space, _ = build({0, 1, A + 20, A + 21}, {})
    address_space.remap(Remap(0, 8 * PAGE, 2 * PAGE))
    address_space.unmap(0, 2 * PAGE)  # two pages at 8, which grow to six there
    address_space.remap(Remap(8 * PAGE, 2 * PAGE, 6 * PAGE))
    address_space.remap(Remap(20 * PAGE, 12 * PAGE, 2 * PAGE))  # another thread's, into what the first has left
    assert address_space.unsettled()
    assert address_space.unmap(8 * PAGE, 14 * PAGE) == []
    assert (address_space.origin(12 * PAGE), address_space.origin(13 * PAGE)) == (20 * PAGE, 21 * PAGE)
    assert (address_space.origin(2 * PAGE), address_space.origin(3 * PAGE)) == (0, PAGE)
