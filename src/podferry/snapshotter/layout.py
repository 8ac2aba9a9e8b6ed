"""What lies where on the share, and how each record reads. Names and bytes only; no I/O.

    podferry.json             marks the share as ours, with its id
    layers/NAME/              a published layer: layer.json and its payload (fs/ or layer.erofs); never changed
    staging/NAME.TOKEN/       a layer being made
    leases/NAME.GENERATION    somebody is making this layer
    nodes/NODE.INSTANCE.json  what a node uses
    unused/NAME               since when no node has used this layer
    trash/NAME.TOKEN/         condemned; whoever wants it moves it back
    doomed/NAME.TOKEN/        being deleted; nobody may want it any more
    damaged/NAME.TOKEN/       failed its check, set aside for a person to look at
    read/NAME                 which parts of the layer containers have read; a hint

NAME is the chain id with `-` for `:`. All of it was written by some node, which may have crashed or be wrong, so what is
read is checked before use.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from podferry.errors import UsageError
from podferry.snapshotter.faults import LayerDamaged, ShareRefused

MARKER = "podferry.json"
FORMAT = 1
LAYERS, STAGING, LEASES, NODES = "layers", "staging", "leases", "nodes"
UNUSED, TRASH, DOOMED, DAMAGED, READ = "unused", "trash", "doomed", "damaged", "read"
FOLDERS = (LAYERS, STAGING, LEASES, NODES, UNUSED, TRASH, DOOMED, DAMAGED, READ)
RECORD = "layer.json"

_CHAIN = re.compile(r"(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})")
_NAME = re.compile(r"(sha256-[0-9a-f]{64}|sha512-[0-9a-f]{128})")
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,200}(\.[A-Za-z0-9_-]+)*")
_HEX = re.compile(r"[0-9a-f]+")


class FormName(StrEnum):
    """How a layer's files lie on the share; the values are part of the share's format."""

    DIR = "dir"
    EROFS = "erofs"


def is_chain(text: str) -> bool:
    """Whether `text` is a chain id as OCI writes it."""
    return _CHAIN.fullmatch(text) is not None


def name_of(chain: str) -> str:
    """The file name of a chain id."""
    if not is_chain(chain):
        raise UsageError(f"not a chain id: {chain!r}")
    return chain.replace(":", "-")


def chain_of(name: str) -> str | None:
    """The chain id in a file name, or its part before the first dot; None for a name that is not one of ours."""
    head = name.partition(".")[0]
    return head.replace("-", ":") if _NAME.fullmatch(head) else None


def check_node(name: str) -> str:
    """`name` if it may become part of a file name."""
    if len(name) > 200 or not _NODE.fullmatch(name):
        raise UsageError(f"not a node's name: {name!r}", remedy="use letters, digits, '-', '_' and '.'")
    return name


def new_token() -> str:
    """A name that nobody else has."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class LayerRecord:
    """`layer.json`: what was published. `digest` is that of the EROFS image, or of the manifest of the tree."""

    chain: str
    form: FormName
    digest: str
    bytes: int
    inodes: int
    node: str
    token: str
    created: float  # seconds since the epoch, the publisher's clock: for people only


@dataclass(frozen=True)
class LeaseRecord:
    """A lease file: who, and a count that goes up while the owner lives."""

    node: str
    token: str
    beat: int = 0


@dataclass(frozen=True)
class NodeRecord:
    """What one node uses. `beat` goes up while it lives; `seen` is its own clock, for people only."""

    node: str
    instance: str
    layers: frozenset[str] = field(default_factory=frozenset)
    beat: int = 0
    seen: float = 0.0


def encode(record: LayerRecord | LeaseRecord | NodeRecord | dict[str, Any]) -> bytes:
    """A record as it lies on the share."""
    data = record if isinstance(record, dict) else asdict(record)
    plain = {key: sorted(value) if isinstance(value, frozenset) else value for key, value in data.items()}
    return json.dumps(plain, sort_keys=True).encode() + b"\n"


def _fields(data: bytes, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """The fields that are asked for, each of its kind; anything else is a ValueError."""
    try:
        value = json.loads(data)
    except RecursionError as error:  # whoever may write to the share may nest as deep as he likes
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not an object")
    for name, kind in kinds.items():
        if not isinstance(value.get(name), kind) or isinstance(value[name], bool):
            raise ValueError(f"field {name!r} is missing or of the wrong kind")
    return {name: value[name] for name in kinds}


def decode_layer(chain: str, data: bytes) -> LayerRecord:
    """The record of `chain`. Raises `LayerDamaged` when it is not one."""
    try:
        got = _fields(
            data, chain=str, form=str, digest=str, bytes=int, inodes=int, node=str, token=str, created=(int, float)
        )
        record = LayerRecord(**{**got, "form": FormName(got["form"])})
        if record.chain != chain:
            raise ValueError(f"it says it is {record.chain}")
        if min(record.bytes, record.inodes) < 0 or not _HEX.fullmatch(record.token):
            raise ValueError("a count or token is out of range")
    except ValueError as why:
        raise LayerDamaged(f"the record of layer {chain} cannot be used", why=str(why)) from why
    return record


def decode_lease(data: bytes) -> LeaseRecord:
    """A lease; one that cannot be read (torn by a crash) has no owner and no beat, so that it expires."""
    try:
        return LeaseRecord(**_fields(data, node=str, token=str, beat=int))
    except ValueError:
        return LeaseRecord("", "", -1)


def decode_node(name: str, data: bytes) -> NodeRecord:
    """A node's references. One that cannot be read is an error: taking it for empty would free what it uses."""
    try:
        got = _fields(data, node=str, instance=str, layers=list, beat=int, seen=(int, float))
        if not all(isinstance(layer, str) and is_chain(layer) for layer in got["layers"]):
            raise ValueError("a layer's name is not a chain id")
    except ValueError as why:
        raise ShareRefused(
            f"cannot read which layers {name} uses",
            why=str(why),
            remedy=f"start podferry-snapshotter on that node, or: podferry images forget {name}",
        ) from why
    return NodeRecord(**{**got, "layers": frozenset(got["layers"])})


def decode_read(data: bytes) -> list[tuple[int, int]]:
    """Which bytes of a layer's image were read, as half-open runs. ValueError for anything else."""
    runs = _fields(data, read=list)["read"]
    for run in runs:
        if not (isinstance(run, list) and [type(one) for one in run] == [int, int] and 0 <= run[0] < run[1] < 1 << 63):
            raise ValueError(f"not a run: {run!r}")
    return [(start, end) for start, end in runs]


def decode_unused(data: bytes) -> float:
    """Since when a layer has had no users, by a node's clock. ValueError for anything else."""
    since = float(_fields(data, since=(int, float))["since"])
    if not math.isfinite(since):
        raise ValueError(f"no time: {since}")
    return since


def decode_marker(data: bytes) -> str:
    """The share's id."""
    try:
        got = _fields(data, format=int, id=str)
    except ValueError as why:
        raise ShareRefused(f"{MARKER} on the share cannot be read", why=str(why)) from why
    if got["format"] != FORMAT:
        raise ShareRefused(
            "the share has a format of another version of podferry", why=f"format {got['format']}, not {FORMAT}"
        )
    return str(got["id"])
