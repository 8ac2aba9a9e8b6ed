"""The translation of addresses against a model: a dictionary with one entry per page."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.memory.feeder_space import AddressSpace
from podferry.memory.ranges import Runs
from podferry.memory.store_runs import Run, RunMap
from podferry.memory.uffd import PAGE, Remap

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

    def remap(self, first: int, last: int, to: int) -> None:
        areas = {page: self.mapped.pop(page) for page in range(first, last) if page in self.mapped}
        origins = {page: self.origin.pop(page) for page in range(first, last) if page in self.origin}
        self.unmap(to, to + last - first)
        self.mapped.update({page + to - first: wiped for page, wiped in areas.items()})
        self.origin.update({page + to - first: origin for page, origin in origins.items()})


def build(pages: set[int], areas: dict[int, bool]) -> tuple[AddressSpace, Model]:
    runs = Runs((page * PAGE, (page + 1) * PAGE) for page in pages)
    known = RunMap(Run(page * PAGE, (page + 1) * PAGE, int(wiped)) for page, wiped in sorted(areas.items()))
    model = Model({**dict.fromkeys(pages, False), **areas}, {page: page for page in pages})
    return AddressSpace(runs, known), model


def same(space: AddressSpace, model: Model) -> None:
    found = {page: space.origin(page * PAGE) for page in range(PAGES)}
    assert {page: origin // PAGE for page, origin in found.items() if origin is not None} == model.origin
    for page, origin in model.origin.items():
        target = space.target(origin * PAGE, PAGE)
        assert target is not None
        assert target == (origin * PAGE, (origin + 1) * PAGE, page * PAGE)
    placed = set(model.origin.values())
    assert not any(space.target(origin * PAGE, PAGE) for origin in range(PAGES) if origin not in placed)


def lost_pages(runs: list[Run]) -> set[int]:
    return {page for run in runs for page in range(run.start // PAGE, run.end // PAGE)}


def apply(space: AddressSpace, model: Model, change: tuple[str, int, int, int]) -> None:
    """One change of a single-threaded job: the kernel unmaps what is in the way of a move, and reports that first."""
    kind, first, count, to = change
    last = min(first + count, PAGES)
    before = set(model.origin.values())
    lost: set[int] = set()
    if kind == "unmap":
        lost |= lost_pages(space.unmap(first * PAGE, last * PAGE))
        model.unmap(first, last)
    elif kind == "look":
        origins = {
            run.value // PAGE + i: run.start // PAGE + i
            for run in space.origins(first * PAGE, last * PAGE)
            for i in range((run.end - run.start) // PAGE)
        }
        assert origins == {page: model.origin[page] for page in range(first, last) if page in model.origin}
    elif to + last - first <= PAGES and (to >= last or to + last - first <= first):
        lost |= lost_pages(space.unmap(to * PAGE, (to + last - first) * PAGE))
        lost |= lost_pages(space.remap(Remap(first * PAGE, to * PAGE, (last - first) * PAGE)))
        assert not space.unsettled()
        model.remap(first, last, to)
    assert lost == before - set(model.origin.values())


pages = st.sets(st.integers(0, PAGES - 1))
areas = st.dictionaries(st.integers(0, PAGES - 1), st.booleans())
numbers = st.integers(0, PAGES - 1)
changes = st.lists(st.tuples(st.sampled_from(["unmap", "remap", "remap", "look"]), numbers, st.integers(1, 8), numbers))


@given(pages, areas, changes)
def test_it_follows_a_job(pages: set[int], areas: dict[int, bool], changes: list[tuple[str, int, int, int]]) -> None:
    space, model = build(pages, areas)
    same(space, model)
    for change in changes:
        apply(space, model, change)
        same(space, model)


@given(pages, areas, changes, changes)
def test_a_child_goes_its_own_way(
    pages: set[int],
    areas: dict[int, bool],
    before: list[tuple[str, int, int, int]],
    after: list[tuple[str, int, int, int]],
) -> None:
    space, model = build(pages, areas)
    for change in before:
        apply(space, model, change)
    child, lost = space.fork()
    inherited = {page: origin for page, origin in model.origin.items() if not model.mapped[page]}
    assert lost_pages(lost) == set(model.origin.values()) - set(inherited.values())
    childs = Model(dict(model.mapped), inherited)
    for change in after:
        apply(child, childs, change)
    same(space, model)
    same(child, childs)


@given(st.permutations(range(3)), st.sampled_from(["unmap", "move"]))
def test_reports_of_two_threads_may_come_in_any_order(order: list[int], first: str) -> None:
    """Thread 1 frees A (pages 0-3). Thread 2's mremap gets A for B (8-11). Thread 3 then gets B's old place for C (16-19)."""

    def reports() -> list[tuple[str, int, int]]:
        freeing = ("unmap", 0, 0) if first == "unmap" else ("remap", 0, 20)
        return [freeing, ("remap", 8, 0), ("remap", 16, 8)]

    space, model = build({*range(4), *range(8, 12), *range(16, 20)}, {})
    truth = reports()
    for kind, at, to in truth:
        model.unmap(at, at + 4) if kind == "unmap" else model.remap(at, at + 4, to)
    for position in order:
        kind, at, to = truth[position]
        if kind == "unmap":
            space.unmap(at * PAGE, (at + 4) * PAGE)
        else:
            space.remap(Remap(at * PAGE, to * PAGE, 4 * PAGE))
    assert not space.unsettled()
    same(space, model)


def test_a_move_that_waits_in_vain_is_carried_out_once_nothing_is_under_way() -> None:
    space, model = build({0, 1}, {})
    assert space.remap(Remap(0, PAGE, PAGE)) == []
    assert space.unsettled()
    assert space.origin(0) == 0
    assert lost_pages(space.settle()) == {1}
    model.remap(0, 1, 1)
    same(space, model)


def test_a_child_does_not_wait_for_what_is_reported_to_its_parent() -> None:
    space, model = build({*range(4), *range(8, 12)}, {})
    space.remap(Remap(8 * PAGE, 0, 4 * PAGE))
    child, lost = space.fork()
    assert lost_pages(lost) == {0, 1, 2, 3}
    model.remap(8, 12, 0)
    same(child, model)
    assert space.unsettled()
    space.unmap(0, 4 * PAGE)
    same(space, model)
