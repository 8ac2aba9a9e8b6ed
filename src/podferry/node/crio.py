"""CRI-O's containers, as it keeps them on a node.

What CRI-O answers on its socket leaves out a container that is being created, and that is when podferry-runc waits in it. So this
reads what CRI-O has written by then for conmon and the OCI runtime, below containers/storage's directory: the OCI spec with
CRI-O's annotations (pkg/annotations/internal.go), and the command line of conmon, which says by which program the container was
made and where that keeps its state. On the socket it is asked for its version and where that directory is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from podferry.core.facts import RuntimeKind
from podferry.errors import Failed, Refused, TimedOut
from podferry.node import outside
from podferry.node.pod_records import demand_uid, latest
from podferry.node.records import Container, Opaque, PodContainer, Task, TaskStatus
from podferry.node.runtime import ContainerNotFound
from podferry.protos import cri_pb2, runc_pb2

SOCKET = Path("/run/crio/crio.sock")
STORAGE = Path("/var/lib/containers/storage")
"""Where containers/storage keeps containers and layers, unless CRI-O is told otherwise."""
RUN = Path("/run/containers/storage")
"""Where containers/storage keeps what does not outlive a reboot: bundles, and the sandboxes' /dev/shm."""
RUNC_STATE = Path("/run/runc")
"""The `runtime_root` of CRI-O's runtimes, unless they say otherwise."""
EXITS = Path("/run/crio/exits")
"""Where conmon writes how a container ended, unless CRI-O is told otherwise."""
CALL_TIMEOUT = 30.0  # seconds
POLL_INTERVAL = 0.05
SPEC = "podferry.dev/spec"

_CRIO = "io.kubernetes.cri-o"
_POD_UID = "io.kubernetes.pod.uid"
_NAME = "io.kubernetes.container.name"
_RUNC_OPTIONS = "containerd.runc.v1.Options"

Answer = TypeVar("Answer", bound=Message)


class CrioFailed(Failed):
    """CRI-O answered with an error, or what it keeps is not as it should be."""

    code = "PF234"


class CrioUnreachable(CrioFailed):
    """Nothing answers on CRI-O's socket."""

    code = "PF235"


@dataclass(frozen=True)
class Monitor:
    """What conmon was told: the OCI runtime, and the `--root` that it is given."""

    runtime: str
    root: str

    @staticmethod
    def of(words: list[str]) -> Monitor:
        """By conmon's command line (its src/cli.c)."""
        runtime, root = "", ""
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if word in ("-r", "--runtime"):
                runtime = following
            elif word == "--runtime-arg" and following.startswith("--root="):
                root = following.removeprefix("--root=")
            elif word.startswith("--runtime-arg=--root="):
                root = word.removeprefix("--runtime-arg=--root=")
        return Monitor(runtime, root or str(RUNC_STATE))


