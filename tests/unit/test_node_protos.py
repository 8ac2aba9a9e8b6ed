"""The committed stubs are what the .proto files say, and the names on the wire are containerd's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from podferry.node.process import run
from podferry.protos import containers_pb2, images_pb2, namespaces_pb2, snapshots_pb2, tasks_pb2, version_pb2

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "src/podferry/protos"


def test_the_stubs_are_current(tmp_path: Path) -> None:
    run([ROOT / "scripts/proto", sys.prefix, tmp_path])
    fresh = {path.name: path.read_text() for path in (tmp_path / "podferry/protos").iterdir()}
    kept = {path.name: path.read_text() for path in PROTOS.glob("*_pb2*")}
    assert fresh == kept, "run `make proto`"


@pytest.mark.parametrize(
    ("module", "service", "methods"),
    [
        (containers_pb2, "containers.v1.Containers", {"Get", "List", "Create", "Delete"}),
        (tasks_pb2, "tasks.v1.Tasks", {"Create", "Start", "Delete", "Get", "List", "Kill", "ListPids", "Wait"}),
        (
            snapshots_pb2,
            "snapshots.v1.Snapshots",
            {"Prepare", "View", "Mounts", "Commit", "Remove", "Stat", "Update", "List", "Usage", "Cleanup"},
        ),
        (images_pb2, "images.v1.Images", {"Get", "List"}),
        (namespaces_pb2, "namespaces.v1.Namespaces", {"List"}),
        (version_pb2, "version.v1.Version", {"Version"}),
    ],
)
def test_names_on_the_wire_are_containerds(module: object, service: str, methods: set[str]) -> None:
    [found] = module.DESCRIPTOR.services_by_name.values()  # type: ignore[attr-defined]
    assert found.full_name == f"containerd.services.{service}"
    assert {method.name for method in found.methods} == methods
