"""What the source tells the target of a workload: of a container alone its record, where its image is, where its output goes; of a
pod which containers and volumes are on their way, since the target's kubelet makes everything else after its own object.

It comes from a peer, and the target acts on it as root: so it is decoded strictly, and what it names is bounded.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from podferry.core.allowed_spec import against
from podferry.core.preflight import OWN_BINDS
from podferry.core.strict import AllowedRange, NotStrict, from_json, to_json
from podferry.criu.checkpoint import FLAGS
from podferry.errors import PeerMisbehaved, Refused
from podferry.node.cri import CONTAINER_NAME, Volume
from podferry.node.jobfacts import binds
from podferry.node.pod_records import UID
from podferry.node.records import RUNC_V2, Container, Opaque, Stdio
from podferry.protos import runc_pb2
from podferry.workload.numbers import MOST_CONTAINERS
from podferry.workload.pod.cluster_port import PodName

MOST_LAYERS, LONGEST = 500, 255
"""overlayfs takes no more layers (OVL_MAX_STACK in fs/overlayfs/ovl_entry.h); characters of a layer's name, and of the
reason why one stays."""

MOST_REASONS = 16

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./:@-]{0,511}|")
_LABELS_READ = ("containerd.io/", "io.containerd.", "io.cri-containerd", "io.kubernetes.")
"""Labels by which containerd keeps or collects things, and its CRI plugin and the kubelet know their own."""
SPEC_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
OPTIONS_TYPE = "containerd.runc.v1.Options"
_SCHEME = "file://"
LAST_WORDS = "podferry-last-words"
"""Among CRIU's images: what a container of a pod has written of its termination message so far."""
PAYLOADS = "podferry-payloads"
"""Among the first container's: payloads of volumes in which something is open (`podferry.node.payloads`)."""


@dataclass(frozen=True)
class OfferedContainer:
    """A container alone as it is offered, a workload of one. `layers` are the chain ids of its image, the lowest first: what its
    root stands on. `flags` are those of the dump and the restore; `staying` says of layers that are not shared why not."""

    record: Container
    layers: tuple[str, ...] = ()
    stdio: Stdio = field(default_factory=Stdio)
    flags: tuple[str, ...] = ()
    staying: dict[str, str] = field(default_factory=dict)

    def record_here(self, wrapper: Path) -> Container:
        """The record as this node keeps it, made anew: with this node's podferry-runc and runtime.

        Nothing stays that makes containerd or its shim use a path, a group or another's shim that the source names.
        """
        theirs = self.record.runc_options()
        options = runc_pb2.Options(binary_name=str(wrapper), systemd_cgroup=theirs.systemd_cgroup)
        return Container(
            id=self.record.id,
            image=self.record.image,
            snapshotter=self.record.snapshotter,
            snapshot_key=self.record.id,
            spec=Opaque(
                SPEC_TYPE, json.dumps(self.record.spec_json()).encode()
            ),  # once more: no field stands there twice
            options=Opaque(OPTIONS_TYPE, options.SerializeToString()),
            labels={name: value for name, value in self.record.labels.items() if not name.startswith(_LABELS_READ)},
        )

    def against(self, *, namespace: str, capabilities: frozenset[str]) -> list[Refused]:
        """Why this node does not make such a container, whatever the source found out about it."""
        record = self.record
        reasons = against(record.spec_json(), id=record.id, namespace=namespace, capabilities=capabilities)
        if record.runtime != RUNC_V2:
            reasons.append(f"its runtime is {record.runtime[:80]!r}, not {RUNC_V2}")
        if record.sandbox:
            reasons.append("it is part of a sandbox")
        if not (_NAME.fullmatch(record.snapshotter) and _IMAGE.fullmatch(record.image)):
            reasons.append("its snapshotter or image has no name of such")
        return [
            Refused(
                f"this node does not make a container such as {record.id} for another",
                why=reason,
                remedy="docs/agent.md lists what is allowed; capabilities can be added in the target's configuration",
            )
            for reason in reasons[:MOST_REASONS]
        ]

    @property
    def records(self) -> tuple[Container, ...]:
        """Its containers, as the source knows them."""
        return (self.record,)

    @property
    def volumes(self) -> tuple[Volume, ...]:
        """What moves beside its upper layer."""
        return ()

    @property
    def log(self) -> Path | None:
        """The file that containerd's shim writes the container's output to, if it does."""
        return log_file(self.stdio)

    def to_dict(self) -> dict[str, Any]:
        """As it travels; `from_dict` is its inverse."""
        return {
            "record": base64.b64encode(self.record.to_bytes()).decode(),
            "layers": list(self.layers),
            "stdio": asdict(self.stdio),
            "flags": list(self.flags),
            "staying": self.staying,
        }

    def for_journal(self) -> dict[str, Any]:
        """As a journal keeps it, which outlives the migration: without environment variables. They hold passwords, and nobody who
        reads a journal starts the container with them; containerd has them."""
        spec = self.record.spec_json()
        (spec.get("process") or {}).pop("env", None)
        record = replace(self.record, spec=replace(self.record.spec, value=json.dumps(spec).encode()))
        return replace(self, record=record).to_dict()

    @staticmethod
    def from_dict(data: dict[str, Any], name: str) -> OfferedContainer:
        """Decode an offer of the container `name`. Raises `PeerMisbehaved` for what no source of ours sends."""
        try:
            record = Container.from_bytes(base64.b64decode(data["record"], validate=True))
            stdio, layers, flags = Stdio(**data["stdio"]), tuple(data["layers"]), tuple(data["flags"])
            staying = dict(data.get("staying", {}))
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise PeerMisbehaved.because("not an offer of a container", error) from error
        if record.id != name or not _ID.fullmatch(name):
            raise PeerMisbehaved("an offer names one container and holds another", why=f"{name!r}, {record.id!r}")
        _demand_flags("a container", flags)
        if len(layers) > MOST_LAYERS or not all(isinstance(one, str) and len(one) <= LONGEST for one in layers):
            raise PeerMisbehaved("not an offer of a container", why="its layers are not a list of names")
        if not all(isinstance(one, str) and len(one) <= LONGEST for one in (*staying, *staying.values())):
            raise PeerMisbehaved("not an offer of a container", why="its reasons why layers stay are no texts")
        offered = OfferedContainer(record, layers, stdio, flags, staying)
        spec = record.spec_json()
        if spec.get("hooks"):
            raise Refused(
                "the container has hooks, which would run on the target as root", remedy="run it without hooks"
            )
        if foreign := sorted(one.source for one in binds(spec) if one.destination not in OWN_BINDS):
            raise Refused(
                "the container's spec mounts directories of this node, which it may not", why=", ".join(foreign[:8])
            )
        _ = offered.log  # raises what cannot follow
        return offered