class Crio:
    """A node's CRI-O. `storage` is asked of it unless it is given; in a pod all paths are the node's own (`outside.show`)."""

    kind = RuntimeKind.CRIO

    def __init__(self, socket: Path = SOCKET, storage: Path | None = None) -> None:
        self.socket = socket
        self._storage = storage
        self._channel = grpc.insecure_channel(f"unix://{socket}", options=[("grpc.enable_http_proxy", 0)])

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    # On its socket.

    def version(self) -> str:
        """CRI-O's version, such as `1.34.0`."""
        request = cri_pb2.VersionRequest()
        return self._call("RuntimeService/Version", request, cri_pb2.VersionResponse, "ask its version").runtime_version

    @property
    def storage(self) -> Path:
        """Where containers and layers are."""
        if self._storage is None:
            request = cri_pb2.ImageFsInfoRequest()
            said = self._call(
                "ImageService/ImageFsInfo", request, cri_pb2.ImageFsInfoResponse, "ask where it keeps images"
            )
            images = [Path(one.fs_id.mountpoint) for one in said.image_filesystems]
            self._storage = next((one.parent for one in images if one.name == "overlay-images"), None)
            if self._storage is None:
                raise Refused(
                    "CRI-O on this node does not keep its layers with overlay",
                    why=f"its images are in {', '.join(map(str, images)) or 'no directory'}",
                    remedy='set storage_driver = "overlay" in /etc/crio/crio.conf or containers-storage.conf(5)',
                )
        return self._storage

    # As `ContainerRuntime` asks.

    def pod(self, uid: str) -> Mapping[str, PodContainer]:
        """The containers of a pod by name, of each the latest attempt; its sandbox is not among them."""
        return latest(self._of_pod(demand_uid(uid)))

    def _of_pod(self, uid: str) -> Iterator[tuple[int, PodContainer]]:
        for id, spec in self._specs(uid):
            told = spec["annotations"]
            if told.get(f"{_CRIO}.ContainerType") != "container":
                continue
            record = self._record(id, spec)
            yield _attempt(told), PodContainer(str(told.get(_NAME, "")), record, self.log(record))

    def holds_pod(self, uid: str) -> bool:
        """Whether anything of a pod is left here."""
        return any(True for _ in self._specs(demand_uid(uid)))

    def container(self, id: str) -> Container:
        """A container that is there, or is being made. Raises `ContainerNotFound`."""
        return self._record(id, self._spec(id))

    def task(self, id: str) -> Task:
        """Its processes, by the state that runc keeps. Raises `ContainerNotFound` where it has none."""
        directory = self.runc_root(self.container(id)) / id
        try:
            state = json.loads((directory / "state.json").read_text())
            pid, started = int(state["init_process_pid"]), int(state["init_process_start"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ContainerNotFound.because(f"runc has no state of container {id}", error) from error
        if not _lives(pid, started):
            return Task(id, pid, TaskStatus.STOPPED)
        return Task(id, pid, TaskStatus.CREATED if (directory / "exec.fifo").exists() else TaskStatus.RUNNING)

    def wait_task(self, id: str, timeout: float | None = None) -> int:
        """Its exit status, which conmon writes. Raises `TimedOut`."""
        deadline = time.monotonic() + (CALL_TIMEOUT if timeout is None else timeout)
        while True:
            with suppress(OSError, ValueError):
                return int((outside.root() / str(EXITS / id).lstrip("/")).read_text())
            if time.monotonic() > deadline:
                raise TimedOut(f"conmon does not say how {id} ended", why=f"there is no {EXITS / id}")
            time.sleep(POLL_INTERVAL)  # it may have been written before we could watch for it

    def log(self, record: Container) -> Path | None:
        """Where conmon writes its output."""
        path = record.labels.get(f"{_CRIO}.LogPath")
        return Path(path) if path else None

    def upper(self, record: Container) -> Path:
        """The directory that takes its own changes: `diff` beside where its overlay is mounted."""
        merged = self._merged(record)
        upper = merged.with_name("diff")
        if merged.name != "merged" or not upper.is_dir():
            raise Refused(
                "the container's root has no upper directory",
                why=f"CRI-O has mounted it at {merged}, and beside that is no directory `diff`",
                remedy="use containers/storage's driver overlay, without a mount program",
            )
        return upper

    def root(self, record: Container) -> Path:
        """Where its overlay is mounted, as one sees it who has the node's mounts: containers/storage keeps them private."""
        return outside.root() / str(self._merged(record)).lstrip("/")

    def runc_root(self, record: Container) -> Path:
        """The `--root` that CRI-O gives the container's runtime."""
        return Path(record.runc_options().root or RUNC_STATE)

    # On its disk.

    def _merged(self, record: Container) -> Path:
        return Path(str((record.spec_json().get("root") or {}).get("path", "")))

    def _specs(self, uid: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The specs of a pod's containers and of its sandbox. What goes meanwhile is left out."""
        for path in sorted((self.storage / "overlay-containers").glob("*/userdata/config.json")):
            try:
                text = path.read_text()
                if uid in text and (spec := _spec(path.parents[1].name, text))["annotations"].get(_POD_UID) == uid:
                    yield path.parents[1].name, spec
            except (FileNotFoundError, CrioFailed):
                continue

    def _spec(self, id: str) -> dict[str, Any]:
        if not id.isalnum():
            raise ContainerNotFound(f"{id[:80]!r} is no container of CRI-O's")
        try:
            return _spec(id, (self._userdata(id) / "config.json").read_text())
        except FileNotFoundError as missing:
            raise ContainerNotFound.because(f"CRI-O has no container {id}", missing) from missing

    def _userdata(self, id: str) -> Path:
        return self.storage / "overlay-containers" / id / "userdata"

    def _record(self, id: str, spec: dict[str, Any]) -> Container:
        told = {name: str(value) for name, value in spec["annotations"].items()}
        monitor = _monitor(id, told)
        return Container(
            id,
            image=told.get(f"{_CRIO}.ImageName") or told.get(f"{_CRIO}.Image", ""),
            snapshotter="overlay",
            snapshot_key=Path(str((spec.get("root") or {}).get("path", ""))).parent.name,
            spec=Opaque(SPEC, json.dumps(spec).encode()),
            runtime=told.get(f"{_CRIO}.RuntimeHandler", ""),
            options=Opaque(
                _RUNC_OPTIONS,
                runc_pb2.Options(binary_name=monitor.runtime, root=monitor.root).SerializeToString(),
            ),
            labels=told,
            sandbox=told.get(f"{_CRIO}.SandboxID", ""),
        )

    def _call(self, method: str, request: Message, answer: type[Answer], doing: str) -> Answer:
        call = self._channel.unary_unary(
            f"/runtime.v1.{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        try:
            result: Answer = call(request, timeout=CALL_TIMEOUT)
        except grpc.RpcError as error:
            code, details = error.code(), error.details() or ""
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimedOut(f"CRI-O was too slow to {doing}", remedy="see CRI-O's log on this node") from error
            kind = CrioUnreachable if code is grpc.StatusCode.UNAVAILABLE else CrioFailed
            raise kind(f"CRI-O cannot {doing}", why=f"{self.socket}: {details or code.name}") from error
        return result


def _spec(id: str, text: str) -> dict[str, Any]:
    try:
        spec = json.loads(text)
    except ValueError as error:  # it is being written
        raise CrioFailed.because(f"the spec of CRI-O's container {id} is not JSON", error) from error
    if not isinstance(spec, dict) or not isinstance(spec.get("annotations"), dict):
        raise CrioFailed(f"the spec of CRI-O's container {id} has no annotations")
    return spec


def _attempt(annotations: Mapping[str, Any]) -> int:
    try:
        return int(json.loads(annotations[f"{_CRIO}.Metadata"]).get("attempt", 0))
    except (KeyError, ValueError, AttributeError, TypeError):
        return 0


def _monitor(id: str, annotations: Mapping[str, str]) -> Monitor:
    """What the container's conmon was told; nothing where it has none."""
    bundles = {
        Path(path).parent for name in ("HostnamePath", "ResolvPath") if (path := annotations.get(f"{_CRIO}.{name}"))
    }
    for sandbox in bundles:
        pid_file = outside.root() / str(sandbox.parents[1] / id / "userdata" / "conmon-pidfile").lstrip("/")
        try:
            words = Path(f"/proc/{int(pid_file.read_text())}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except (OSError, ValueError):
            continue
        if id in words:
            return Monitor.of(words)
    return Monitor("", str(RUNC_STATE))


def _lives(pid: int, started: int) -> bool:
    """Whether the process that began then, in clock ticks since the boot, is there and no zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] not in "ZX" and int(fields[19]) == started
