"""What is generated from the typed classes is what is committed, and is what Kubernetes takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import podferry
from podferry.controller import failures
from podferry.core.migration import (
    MIGRATION,
    MIGRATION_ENDS,
    OUTCOME_OF_END,
    MigrationPhase,
    migration_diagram,
    migration_machine,
)
from podferry.errors import Bug
from podferry.kube import migration
from podferry.kube.migration import Migration
from podferry.kube.quantities import duration, quantity, seconds
from podferry.kube.schema import definition, definition_yaml, policies_yaml, reference, structural
from podferry.kube.writers import MIGRATION_CONDITIONS, MIGRATION_STATUS

pytestmark = pytest.mark.unit
ROOT = Path(podferry.__file__).parents[2]


def test_the_committed_files_are_the_generated_ones() -> None:
    assert (ROOT / "deploy/crds/podferry.dev_migrations.yaml").read_text() == definition_yaml(), (
        "run scripts/crds .venv"
    )
    assert (ROOT / "docs/api.md").read_text() == reference(), "run scripts/crds .venv"
    assert (ROOT / "deploy/status-policy.yaml").read_text() == policies_yaml(), "run scripts/crds .venv"
    assert yaml.safe_load(definition_yaml()) == definition()


def test_every_field_of_a_status_has_its_writers() -> None:
    fields = structural(Migration)["properties"]["status"]["properties"]
    groups = {path.partition(".")[0] for path in MIGRATION_STATUS if "." in path}
    wanted = {name for name in fields if name not in groups} - {"conditions"}
    wanted |= {f"{group}.{name}" for group in groups for name in fields[group]["properties"]}
    assert set(MIGRATION_STATUS) == wanted, "name the writers of each field in podferry.kube.writers"


def test_the_schema_is_structural() -> None:
    def walk(schema: dict[str, Any], path: str) -> None:
        assert "type" in schema, f"{path} has no type"
        assert not {"$ref", "anyOf", "oneOf", "title", "nullable"} & set(schema), path
        for name, inner in schema.get("properties", {}).items():
            walk(inner, f"{path}.{name}")
        if "items" in schema:
            walk(schema["items"], f"{path}[]")

    walk(structural(Migration), "")


def test_every_column_shows_a_field_that_exists() -> None:
    schema = structural(Migration)
    for column in definition()["spec"]["versions"][0]["additionalPrinterColumns"]:
        here = schema
        for step in column["jsonPath"].strip(".").split("."):
            if step == "creationTimestamp":
                break
            here = here["properties"][step]


def test_a_migration_survives_reading_and_writing_and_keeps_what_it_does_not_know() -> None:
    body = {
        "apiVersion": "podferry.dev/v1alpha1",
        "kind": "Migration",
        "metadata": {"name": "move", "namespace": "default", "uid": "u"},
        "spec": {"podName": "train", "ofTheFuture": 1},
        "status": {"phase": "Running", "alsoNew": {"a": 1}},
    }
    back = Migration.from_json(body).to_json()
    assert back["spec"]["ofTheFuture"] == 1
    assert back["status"]["alsoNew"] == {"a": 1}
    assert Migration.from_json(back) == Migration.from_json(body)


def test_a_conditions_time_changes_only_with_its_status() -> None:
    migration = Migration.from_json({"metadata": {}, "spec": {"podName": "train"}})
    migration.status.set_condition("TargetReady", False, "NotYet")
    first = migration.status.condition("TargetReady")
    assert first is not None
    first.last_transition_time = "2001-01-01T00:00:00Z"
    migration.status.set_condition("TargetReady", False, "StillNot")
    again = migration.status.condition("TargetReady")
    assert again is not None
    assert (again.reason, again.last_transition_time) == ("StillNot", "2001-01-01T00:00:00Z")
    migration.status.set_condition("TargetReady", True, "Waiting")
    assert migration.status.holds("TargetReady")
    assert migration.status.condition("TargetReady").last_transition_time > "2001"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "value"), [("250ms", 0.25), ("1h30m", 5400.0), ("1.5s", 1.5), ("2m", 120.0), ("1m1s1ms", 61.001)]
)
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "5", "s", "5 s", "5d", "1h30", "ms5"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError):
        seconds(text)


@pytest.mark.parametrize("value", [0.0, 0.0004, 0.412, 1.5, 59.0, 7200.0])
def test_a_duration_can_be_read_back(value: float) -> None:
    assert seconds(duration(value)) == pytest.approx(value, rel=0.02, abs=0.001)


def test_quantities() -> None:
    assert [quantity(one) for one in ("50Mi", "1.5k", "7")] == [50 << 20, 1500, 7]


def test_the_table_ends_everywhere() -> None:
    """From every phase an end can be reached, every end has an outcome, and no phase but an end is a dead end."""
    for start in MigrationPhase:
        seen, todo = {start}, [start]
        while todo:
            for after in MIGRATION[todo.pop()].values():
                if after not in seen:
                    seen.add(after)
                    todo.append(after)
        assert seen & MIGRATION_ENDS
    assert set(OUTCOME_OF_END) == MIGRATION_ENDS


def test_what_the_table_does_not_list_is_a_bug() -> None:
    with pytest.raises(Bug):
        migration_machine().fire(next(iter(MIGRATION[MigrationPhase.UNDOING])))


def test_the_diagram_of_the_phases_is_the_tables() -> None:
    assert migration_diagram() in (ROOT / "docs/migrations.md").read_text(), "run scripts/crds .venv"


def test_every_reason_has_its_line_in_the_table_of_eligibility() -> None:
    sources = (ROOT / f"src/podferry/controller/{name}.py" for name in ("eligibility", "policies", "surroundings"))
    said = {word for source in sources for word in re.findall(r'unfit\(\s*"(\w+)"', source.read_text())}
    page = (ROOT / "docs/migrations.md").read_text()
    assert len(said) > 20
    assert (
        sorted(one for one in said | {"HostNetwork", "HostPID", "HostIPC", "PodNotFound"} if f"`{one}`" not in page)
        == []
    )


def test_every_trouble_is_in_the_table_of_what_goes_wrong() -> None:
    page = (ROOT / "docs/migrations.md").read_text()
    words = [failures.UNSCHEDULABLE, failures.QUOTA_EXCEEDED, failures.WEBHOOK_DENIED, failures.NAMESPACE_TERMINATING]
    words += [failures.TARGET_POD_GONE, failures.TARGET_POD_FAILED, failures.TARGET_NODE_LOST, failures.POD_DELETED]
    words += [failures.JOB_SUSPENDED, failures.CANCEL_REQUESTED, failures.TIMED_OUT, failures.VOLUME_MISSING]
    words += [failures.TARGET_POD_STUCK, failures.NAME_TAKEN, failures.JOB_DIED, failures.SOURCE_NODE_LOST]
    assert [one for one in words if f"`{one}`" not in page] == []


def test_the_policy_lets_agents_say_the_conditions_that_they_say() -> None:
    """What it denies, an agent cannot tell: the controller would wait for the end of a move that is over."""
    agent = Path(migration.__file__).parents[1] / "agent"
    said = {
        name
        for path in agent.glob("*.py")
        for name in re.findall(r"status\.set_condition\(\s*([A-Z_]+)", path.read_text())
    }
    assert {getattr(migration, name) for name in said} | {migration.TARGET_READY_BEFORE} == set(MIGRATION_CONDITIONS)
