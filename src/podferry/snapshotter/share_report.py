"""What `podferry images` shows: layers, sizes, users, form, state of the share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from podferry.errors import PodferryError
from podferry.snapshotter import layout
from podferry.snapshotter.deadlines import Guard
from podferry.snapshotter.faults import LayerDamaged
from podferry.snapshotter.layout import LayerRecord
from podferry.snapshotter.opening import open_share
from podferry.snapshotter.posix import PosixShare
from podferry.snapshotter.references import all_nodes


@dataclass(frozen=True)
class LayerLine:
    """One published layer. `users` are nodes; `unused_since` is seconds since the epoch, where it has none."""

    chain: str
    form: str
    bytes: int
    inodes: int
    published_by: str
    created: float
    users: list[str]
    unused_since: float | None


@dataclass(frozen=True)
class NodeLine:
    """One node. `seen` is when it last wrote its references, by its own clock."""

    node: str
    instance: str
    layers: int
    seen: float


@dataclass(frozen=True)
class ImagesReport:
    """A share as it is now. `state` is `ok` or says what is wrong; sizes are in bytes.

    `making`, `condemned` and `damaged` are entries of the share's own folders.
    """

    share: str
    id: str
    state: str
    free: int
    total: int
    layers: list[LayerLine]
    nodes: list[NodeLine]
    making: list[str]
    condemned: list[str]
    damaged: list[str]

    @property
    def bytes(self) -> int:
        """What all layers take."""
        return sum(layer.bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON carries it."""
        return {**asdict(self), "bytes": self.bytes}


def images_report(share: Path | PosixShare, *, deadline: float = 10.0) -> ImagesReport:
    """Inspect the share mounted at a path; changes nothing. A share that does not answer gives a report that says so.

    Raises `ShareRefused` for a directory that is no share.
    """
    if isinstance(share, Path):
        try:
            share = open_share(share, guard=Guard(deadline), read_only=True)
        except PodferryError as error:
            if error.code == "PF150":
                raise
            return ImagesReport(str(share), "", str(error), 0, 0, [], [], [], [], [])
    try:
        return _look(share)
    except PodferryError as error:
        return ImagesReport(str(share.root), share.id, str(error), 0, 0, [], [], [], [], [])


def _look(share: PosixShare) -> ImagesReport:
    nodes = all_nodes(share)
    users: dict[str, list[str]] = {}
    for record in nodes.values():
        for chain in record.layers:
            users.setdefault(chain, []).append(record.node)
    free, total = share.space()
    wrong = share.names(layout.DAMAGED)
    layers = []
    for name in share.names(layout.LAYERS):
        published = layout.chain_of(name)
        if published is None:
            continue
        try:
            record_of = layout.decode_layer(published, share.read(f"{layout.LAYERS}/{name}/{layout.RECORD}"))
        except (LayerDamaged, FileNotFoundError):
            wrong.append(name)
            continue
        layers.append(_line(share, name, record_of, sorted(users.get(published, []))))
    return ImagesReport(
        share=str(share.root),
        id=share.id,
        state="ok",
        free=free,
        total=total,
        layers=layers,
        nodes=[NodeLine(one.node, one.instance, len(one.layers), one.seen) for one in nodes.values()],
        making=sorted({name.rpartition(".")[0] for name in share.names(layout.LEASES)}),
        condemned=share.names(layout.TRASH),
        damaged=wrong,
    )


def _line(share: PosixShare, name: str, record: LayerRecord, users: list[str]) -> LayerLine:
    since: float | None = None
    if not users:
        try:
            since = layout.decode_unused(share.read(f"{layout.UNUSED}/{name}"))
        except (FileNotFoundError, ValueError):
            since = None
    return LayerLine(
        record.chain, record.form.value, record.bytes, record.inodes, record.node, record.created, users, since
    )
