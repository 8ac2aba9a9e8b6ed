"""containerd's records of containers, snapshots, images and tasks, as immutable values."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError

from podferry.errors import PeerMisbehaved, Refused
from podferry.protos import containers_pb2, runc_pb2, tasks_pb2, types_pb2

RUNC_V2 = "io.containerd.runc.v2"


@dataclass(frozen=True)
class Opaque:
    """A value that containerd stores and we only pass on: a spec, a runtime's options (`google.protobuf.Any`)."""

    type_url: str
    value: bytes

    @staticmethod
    def of(message: AnyMessage) -> Opaque:
        """The value that `message` carries."""
        return Opaque(message.type_url, message.value)

    def message(self) -> AnyMessage:
        """The value as requests carry it."""
        return AnyMessage(type_url=self.type_url, value=self.value)


@dataclass(frozen=True)
class SnapshotMount:
    """A mount as snapshotters hand it out; nothing is mounted yet."""

    type: str
    source: str
    options: tuple[str, ...] = ()
    target: str = ""

    @staticmethod
    def of(message: types_pb2.Mount) -> SnapshotMount:
        """The mount that `message` describes."""
        return SnapshotMount(message.type, message.source, tuple(message.options), message.target)

    def option(self, name: str) -> str | None:
        """The value of `name=value` among the options."""
        for option in self.options:
            key, _, value = option.partition("=")
            if key == name:
                return value
        return None

    def message(self) -> types_pb2.Mount:
        """The mount as requests carry it."""
        return types_pb2.Mount(type=self.type, source=self.source, target=self.target, options=self.options)


@dataclass(frozen=True)
class Container:
    """A container's record: all that another node needs to make the same container, except for its state."""

    id: str
    image: str
    snapshotter: str
    snapshot_key: str
    spec: Opaque
    runtime: str = RUNC_V2
    options: Opaque | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    extensions: Mapping[str, Opaque] = field(default_factory=dict)
    sandbox: str = ""

    @staticmethod
    def of(message: containers_pb2.Container) -> Container:
        """The record that `message` carries."""
        options = message.runtime.options if message.runtime.HasField("options") else None
        return Container(
            id=message.id,
            image=message.image,
            snapshotter=message.snapshotter,
            snapshot_key=message.snapshot_key,
            spec=Opaque.of(message.spec),
            runtime=message.runtime.name,
            options=Opaque.of(options) if options else None,
            labels=dict(message.labels),
            extensions={name: Opaque.of(value) for name, value in message.extensions.items()},
            sandbox=message.sandbox,
        )

    def spec_json(self) -> dict[str, Any]:
        """The OCI runtime spec. Raises `PeerMisbehaved` where it is not a JSON object."""
        try:
            spec = json.loads(self.spec.value)
        except ValueError as error:
            raise PeerMisbehaved.because(f"the spec of container {self.id} is not JSON", error) from error
        if not isinstance(spec, dict):
            raise PeerMisbehaved(f"the spec of container {self.id} is not a JSON object")
        return spec

    def runc_options(self) -> runc_pb2.Options:
        """What the record tells the runc shim; the defaults where it says nothing."""
        options = runc_pb2.Options()
        if self.options is not None and self.options.type_url.endswith("containerd.runc.v1.Options"):
            with contextlib.suppress(DecodeError):
                options.ParseFromString(self.options.value)
        return options

    def to_bytes(self) -> bytes:
        """The record as it travels; `from_bytes` is its inverse."""
        return self.message().SerializeToString(deterministic=True)

    @staticmethod
    def from_bytes(data: bytes) -> Container:
        """Rebuild a record. Raises `PeerMisbehaved` when `data` holds none."""
        message = containers_pb2.Container()
        try:
            message.ParseFromString(data)
        except DecodeError as error:
            raise PeerMisbehaved.because("not a container's record", error) from error
        if not message.id or not message.spec.value:
            raise PeerMisbehaved("a container's record without id or spec")
        return Container.of(message)

    def message(self) -> containers_pb2.Container:
        """The record as requests carry it."""
        options = self.options.message() if self.options else None
        return containers_pb2.Container(
            id=self.id,
            labels=dict(self.labels),
            image=self.image,
            runtime=containers_pb2.Container.Runtime(name=self.runtime, options=options),
            spec=self.spec.message(),
            snapshotter=self.snapshotter,
            snapshot_key=self.snapshot_key,
            extensions={name: value.message() for name, value in self.extensions.items()},
            sandbox=self.sandbox,
        )


@dataclass(frozen=True)
class PodContainer:
    """A container of a pod. `log` is the file that its output is written to, in the kubelet's format; None for none."""

    name: str
    record: Container
    log: Path | None


class TaskStatus(IntEnum):
    """A task's state, as containerd numbers it."""

    UNKNOWN = 0
    CREATED = 1
    RUNNING = 2
    STOPPED = 3
    PAUSED = 4
    PAUSING = 5

    @classmethod
    def _missing_(cls, value: object) -> TaskStatus:
        return cls.UNKNOWN


@dataclass(frozen=True)
class Task:
    """A container's processes; `pid` is its init's, in the pid namespace of containerd."""

    id: str
    pid: int
    status: TaskStatus
    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False
    exit_status: int = 0

    @staticmethod
    def of(process: tasks_pb2.Process) -> Task:
        """The task that `process` describes."""
        return Task(
            id=process.container_id or process.id,
            pid=process.pid,
            status=TaskStatus(process.status),
            stdin=process.stdin,
            stdout=process.stdout,
            stderr=process.stderr,
            terminal=process.terminal,
            exit_status=process.exit_status,
        )


@dataclass(frozen=True)
class Stdio:
    """Where a task's stdio goes: a FIFO's path, `file:///PATH`, `binary:///PROGRAM`, or nothing."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


@dataclass(frozen=True)
class Snapshot:
    """A snapshot's record. A committed one is an image layer, named by its chain id."""

    name: str
    parent: str
    committed: bool
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Image:
    """An image's record; `digest` is its manifest's or index's."""

    name: str
    digest: str
    media_type: str
    labels: Mapping[str, str]


def upper_dir(mounts: Sequence[SnapshotMount]) -> Path:
    """The directory that takes a container's own changes. Raises `Refused` where the snapshotter has none."""
    for mount in mounts:
        upper = mount.option("upperdir")
        if mount.type == "overlay" and upper:
            return Path(upper)
        if mount.type == "bind" and "ro" not in mount.options:
            return Path(mount.source)
    raise Refused(
        "the container's root has no upper directory",
        why=f"its mounts are {[(mount.type, *mount.options) for mount in mounts]}",
        remedy="use a snapshotter built on overlay: overlayfs or podferry",
    )


def lower_dirs(mounts: Sequence[SnapshotMount]) -> tuple[Path, ...]:
    """The image layers' directories, the topmost first; none for a root that is a plain directory."""
    for mount in mounts:
        if mount.type == "overlay":
            return tuple(Path(part) for part in (mount.option("lowerdir") or "").split(":") if part)
    return ()
