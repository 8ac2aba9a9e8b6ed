"""The client against a server that plays containerd: what is asked, what comes back, and errors as ours."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from hypothesis import given
from hypothesis import strategies as st

from podferry.errors import PeerMisbehaved, Refused, TimedOut
from podferry.node import containerd
from podferry.node.containerd import Containerd
from podferry.node.containerd_errors import (
    ContainerdAlreadyExists,
    ContainerdFailed,
    ContainerdNotFound,
    ContainerdUnreachable,
)
from podferry.node.records import Container, Opaque, SnapshotMount, Stdio, TaskStatus, lower_dirs, upper_dir
from podferry.protos import (
    containers_pb2,
    containers_pb2_grpc,
    snapshots_pb2,
    snapshots_pb2_grpc,
    tasks_pb2,
    tasks_pb2_grpc,
    types_pb2,
)
from podferry.protos.runc_pb2 import Options

pytestmark = pytest.mark.unit

OPTIONS = Opaque("containerd.runc.v1.Options", Options(binary_name="/usr/bin/podferry-runc").SerializeToString())
RECORD = Container(
    id="job",
    image="example.org/job:1",
    snapshotter="overlayfs",
    snapshot_key="job",
    spec=Opaque("types.containerd.io/opencontainers/runtime-spec/1/Spec", b'{"linux":{"cgroupsPath":"/default/job"}}'),
    options=OPTIONS,
    labels={"team": "physics"},
    extensions={"x": Opaque("type", b"\x00\x01")},
)
OVERLAY = SnapshotMount(
    "overlay", "overlay", ("index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs")
)


class Fake:
    """Plays the services; remembers what it was asked, in which namespace."""

    def __init__(self) -> None:
        self.records: dict[str, Any] = {}
        self.asked: list[tuple[str, Any]] = []
        self.namespaces: set[str] = set()

    def note(self, request: Any, context: grpc.ServicerContext) -> None:
        self.asked.append((type(request).__name__, request))
        self.namespaces |= {str(value) for key, value in context.invocation_metadata() if key == "containerd-namespace"}


class Containers(Fake, containers_pb2_grpc.ContainersServicer):
    def Get(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.note(request, context)
        if request.id not in self.records:
            context.abort(grpc.StatusCode.NOT_FOUND, f"container {request.id!r} in namespace: not found")
        return containers_pb2.GetContainerResponse(container=self.records[request.id])

    def List(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.note(request, context)
        return containers_pb2.ListContainersResponse(containers=self.records.values())

    def Create(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.note(request, context)
        if request.container.id in self.records:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "already exists")
        self.records[request.container.id] = request.container
        return containers_pb2.CreateContainerResponse(container=request.container)

    def Delete(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.note(request, context)
        self.records.pop(request.id)
        return Empty()


class Snapshots(Fake, snapshots_pb2_grpc.SnapshotsServicer):
    """`records` are parents by name; `shared` are layers that are on a share. `collect` loses what was found once."""

    def __init__(self) -> None:
        super().__init__()
        self.records = {"sha256:chain": ""}
        self.shared: set[str] = set()
        self.collect = False
        self.makers: list[str] = []

    def Prepare(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.note(request, context)
        wanted = request.labels.get("containerd.io/snapshot.ref")
        if wanted in self.shared:
            self.records[wanted] = request.parent
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"layer {wanted} is there already")
        if self.collect and not wanted:
            self.collect = False
            for one in self.shared:
                self.records.pop(one, None)
        if request.parent and request.parent not in self.records:
            context.abort(grpc.StatusCode.NOT_FOUND, f"parent snapshot {request.parent} does not exist: not found")
        self.records[request.key] = request.parent
        return snapshots_pb2.PrepareSnapshotResponse(mounts=[OVERLAY.message()])

    def Stat(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.note(request, context)
        if request.key not in self.records:
            context.abort(grpc.StatusCode.NOT_FOUND, f"snapshot {request.key} does not exist: not found")
        info = snapshots_pb2.Info(name=request.key, parent=self.records[request.key], kind=snapshots_pb2.ACTIVE)
        if request.key.startswith("podferry-find-") and self.makers:
            info.labels["podferry.dev/layer-maker"] = self.makers.pop(0)
            if not self.makers:
                self.shared.add("sha256:middle")
        return snapshots_pb2.StatSnapshotResponse(info=info)

    def Remove(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.note(request, context)
        del self.records[request.key]
        return Empty()


class Tasks(Fake, tasks_pb2_grpc.TasksServicer):
    def Create(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.note(request, context)
        return tasks_pb2.CreateTaskResponse(container_id=request.container_id, pid=4711)

    def Get(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.note(request, context)
        process = tasks_pb2.Process(id=request.container_id, pid=4711, status=99, stdout="file:///var/log/job")  # type: ignore[arg-type]
        return tasks_pb2.GetResponse(process=process)

    def Wait(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.note(request, context)
        if request.container_id == "endless":
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "context deadline exceeded")
        return tasks_pb2.WaitResponse(exit_status=137)

    def Start(self, request: Any, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.UNKNOWN, "OCI runtime create failed: no\nsecond line")


@pytest.fixture
def fakes() -> dict[str, Fake]:
    return {"containers": Containers(), "snapshots": Snapshots(), "tasks": Tasks()}


@pytest.fixture
def client(fakes: dict[str, Fake], tmp_path: Path) -> Iterator[Containerd]:
    server = grpc.server(ThreadPoolExecutor(2))
    containers_pb2_grpc.add_ContainersServicer_to_server(fakes["containers"], server)
    snapshots_pb2_grpc.add_SnapshotsServicer_to_server(fakes["snapshots"], server)
    tasks_pb2_grpc.add_TasksServicer_to_server(fakes["tasks"], server)
    server.add_insecure_port(f"unix://{tmp_path}/containerd.sock")
    server.start()
    with Containerd(tmp_path / "containerd.sock", "k8s.io") as client:
        yield client
    server.stop(None).wait()


def test_a_record_survives_the_way_to_another_node(client: Containerd, fakes: dict[str, Fake]) -> None:
    client.create_container(RECORD)
    assert client.container("job") == RECORD
    assert client.containers() == (RECORD,)
    assert Container.from_bytes(client.container("job").to_bytes()) == RECORD
    assert RECORD.spec_json()["linux"]["cgroupsPath"] == "/default/job"
    assert RECORD.runc_options().binary_name == "/usr/bin/podferry-runc"
    assert client.runc_root(RECORD) == Path("/run/containerd/runc/k8s.io")
    with pytest.raises(ContainerdAlreadyExists):
        client.create_container(RECORD)
    client.delete_container("job")
    with pytest.raises(ContainerdNotFound) as missing:
        client.container("job")
    assert "not found" in missing.value.why
    assert fakes["containers"].namespaces == {"k8s.io"}


def test_a_missing_image_is_refused_by_name(client: Containerd) -> None:
    assert client.prepare("overlayfs", "job", ["sha256:chain"]) == (OVERLAY,)
    assert client.snapshot("overlayfs", "job").parent == "sha256:chain"
    with pytest.raises(Refused) as refused:
        client.prepare("overlayfs", "other", ["sha256:chain", "sha256:other"], image="example.org/job:1", node="node-b")
    assert "example.org/job:1" in refused.value.what and "node-b" in refused.value.what
    assert "sha256:other" in refused.value.why
    assert "pull the image" in refused.value.remedy


def test_a_layer_that_another_node_publishes_is_waited_for_as_long_as_that_node_lives(
    client: Containerd, fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**9, 50))
    monkeypatch.setattr(containerd, "time", SimpleNamespace(monotonic=lambda: float(next(clock)), sleep=lambda _: None))
    snapshots = fakes["snapshots"]
    assert isinstance(snapshots, Snapshots)
    snapshots.makers = [f"node-b 1.{beat}" for beat in range(30)]
    assert client.find_layers("podferry", ["sha256:chain", "sha256:middle"]) is None
    assert snapshots.makers == [], "1,500 seconds, since it got on"
    assert set(snapshots.records) == {"sha256:chain", "sha256:middle"}, "what was prepared to ask is removed"


@pytest.mark.parametrize(
    "makers", [["node-b 1.7"] * 9, [f"node-b 1.{beat}" for beat in range(500)], ["node-b 1.7", "", "", "", ""]]
)
def test_a_node_that_is_silent_or_takes_for_ever_or_has_given_up_is_not_waited_for(
    client: Containerd, fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch, makers: list[str]
) -> None:
    clock = iter(range(0, 10**9, 50))
    monkeypatch.setattr(containerd, "time", SimpleNamespace(monotonic=lambda: float(next(clock)), sleep=lambda _: None))
    snapshots = fakes["snapshots"]
    assert isinstance(snapshots, Snapshots)
    snapshots.makers = list(makers)
    assert client.find_layers("podferry", ["sha256:chain", "sha256:middle"]) == "sha256:middle"
    assert snapshots.makers


def test_layers_that_a_node_has_never_seen_come_from_the_share(client: Containerd, fakes: dict[str, Fake]) -> None:
    snapshots = fakes["snapshots"]
    assert isinstance(snapshots, Snapshots)
    layers = ["sha256:chain", "sha256:middle", "sha256:top"]
    assert client.find_layers("podferry", layers) == "sha256:middle"
    assert set(snapshots.records) == {"sha256:chain"}, "what was prepared to ask is removed"
    snapshots.shared = {"sha256:middle", "sha256:top"}
    assert client.find_layers("podferry", layers) is None
    snapshots.collect = True
    assert client.prepare("podferry", "job", layers) == (OVERLAY,)
    assert not snapshots.collect
    assert client.lineage("podferry", "job") == tuple(layers)
    snapshots.shared = set()
    snapshots.collect = True
    del snapshots.records["sha256:top"]
    with pytest.raises(Refused, match="not on this node"):
        client.prepare("podferry", "again", layers)


def test_tasks(client: Containerd, fakes: dict[str, Fake]) -> None:
    client.create_container(RECORD)
    assert client.create_task("job", [OVERLAY], Stdio(stdout="file:///var/log/job")) == 4711
    [(_, request)] = [one for one in fakes["tasks"].asked if one[0] == "CreateTaskRequest"]
    assert request.stdout == "file:///var/log/job" and request.options.value == OPTIONS.value
    assert [types_pb2.Mount(type=mount.type) for mount in request.rootfs] == [types_pb2.Mount(type="overlay")]
    task = client.task("job")
    assert (task.id, task.pid, task.status, task.stdout) == ("job", 4711, TaskStatus.UNKNOWN, "file:///var/log/job")
    assert client.wait_task("job") == 137
    with pytest.raises(TimedOut):
        client.wait_task("endless")
    with pytest.raises(ContainerdFailed) as failed:
        client.start_task("job")
    assert "OCI runtime create failed" in failed.value.why and failed.value.evidence == ["second line"]
    with pytest.raises(ContainerdFailed):
        client.pids("job")  # not served here


def test_nobody_is_there(tmp_path: Path) -> None:
    with Containerd(tmp_path / "none.sock") as client, pytest.raises(ContainerdUnreachable) as nobody:
        client.version()
    assert str(tmp_path) in nobody.value.why and nobody.value.remedy


def test_the_directories_of_a_root() -> None:
    assert upper_dir([OVERLAY]) == Path("/s/3/fs")
    assert lower_dirs([OVERLAY]) == (Path("/s/2/fs"), Path("/s/1/fs"))
    plain = SnapshotMount("bind", "/s/1/fs", ("rw", "rbind"))
    assert (upper_dir([plain]), lower_dirs([plain])) == (Path("/s/1/fs"), ())
    for mounts in (
        [],
        [SnapshotMount("bind", "/s/1", ("ro",))],
        [SnapshotMount("overlay", "overlay", ("lowerdir=/s/1",))],
    ):
        with pytest.raises(Refused):
            upper_dir(mounts)


@given(st.binary(max_size=200))
def test_bytes_from_a_peer_are_a_record_or_an_error(data: bytes) -> None:
    try:
        record = Container.from_bytes(data)
    except PeerMisbehaved:
        return
    assert Container.from_bytes(record.to_bytes()) == record


names = st.text(max_size=20)
records = st.builds(
    Container,
    id=names.filter(bool),
    image=names,
    snapshotter=names,
    snapshot_key=names,
    spec=st.builds(Opaque, names, st.binary(min_size=1)),
    runtime=names,
    options=st.none() | st.builds(Opaque, names, st.binary()),
    labels=st.dictionaries(names, names, max_size=3),
    extensions=st.dictionaries(names, st.builds(Opaque, names, st.binary()), max_size=2),
    sandbox=names,
)


@given(records)
def test_any_record_travels_unchanged(record: Container) -> None:
    assert Container.from_bytes(record.to_bytes()) == record


def test_a_spec_that_is_none(tmp_path: Path) -> None:
    for value in (b"[1]", b"{"):
        with pytest.raises(PeerMisbehaved):
            dataclasses.replace(RECORD, spec=Opaque("", value)).spec_json()
    broken = dataclasses.replace(RECORD, options=Opaque("containerd.runc.v1.Options", b"\xff\xff"))
    assert broken.runc_options() == Options()
    assert json.loads(RECORD.spec.value)
