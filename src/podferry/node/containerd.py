"""containerd's API on its unix socket: containers, snapshots and tasks, typed and synchronous.

One method a call; results are frozen. Only records and requests pass through here, so a call costs well below a
millisecond, except for those that make the shim work (`create_task` waits for the OCI runtime's `create`).
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from podferry.core.facts import RuntimeKind
from podferry.errors import Refused
from podferry.node.containerd_errors import ContainerdAlreadyExists, ContainerdNotFound, errors_of
from podferry.node.pod_records import filter_of, filter_of_containers, latest, log_of, of_containerd
from podferry.node.records import (
    Container,
    Image,
    Opaque,
    PodContainer,
    Snapshot,
    SnapshotMount,
    Stdio,
    Task,
    upper_dir,
)
from podferry.protos import (
    containers_pb2,
    images_pb2,
    namespaces_pb2,
    snapshots_pb2,
    tasks_pb2,
    version_pb2,
)

SOCKET = Path("/run/containerd/containerd.sock")
STATE = Path("/run/containerd")
CALL_TIMEOUT = 30.0  # seconds
FIND_TIMEOUT = 90.0
"""Seconds for one look for a layer; longer than the snapshotter waits in it for one that another node is publishing."""
FIND_PAUSE = 2.0
MAKER_SILENT = 60.0
"""Seconds without a sign of life of the node that publishes a layer, after which it is not waited for. It gives one every ten."""
FIND_LONGEST = 3600.0
"""Seconds for which one layer is waited for, whatever its publisher says."""
COLLECTED = 3
"""How often layers are looked for that containerd's garbage collector takes away again before they are used."""
LAYER = "containerd.io/snapshot.ref"
"""The label that names the layer which a snapshot is to become."""
LAYER_STAYS = "podferry.dev/layer-stays"
LAYER_MAKER = "podferry.dev/layer-maker"
"""Labels that podferry-snapshotter gives: why a layer is not shared; which node is publishing it, with a count that rises."""
"""The label by which podferry-snapshotter says of a layer that it is not shared, and why."""

Answer = TypeVar("Answer", bound=Message)


