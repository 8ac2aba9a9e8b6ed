"""The plan between two manifests, carried out on a model of a tree."""

from __future__ import annotations

import os
import stat
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podferry.node.upper import Entry, Manifest, TreePlan, diff
from podferry.node.upper.entries import parent_of
from podferry.node.upper.plan import LinkVerb
from podferry.node.upper.scan import scan

pytestmark = pytest.mark.unit

NAMES = [b"a", b"b", b"c"]


def entry(kind: int, ino: int, *, nlink: int = 1, ctime: int = 0) -> Entry:
    return Entry(kind, 0o644, 0, 0, 1, ino, nlink, 0, 0, 0, 0, 0, ctime, b"", (), True)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Any tree over a few names and inodes; link counts are as wrong as in a tree that changes while it is listed."""
    entries = {b"": entry(stat.S_IFDIR, 1000)}

    def fill(prefix: bytes, depth: int) -> None:
        for name in NAMES:
            kind = draw(st.sampled_from([None, stat.S_IFREG, stat.S_IFREG, stat.S_IFIFO, stat.S_IFDIR]))
            if kind is None or (kind == stat.S_IFDIR and depth == 2):
                continue
            ino = draw(st.integers(1, 5))
            entries[prefix + name] = entry(kind, ino, nlink=draw(st.integers(1, 2)), ctime=draw(st.integers(0, 9)))
            if kind == stat.S_IFDIR:
                fill(prefix + name + b"/", depth + 1)

    fill(b"", 0)
    return Manifest(entries)


@st.composite
def histories(draw: st.DrawFn) -> list[Manifest]:
    """Manifests one after the other; what is equal in two may be the same object, as `scan` would have it."""
    found = draw(st.lists(manifests(), min_size=1, max_size=4))
    for old, new in pairwise(found):
        for path, known in old.entries.items():
            now = new.entries.get(path)
            if now is not None and now.identity == known.identity and now.ctime_ns == known.ctime_ns:
                new.entries[path] = known
    return found


class Model:
    """A tree of names for inodes, strict as the receiver is."""

    def __init__(self) -> None:
        self.names: dict[bytes, object] = {b"": "directory"}
        self.refreshed: set[bytes] = set()

    def apply(self, plan: TreePlan) -> None:
        if plan.fresh:
            self.names = {b"": "directory"}
        parked = {}
        for path, slot in plan.parks:
            assert self.names[path] != "directory"
            parked[slot] = self.names.pop(path)
        for path in plan.removes:
            del self.names[path]
            for below in [name for name in self.names if name.startswith(path + b"/")]:
                del self.names[below]
        for step in plan.steps:
            assert self.names[parent_of(step.path)] == "directory"
            if step.verb is LinkVerb.KEEP:
                assert self.names[step.path] != "directory"
                continue
            assert step.path not in self.names
            if step.verb is LinkVerb.MAKE:
                self.names[step.path] = "directory" if step.entry.is_directory else object()
            elif step.verb is LinkVerb.UNPARK:
                self.names[step.path] = parked.pop(step.slot)
            else:
                assert self.names[step.leader] != "directory"
                self.names[step.path] = self.names[step.leader]
        assert not parked
        for path in plan.seals:
            assert self.names[path] == "directory"


def groups(manifest: Manifest) -> set[frozenset[bytes]]:
    found: dict[object, set[bytes]] = {}
    for path, item in manifest.entries.items():
        found.setdefault(path if item.is_directory else item.identity, set()).add(path)
    return {frozenset(paths) for paths in found.values()}


@settings(max_examples=500, deadline=None)
@given(histories())
def test_every_plan_leads_to_its_manifest(history: list[Manifest]) -> None:
    model, before = Model(), None
    for manifest in history:
        model.apply(diff(before, manifest))
        assert model.names.keys() == manifest.entries.keys()
        found: dict[object, set[bytes]] = {}
        for path, inode in model.names.items():
            found.setdefault(path if inode == "directory" else inode, set()).add(path)
        assert {frozenset(paths) for paths in found.values()} == groups(manifest)
        before = manifest


@given(histories())
def test_every_inode_that_changed_in_place_is_looked_at_once(history: list[Manifest]) -> None:
    for old, new in pairwise(history):
        plan = diff(old, new)
        looked_at = [step.entry.identity for step in plan.steps if step.verb is not LinkVerb.LINK]
        files = [identity for identity in looked_at if identity[2] != stat.S_IFDIR]
        assert len(files) == len(set(files))
        for path, item in new.entries.items():
            if item is not old.entries.get(path) and not item.is_directory:
                kept = any(
                    known is now and now.identity == item.identity
                    for known, now in ((old.entries.get(name), new.entries[name]) for name in new.entries)
                )
                assert item.identity in files or kept


def test_directories_are_sealed_when_their_content_changes() -> None:
    directory = entry(stat.S_IFDIR, 1)
    old = Manifest({b"": directory, b"d": directory, b"d/f": entry(stat.S_IFREG, 2)})
    new = Manifest({b"": directory, b"d": directory, b"d/g": entry(stat.S_IFREG, 3)})
    plan = diff(old, new)
    assert plan.removes == (b"d/f",)
    assert [step.verb for step in plan.steps] == [LinkVerb.MAKE]
    assert plan.seals == (b"d",)


def test_a_swap_parks_both_files() -> None:
    root, one, two = entry(stat.S_IFDIR, 1), entry(stat.S_IFREG, 2), entry(stat.S_IFREG, 3)
    plan = diff(Manifest({b"": root, b"a": one, b"b": two}), Manifest({b"": root, b"a": two, b"b": one}))
    assert len(plan.parks) == 2
    assert [step.verb for step in plan.steps] == [LinkVerb.UNPARK, LinkVerb.UNPARK]
    assert plan.removes == ()


def test_what_criu_makes_and_removes_beside_the_last_pass_is_not_the_jobs(tmp_path: Path) -> None:
    for name in ("tmp/cr-tmpfs.oj6lB0", "cr-tmpfs.FMRjF8", "tmp/cr-tmpfs.of-a-job", "var/cr-tmpfs.oj6lB0"):
        (tmp_path / name).mkdir(parents=True)
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        running = scan(root)
        theirs = {b"tmp/cr-tmpfs.oj6lB0", b"cr-tmpfs.FMRjF8"}
        assert running.entries.keys() - scan(root, frozen=True).entries.keys() == theirs
        assert scan(root, running, frozen=True).entries.keys() >= theirs, "what was there before the dump stays"
    finally:
        os.close(root)
