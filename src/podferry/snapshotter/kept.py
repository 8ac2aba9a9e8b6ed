"""What this node has kept of the layers that it uses, so that nobody exchanges one under it.

A layer's record on the share says which digest its payload has. Whoever may write to the share can write both anew. So a node keeps
what the record said when it began to use the layer, or what it published itself, and takes no other one for it as long as one
of its images needs the layer. A payload that was written to in place is read whole, and compared with the kept digest: its
times tell, as the share's server has them.

What a layer is before its first use, a node cannot know: then it trusts the share as it would a registry.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from podferry.errors import PodferryError
from podferry.fs.beneath import Beneath
from podferry.snapshotter.faults import LayerDamaged, LayerExchanged
from podferry.snapshotter.layout import LayerRecord
from podferry.snapshotter.metadata import Metadata
from podferry.snapshotter.posix import PosixShare
from podferry.snapshotter.store import Layer, LayerStore

EVERY = 600.0  # seconds between two looks at the layers in use
MOST_STAMPS = 8  # of one payload: replicas of a share may tell different times

log = structlog.get_logger()


class NodeDigests:
    """The digests, in the node's own database."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def keep(self, record: LayerRecord) -> None:
        """The node begins to use this layer; what it has kept before stays."""
        self._metadata.fact(_digest(record.chain), lambda: _said(record))

    def demand(self, record: LayerRecord) -> None:
        """Raise `LayerExchanged` where this is not the layer that the node uses."""
        known = self._metadata.recall(_digest(record.chain))
        if known is not None and known != _said(record):
            raise exchanged(record.chain, f"the share has {_said(record)}, this node has kept {known}")

    def condemn(self, chain: str) -> None:
        """The layer was changed in place: nothing new runs from it here."""
        self._metadata.remember(_digest(chain), "changed while it was in use")

    def demand_whole(self, chain: str) -> None:
        """Raise `LayerExchanged` for a layer that was condemned."""
        if (self._metadata.recall(_digest(chain)) or "").startswith("changed"):
            raise exchanged(chain, "its files were changed while this node used it")

    def forget(self, chain: str) -> None:
        """No image of this node needs the layer any more."""
        for name in (_digest(chain), _stamps(chain)):
            self._metadata.forget(name)

    def stamps(self, chain: str) -> list[str]:
        """How the payload looked when it was known to be whole."""
        with suppress(ValueError):
            return [str(one) for one in json.loads(self._metadata.recall(_stamps(chain)) or "[]")]
        return []

    def stamp(self, chain: str, stamp: str) -> None:
        """It looks so now, and is whole."""
        self._metadata.remember(_stamps(chain), json.dumps([*self.stamps(chain), stamp][-MOST_STAMPS:]))


def exchanged(chain: str, why: str) -> LayerExchanged:
    """The error that says so."""
    return LayerExchanged(
        f"layer {chain} on the share is not the one that this node began to use",
        why=why,
        remedy="find out who wrote to the share; then end or move what runs from the image on this node, remove the image and pull "
        "it again: crictl rmi IMAGE; crictl pull IMAGE",
    )


def _digest(chain: str) -> str:
    return f"digest {chain}"


def _stamps(chain: str) -> str:
    return f"stamps {chain}"


def _said(record: LayerRecord) -> str:
    return f"{record.form} {record.digest} of {record.bytes} bytes"


@dataclass
class LayerWatch:
    """Checks the layers in use every so often. `used` names those that this node has from the share, by chain id."""

    share: PosixShare
    store: LayerStore
    kept: NodeDigests
    used: Callable[[], Iterable[str]]
    failed: Callable[[PodferryError], None] = lambda error: None
    every: float = EVERY
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Until `stop`."""
        while not self.store.clock.pause(self.every, self._stop):
            self.look()

    def stop(self) -> None:
        """Let `run` return after the layer at hand."""
        self._stop.set()

    def look(self) -> None:
        """Once at every layer."""
        for chain in self.used():
            if self._stop.is_set():
                return
            try:
                self._look(chain)
            except PodferryError as error:
                self.failed(error)
                log.warning("layer in use not as it was", chain=chain, code=error.code, why=str(error))

    def _look(self, chain: str) -> None:
        layer = self.store.look(chain)
        if layer is None:
            return  # its next use says so
        self.kept.keep(layer.record)
        stamp = self._stamp(layer)
        known = self.kept.stamps(chain)
        if stamp in known:
            return
        if known:
            try:
                self.store.check(layer)
            except LayerDamaged:
                self.kept.condemn(chain)
                raise
        self.kept.stamp(chain, stamp)

    def _stamp(self, layer: Layer) -> str:
        path = f"{layer.at}/{self.store.forms[layer.record.form].payload}"

        def look(share_root: Beneath) -> os.stat_result:
            return share_root.stat(path)

        found = self.share.at(f"look at {path}", look)
        return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