class Containerd:
    """A connection to one containerd, for one of its namespaces (`k8s.io` is the kubelet's)."""

    kind = RuntimeKind.CONTAINERD

    def __init__(self, socket: Path = SOCKET, namespace: str = "default") -> None:
        self.socket = socket
        self.namespace = namespace
        self._channel = grpc.insecure_channel(
            f"unix://{socket}",
            options=[("grpc.max_receive_message_length", 64 << 20), ("grpc.enable_http_proxy", 0)],
        )

    def close(self) -> None:
        """Close the connection; calls under way end with an error."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What is there.

    def version(self) -> str:
        """containerd's version, such as `1.7.24`."""
        return self._call("version.v1.Version/Version", Empty(), version_pb2.VersionResponse, "ask its version").version

    def namespaces(self) -> tuple[str, ...]:
        """The names of containerd's namespaces."""
        answer = self._call(
            "namespaces.v1.Namespaces/List",
            namespaces_pb2.ListNamespacesRequest(),
            namespaces_pb2.ListNamespacesResponse,
            "list its namespaces",
        )
        return tuple(namespace.name for namespace in answer.namespaces)

    def image(self, name: str) -> Image:
        """The record of an image. Raises `ContainerdNotFound`."""
        request = images_pb2.GetImageRequest(name=name)
        image = self._call("images.v1.Images/Get", request, images_pb2.GetImageResponse, f"find image {name}").image
        return Image(image.name, image.target.digest, image.target.media_type, dict(image.labels))

    # Containers.

    def container(self, id: str) -> Container:
        """The record of a container. Raises `ContainerdNotFound`."""
        request = containers_pb2.GetContainerRequest(id=id)
        return Container.of(
            self._call(
                "containers.v1.Containers/Get",
                request,
                containers_pb2.GetContainerResponse,
                f"find container {id}",
            ).container
        )

    def containers(self, *filters: str) -> tuple[Container, ...]:
        """The records of all containers, or of those that any of `filters` (containerd's filter language) lets pass."""
        request = containers_pb2.ListContainersRequest(filters=filters)
        answer = self._call(
            "containers.v1.Containers/List", request, containers_pb2.ListContainersResponse, "list containers"
        )
        return tuple(Container.of(message) for message in answer.containers)

    def create_container(self, container: Container) -> None:
        """Write a record. Do it before `prepare`: it is what keeps the snapshot from containerd's garbage collector.

        Raises `ContainerdAlreadyExists`.
        """
        request = containers_pb2.CreateContainerRequest(container=container.message())
        self._call(
            "containers.v1.Containers/Create",
            request,
            containers_pb2.CreateContainerResponse,
            f"create container {container.id}",
        )

    def delete_container(self, id: str) -> None:
        """Remove a record; its snapshot stays until `remove_snapshot`. Raises `ContainerdNotFound`."""
        request = containers_pb2.DeleteContainerRequest(id=id)
        self._call("containers.v1.Containers/Delete", request, Empty, f"delete container {id}")

    # Snapshots.

    def lineage(self, snapshotter: str, key: str) -> tuple[str, ...]:
        """The committed snapshots below a snapshot, the lowest first. Raises `ContainerdNotFound`."""
        layers: list[str] = []
        while key := self.snapshot(snapshotter, key).parent:
            layers.insert(0, key)
        return tuple(layers)

    def staying(self, snapshotter: str, layers: Sequence[str]) -> dict[str, str]:
        """Those of `layers` that a snapshotter which shares layers keeps on this node, and why."""
        labels = {chain: self.snapshot(snapshotter, chain).labels for chain in layers}
        return {chain: of[LAYER_STAYS] for chain, of in labels.items() if LAYER_STAYS in of}

    def find_layers(self, snapshotter: str, layers: Sequence[str]) -> str | None:
        """The first of an image's `layers` (chain ids, the lowest first) that this node cannot have; None where it has all.

        A snapshotter that shares layers between nodes finds there what this node has never seen, without a download; if
        need be after another node has published it. containerd collects what was found unless a snapshot stands on it.
        """
        parent = ""
        for chain in layers:
            try:
                self.snapshot(snapshotter, chain)
            except ContainerdNotFound:
                if not self._find_layer(snapshotter, chain, parent):
                    return chain
            parent = chain
        return None

    def _find_layer(self, snapshotter: str, chain: str, parent: str) -> bool:
        """Ask as containerd's unpacker does before it downloads (containerd/core/unpack: the label, and the answer): again and
        again as long as another node publishes the layer and gives signs of life."""
        began = since = time.monotonic()
        seen = ""
        while True:
            key = f"podferry-find-{uuid.uuid4()}"
            try:
                self._prepare(snapshotter, key, parent, {LAYER: chain}, FIND_TIMEOUT)
            except ContainerdAlreadyExists:
                return True
            try:
                maker = self.snapshot(snapshotter, key).labels.get(LAYER_MAKER, "")
            finally:
                self.remove_snapshot(snapshotter, key)
            now = time.monotonic()
            if maker == seen and (not maker or now - since >= MAKER_SILENT):
                return False
            if now - began >= FIND_LONGEST:
                return False
            if maker != seen:  # where nobody is at it any more it may have come to its end since the look: once again
                seen, since = maker, now
            if maker:
                time.sleep(FIND_PAUSE)

    def prepare(
        self, snapshotter: str, key: str, layers: Sequence[str], *, image: str = "", node: str = ""
    ) -> tuple[SnapshotMount, ...]:
        """Make an active snapshot over an image's committed `layers` and return its mounts.

        Raises `Refused` when this node can have no such layers (`find_layers`), which are those of `image`.
        """
        for _ in range(COLLECTED):
            missing = self.find_layers(snapshotter, layers)
            if missing is None:
                with contextlib.suppress(ContainerdNotFound):  # collected since we found it
                    return self._prepare(snapshotter, key, layers[-1] if layers else "")
        here = node or "this node"
        raise Refused(
            f"the image {image or 'of the container'} is not on {here}",
            why=f"its layer {missing or layers[-1]} is not there",
            remedy=f"pull the image {image} on {here}, for the snapshotter {snapshotter}" if image else "",
        )

    def _prepare(
        self,
        snapshotter: str,
        key: str,
        parent: str,
        labels: Mapping[str, str] | None = None,
        timeout: float = CALL_TIMEOUT,
    ) -> tuple[SnapshotMount, ...]:
        request = snapshots_pb2.PrepareSnapshotRequest(snapshotter=snapshotter, key=key, parent=parent, labels=labels)
        answer = self._call(
            "snapshots.v1.Snapshots/Prepare",
            request,
            snapshots_pb2.PrepareSnapshotResponse,
            f"prepare the root file system {key}",
            timeout,
        )
        return tuple(SnapshotMount.of(mount) for mount in answer.mounts)

    def mounts(self, snapshotter: str, key: str) -> tuple[SnapshotMount, ...]:
        """The mounts of an active snapshot. Raises `ContainerdNotFound`."""
        request = snapshots_pb2.MountsRequest(snapshotter=snapshotter, key=key)
        answer = self._call(
            "snapshots.v1.Snapshots/Mounts", request, snapshots_pb2.MountsResponse, f"find the mounts of {key}"
        )
        return tuple(SnapshotMount.of(mount) for mount in answer.mounts)

    def snapshot(self, snapshotter: str, key: str) -> Snapshot:
        """The record of a snapshot. Raises `ContainerdNotFound`."""
        request = snapshots_pb2.StatSnapshotRequest(snapshotter=snapshotter, key=key)
        info = self._call(
            "snapshots.v1.Snapshots/Stat", request, snapshots_pb2.StatSnapshotResponse, f"find snapshot {key}"
        ).info
        return Snapshot(info.name, info.parent, info.kind == snapshots_pb2.COMMITTED, dict(info.labels))

    def remove_snapshot(self, snapshotter: str, key: str) -> None:
        """Remove a snapshot and its files. Raises `ContainerdNotFound`."""
        request = snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key)
        self._call("snapshots.v1.Snapshots/Remove", request, Empty, f"remove snapshot {key}")

    # Tasks.

    def create_task(
        self,
        id: str,
        rootfs: Sequence[SnapshotMount],
        stdio: Stdio | None = None,
        *,
        options: Opaque | None = None,
        timeout: float = CALL_TIMEOUT,
    ) -> int:
        """Have the shim mount `rootfs` and call the OCI runtime's `create`; return the pid of the container's init.

        `options` are those of the container's record where nothing else is said. `timeout` is in seconds and covers the
        runtime, which for a restored container waits for the state.
        """
        stdio = stdio or Stdio()
        options = options or self.container(id).options
        request = tasks_pb2.CreateTaskRequest(
            container_id=id,
            rootfs=[mount.message() for mount in rootfs],
            stdin=stdio.stdin,
            stdout=stdio.stdout,
            stderr=stdio.stderr,
            terminal=stdio.terminal,
            options=options.message() if options else None,
        )
        return self._call(
            "tasks.v1.Tasks/Create", request, tasks_pb2.CreateTaskResponse, f"create the task of {id}", timeout
        ).pid

    def start_task(self, id: str) -> int:
        """Start a created task and return its pid."""
        request = tasks_pb2.StartRequest(container_id=id)
        return self._call("tasks.v1.Tasks/Start", request, tasks_pb2.StartResponse, f"start the task of {id}").pid

    def task(self, id: str) -> Task:
        """The task of a container. Raises `ContainerdNotFound` where it has none."""
        request = tasks_pb2.GetRequest(container_id=id)
        return Task.of(
            self._call("tasks.v1.Tasks/Get", request, tasks_pb2.GetResponse, f"find the task of {id}").process
        )

    def tasks(self) -> tuple[Task, ...]:
        """All tasks."""
        answer = self._call(
            "tasks.v1.Tasks/List", tasks_pb2.ListTasksRequest(), tasks_pb2.ListTasksResponse, "list tasks"
        )
        return tuple(Task.of(process) for process in answer.tasks)

    def pids(self, id: str) -> tuple[int, ...]:
        """The pids of a task's processes."""
        request = tasks_pb2.ListPidsRequest(container_id=id)
        answer = self._call("tasks.v1.Tasks/ListPids", request, tasks_pb2.ListPidsResponse, f"list the pids of {id}")
        return tuple(process.pid for process in answer.processes)

    def kill_task(self, id: str, signal: int, *, everyone: bool = False) -> None:
        """Send a signal to a task's init, or to all of its processes. Raises `ContainerdNotFound` where it has ended."""
        request = tasks_pb2.KillRequest(container_id=id, signal=signal, all=everyone)
        self._call("tasks.v1.Tasks/Kill", request, Empty, f"send signal {signal} to the task of {id}")

    def wait_task(self, id: str, timeout: float | None = None) -> int:
        """Wait until a task has ended and return its exit status (128 + N for signal N). Raises `TimedOut`."""
        request = tasks_pb2.WaitRequest(container_id=id)
        return self._call(
            "tasks.v1.Tasks/Wait", request, tasks_pb2.WaitResponse, f"wait for the end of {id}", timeout
        ).exit_status

    def delete_task(self, id: str) -> int:
        """Remove an ended task and return its exit status."""
        request = tasks_pb2.DeleteTaskRequest(container_id=id)
        return self._call(
            "tasks.v1.Tasks/Delete", request, tasks_pb2.DeleteResponse, f"delete the task of {id}"
        ).exit_status

    def bundle(self, id: str) -> Path:
        """The directory in which the shim keeps a task's config.json and mounts its root."""
        return STATE / "io.containerd.runtime.v2.task" / self.namespace / id

    # As `ContainerRuntime` asks.

    def pod(self, uid: str) -> Mapping[str, PodContainer]:
        """The containers of a pod by name, of each the latest attempt; its sandbox is not among them."""
        return latest(map(of_containerd, self.containers(filter_of_containers(uid))))

    def holds_pod(self, uid: str) -> bool:
        """Whether anything of a pod is left here."""
        return bool(self.containers(filter_of(uid)))

    def log(self, record: Container) -> Path | None:
        """Where the CRI plugin writes a container's output."""
        return log_of(record)

    def upper(self, record: Container) -> Path:
        """The directory that takes a container's own changes. Raises `Refused` where its snapshotter has none."""
        return upper_dir(self.mounts(record.snapshotter, record.snapshot_key))

    def root(self, record: Container) -> Path:
        """Where the shim has mounted a container's root file system."""
        return self.bundle(record.id) / "rootfs"

    def runc_root(self, record: Container) -> Path:
        """The `--root` that the shim gives runc for a container of this namespace."""
        return Path(record.runc_options().root or STATE / "runc") / self.namespace

    def _call(
        self, method: str, request: Message, answer: type[Answer], doing: str, timeout: float | None = CALL_TIMEOUT
    ) -> Answer:
        """Call `method` (`images.v1.Images/Get`); `doing` says for an error what the call was for."""
        call = self._channel.unary_unary(
            f"/containerd.services.{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        with errors_of(doing, self.socket):
            result: Answer = call(request, timeout=timeout, metadata=(("containerd-namespace", self.namespace),))
            return result