@dataclass(frozen=True)
class PodPart:
    """A container of the pod. `id` is its own on the source; `flags` are those of the dump and the restore."""

    name: Annotated[str, AllowedRange(1, 63)]
    id: Annotated[str, AllowedRange(1, 200)]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class OfferedPod:
    """A pod as it is offered. `containers` are in the order in which the kubelet starts them."""

    pod: PodName
    containers: Annotated[tuple[PodPart, ...], AllowedRange(1, MOST_CONTAINERS)]
    volumes: Annotated[tuple[Volume, ...], AllowedRange(0, 128)]

    @property
    def records(self) -> tuple[Container, ...]:
        """Its containers, as far as must be known on the source to find their groups."""
        return tuple(Container(one.id, "", "", "", Opaque("", b"{}")) for one in self.containers)

    def for_journal(self) -> dict[str, Any]:
        """As a journal keeps it: names alone."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """As it travels; `from_dict` is its inverse."""
        data: dict[str, Any] = to_json(self)
        return data

    @staticmethod
    def from_dict(data: dict[str, Any], name: str) -> OfferedPod:
        """Decode an offer of the pod `name` (NAMESPACE/NAME). Raises `PeerMisbehaved` for what no source of ours sends."""
        try:
            offered = from_json(OfferedPod, data)
        except NotStrict as error:
            raise PeerMisbehaved.because("not an offer of a pod", error) from error
        names = [one.name for one in offered.containers]
        if str(offered.pod) != name or not UID.fullmatch(offered.pod.uid):
            raise PeerMisbehaved("an offer names one pod and holds another", why=f"{name!r}, {offered.pod}")
        if len(set(names)) < len(names) or not all(map(CONTAINER_NAME.fullmatch, names)):
            raise PeerMisbehaved("not an offer of a pod", why=f"containers {names}")
        if len(set(offered.volumes)) < len(offered.volumes):
            raise PeerMisbehaved("not an offer of a pod", why="a volume is listed twice")
        for one in offered.containers:
            _demand_flags("a pod", one.flags)
        return offered


Offered = OfferedContainer | OfferedPod


def decode(data: dict[str, Any], name: str) -> Offered:
    """Decode an offer of the workload `name`. Raises `PeerMisbehaved` for what no source of ours sends, `Refused` for what no node
    takes."""
    return (OfferedPod if "pod" in data else OfferedContainer).from_dict(data, name)


def _demand_flags(what: str, flags: tuple[str, ...]) -> None:
    if not set(flags) <= FLAGS:
        raise PeerMisbehaved(f"not an offer of {what}", why=f"flags {flags!r}")


def log_file(stdio: Stdio) -> Path | None:
    """The file behind a task's output. Raises `Refused` for output that cannot follow the container."""
    names = {one for one in (stdio.stdout, stdio.stderr) if one}
    if not names and not stdio.stdin:
        return None
    if len(names) != 1 or stdio.stdin or stdio.terminal or not next(iter(names)).startswith(_SCHEME):
        raise Refused(
            "the container's input or output cannot follow it",
            why=f"it goes to {', '.join(sorted(names | {stdio.stdin} - {''}))}, which only this node has",
            remedy="start the container with its output in one log file (ctr run --log-uri file:///var/log/...)",
        )
    path = Path(next(iter(names)).removeprefix(_SCHEME))
    if not path.is_absolute() or ".." in path.parts:
        raise Refused(f"the container's output goes to {path}", why="that is not a plain absolute path")
    return path
