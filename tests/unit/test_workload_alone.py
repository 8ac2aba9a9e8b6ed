"""Containers alone on a target: what the node lacks of what an offer needs, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from podferry.errors import Refused
from podferry.node import apparmor
from podferry.node.containerd import Containerd
from podferry.node.records import Container, Opaque, Stdio
from podferry.workload.config import Config
from podferry.workload.kinds.alone import ContainersAlone
from podferry.workload.offered import OfferedContainer

pytestmark = pytest.mark.unit


class FakeContainerd:
    """A containerd with these containers, and an image store without the layers `lacks`."""

    def __init__(self, ids: Sequence[str] = (), lacks: Sequence[str] = ()) -> None:
        self._ids, self._lacks = ids, lacks

    def containers(self) -> list[Any]:
        return [SimpleNamespace(id=one) for one in self._ids]

    def find_layers(self, snapshotter: str, layers: Sequence[str]) -> str:
        return next((one for one in layers if one in self._lacks), "")


def offer(log: Path | None, profile: str = "") -> OfferedContainer:
    spec = json.dumps({"process": {"apparmorProfile": profile}} if profile else {}).encode()
    record = Container("job", "numpy:latest", "overlayfs", "job", Opaque("types.containerd.io/Spec", spec))
    stdio = Stdio(stdout=f"file://{log}", stderr=f"file://{log}") if log else Stdio()
    return OfferedContainer(
        record, layers=("sha256:low", "sha256:top"), stdio=stdio, staying={"sha256:top": "a socket"}
    )


def missing(tmp_path: Path, containerd: FakeContainerd, offered: OfferedContainer) -> list[Refused]:
    config = Config("b", "b:1", tmp_path, {}, run=tmp_path, state=tmp_path, logs=tmp_path / "logs")
    return list(ContainersAlone(config, cast(Containerd, containerd)).missing(offered))


@pytest.fixture(autouse=True)
def no_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apparmor, "_loaded", lambda profiles: set())


def test_a_node_that_has_everything_lacks_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert missing(tmp_path, FakeContainerd(["other"]), offer(tmp_path / "logs/job.log")) == []


def test_a_node_without_the_apparmor_profile_refuses(tmp_path: Path) -> None:
    (only,) = missing(tmp_path, FakeContainerd(), offer(None, "mine"))
    assert "AppArmor profile 'mine'" in str(only)


def test_a_node_with_a_container_of_that_name_refuses(tmp_path: Path) -> None:
    (only,) = missing(tmp_path, FakeContainerd(["job"]), offer(None))
    assert "a container named job on b already" in str(only)


def test_a_node_without_the_image_names_the_first_layer_and_why_it_is_not_shared(tmp_path: Path) -> None:
    (only,) = missing(tmp_path, FakeContainerd(lacks=["sha256:top"]), offer(None))
    assert "the image numpy:latest is not on b" in str(only)
    assert "layer sha256:top, which stays on the source's disk: a socket" in only.why
    (shared,) = missing(tmp_path, FakeContainerd(lacks=["sha256:low"]), offer(None))
    assert shared.why.endswith("the layer sha256:low")


def test_a_node_whose_log_would_be_overwritten_refuses(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/job.log").write_text("somebody else's")
    (only,) = missing(tmp_path, FakeContainerd(), offer(tmp_path / "logs/job.log"))
    assert "job.log" in str(only)


def test_every_reason_is_given_at_once(tmp_path: Path) -> None:
    found = missing(tmp_path, FakeContainerd(["job"], ["sha256:low"]), offer(None, "mine"))
    assert len(found) == 3
