"""The snapshot database: rules that need no mounts, and crashes between any two statements."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from podferry.errors import PodferryError, UsageError
from podferry.snapshotter.filters import parse
from podferry.snapshotter.metadata import Metadata, MetadataBroken, SnapshotExists, SnapshotInvalid, SnapshotMissing
from podferry.snapshotter.snapshot_row import Home, SnapshotKind, SnapshotRow

pytestmark = pytest.mark.unit

CHAIN = "sha256:" + "e" * 64


@pytest.fixture
def metadata(tmp_path: Path) -> Metadata:
    return Metadata(tmp_path / "metadata.db")


def layer(metadata: Metadata, name: str, parent: str = "", chain: str | None = CHAIN) -> SnapshotRow:
    metadata.create(SnapshotKind.ACTIVE, f"{name}-key", parent, {})
    return metadata.commit(name, f"{name}-key", {}, size=(10, 1), chain=chain)


def test_a_layer_is_found_by_its_chain_on_its_parent_only(metadata: Metadata) -> None:
    base = layer(metadata, "base", chain=None)
    made = layer(metadata, "x", "base")
    assert metadata.layer(CHAIN, "base") == made
    assert metadata.layer(CHAIN, "") is None
    assert metadata.lineage("x") == [made, base]


def test_a_second_layer_of_one_chain_gets_a_name_of_its_own(metadata: Metadata) -> None:
    layer(metadata, "base", chain=None)
    first = metadata.refer(CHAIN, "", CHAIN, {})
    second = metadata.refer(CHAIN, "base", CHAIN, {})
    assert first.name == CHAIN
    assert second.name.startswith(f"{CHAIN}@")
    assert metadata.layer(CHAIN, "base") == second
    assert [first.home, second.home] == [Home.SHARE, Home.SHARE]


def test_a_copy_on_disk_is_kept_for_those_who_may_have_it_mounted(metadata: Metadata) -> None:
    made = layer(metadata, "x")
    metadata.create(SnapshotKind.ACTIVE, "before", "x", {})
    metadata.create(SnapshotKind.ACTIVE, "mid-key", "x", {})
    metadata.commit("mid", "mid-key", {}, size=(1, 1), chain=None)
    metadata.create(SnapshotKind.VIEW, "grandchild", "mid", {})
    metadata.move(made.id, Home.SHARE)
    metadata.create(SnapshotKind.ACTIVE, "after", "x", {})
    assert metadata.users_of_copy(metadata.get("x")) == 2
    metadata.remove("grandchild")
    assert metadata.users_of_copy(metadata.get("x")) == 1
    metadata.remove("before")
    assert metadata.users_of_copy(metadata.get("x")) == 0
    metadata.emptied(made.id)
    assert (metadata.get("x").bytes, metadata.get("x").moved_at) == (0, None)


def test_a_fact_is_made_once(metadata: Metadata, tmp_path: Path) -> None:
    assert metadata.fact("instance", lambda: "one") == "one"
    metadata.close()
    assert Metadata(tmp_path / "metadata.db").fact("instance", lambda: "two") == "one"


def test_closing_twice_is_fine(metadata: Metadata) -> None:
    metadata.close()
    metadata.close()


def test_a_file_that_is_no_database_is_named_with_a_way_out(tmp_path: Path) -> None:
    path = tmp_path / "metadata.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(MetadataBroken, match=r"metadata\.db") as caught:
        Metadata(path)
    assert "pull" in caught.value.remedy


def test_a_name_is_needed(metadata: Metadata) -> None:
    with pytest.raises(SnapshotInvalid):
        metadata.create(SnapshotKind.ACTIVE, "", "", {})


class Crash(Exception):
    pass


class Failing:
    """A connection that dies at its n-th statement, as a killed process does."""

    def __init__(self, db: sqlite3.Connection, after: int) -> None:
        self.db, self.left = db, after

    def __getattr__(self, name: str) -> object:
        return getattr(self.db, name)

    def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
        if not sql.startswith("ROLLBACK"):
            self.left -= 1
            if self.left < 0:
                raise Crash
        return self.db.execute(sql, *values)


def test_a_crash_at_any_statement_leaves_the_state_before_or_after(tmp_path: Path) -> None:
    def steps(metadata: Metadata) -> None:
        metadata.create(SnapshotKind.ACTIVE, "k", "base", {"a": "b"})
        metadata.commit("x", "k", {}, size=(1, 2), chain=CHAIN)
        metadata.update("x", {"l": "v"})
        metadata.remove("x")

    for after in range(60):
        path = tmp_path / f"{after}.db"
        metadata = Metadata(path)
        layer(metadata, "base", chain=None)
        metadata._db = Failing(metadata._db, after)  # type: ignore[assignment]
        try:
            steps(metadata)
            done = True
        except Crash:
            done = False
        reopened = Metadata(path)
        names = {one.name: one for one in reopened.all()}
        assert set(names) in ({"base"}, {"base", "k"}, {"base", "x"})
        if "k" in names:
            assert names["k"].kind is SnapshotKind.ACTIVE
            assert names["k"].labels == {"a": "b"}
        if "x" in names:
            assert names["x"].kind is SnapshotKind.COMMITTED
            assert names["x"].parent == "base"
            assert names["x"].chain == CHAIN
        if done:
            return
    raise AssertionError("never got to the end")


NAMES = st.sampled_from(["a", "b", "c", "d"])
CALLS = st.lists(
    st.tuples(st.sampled_from(["prepare", "view", "commit", "remove"]), NAMES, st.sampled_from(["", "a", "b", "c"])),
    max_size=30,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CALLS)
def test_any_sequence_of_calls_matches_a_plain_model(calls: list[tuple[str, str, str]]) -> None:
    metadata = Metadata(Path(":memory:"))
    model: dict[str, tuple[SnapshotKind, str]] = {}
    for call, name, other in calls:
        committed = not other or model.get(other, (None,))[0] is SnapshotKind.COMMITTED
        children = [one for one, (_, parent) in model.items() if parent == name]
        match call:
            case "prepare" | "view":
                kind = SnapshotKind.ACTIVE if call == "prepare" else SnapshotKind.VIEW
                allowed = name not in model and committed
                act = lambda: metadata.create(kind, name, other, {})  # noqa: E731, B023
            case "commit":
                allowed = bool(other) and model.get(other, (None,))[0] is SnapshotKind.ACTIVE and name not in model
                act = lambda: metadata.commit(name, other, {}, size=(0, 0), chain=None)  # noqa: E731, B023
            case _:
                allowed = name in model and not children
                act = lambda: metadata.remove(name)  # noqa: E731, B023
        try:
            act()
        except PodferryError:
            assert not allowed, (call, name, other, model)
            continue
        assert allowed, (call, name, other, model)
        match call:
            case "prepare" | "view":
                model[name] = (kind, other)
            case "commit":
                model[name] = (SnapshotKind.COMMITTED, model.pop(other)[1])
            case _:
                del model[name]
        assert {one.name: (one.kind, one.parent) for one in metadata.all()} == model


def test_errors_say_which(metadata: Metadata) -> None:
    metadata.create(SnapshotKind.ACTIVE, "a", "", {})
    with pytest.raises(SnapshotExists, match="a already exists"):
        metadata.create(SnapshotKind.VIEW, "a", "", {})
    with pytest.raises(SnapshotMissing, match="parent snapshot p"):
        metadata.create(SnapshotKind.ACTIVE, "b", "p", {})


LABELS = {"name": "it's", "labels": {"a.b/c": "1,2", "empty": ""}}


def field(path: list[str]) -> str | None:
    if path[0] == "labels":
        return LABELS["labels"].get(".".join(path[1:]))  # type: ignore[attr-defined, no-any-return]
    return LABELS.get(path[0])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", True),
        ('labels."a.b/c"=="1,2"', True),
        ('labels."a.b/c"', True),
        ("labels.empty", True),
        ("labels.empty==", None),
        ('labels.empty==""', True),
        ("labels.none", False),
        ('labels.none!=""', False),
        ("labels.none!=x", True),
        ("name==it's", True),
        ("name==it's,labels.none", False),
        ('name~="^it"', True),
        ("name~=|t's$|", True),
        ("name~=/x/", False),
        ("name=x", None),
        ("name==", None),
        ("==x", None),
        ("name==x,", None),
        ('name=="x', None),
        ("name~=/(/", None),
        ("a..b", None),
    ],
)
def test_filters_read_as_containerds(text: str, wanted: bool | None) -> None:
    if wanted is None:
        with pytest.raises(UsageError):
            parse([text])
    else:
        assert parse([text])(field) is wanted
