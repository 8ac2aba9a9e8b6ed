"""Which layers a node uses, as one file per node on the share.

A reference is written before the layer is looked at, and the collector looks at references again after it has moved a
layer out of sight and waited; so either the node finds the layer gone, or the collector finds the reference. A file
stays valid however long its node is away: only `forget` (a person's word) removes it.

A write whose outcome is unknown may land later and would then hide newer references. So after one the node goes on
under the next file name, and readers take the union of a node's files.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from podferry.errors import PodferryError
from podferry.snapshotter import layout
from podferry.snapshotter.faults import ShareUnavailable
from podferry.snapshotter.layer_ports import Clock, Share
from podferry.snapshotter.layout import NodeRecord


class References:
    """This node's references. `instance` is a random name that the node keeps on its own disk, so that two nodes that
    were given the same name do not write over each other."""

    def __init__(self, share: Share, clock: Clock, node: str, instance: str, layers: Iterable[str] = ()) -> None:
        self.share = share
        self.clock = clock
        self.node = layout.check_node(node)
        self.instance = instance
        self._wanted = frozenset(layers)
        self._written: frozenset[str] = frozenset()  # what the file is known to hold
        self._beat = 0
        self._series = layout.new_token()
        self._number = 0
        self._lock = threading.Lock()

    @property
    def layers(self) -> frozenset[str]:
        """What this node uses."""
        return self._wanted

    @property
    def path(self) -> str:
        """The file that holds them."""
        return f"{layout.NODES}/{self._prefix}{self._series}-{self._number}.json"

    @property
    def _prefix(self) -> str:
        return f"{self.node}.{self.instance}."

    def holds(self, chain: str) -> bool:
        """Whether the share is known to have this reference."""
        return chain in self._wanted and chain in self._written

    def add(self, *chains: str) -> None:
        """Refer to layers. When this returns, the collector of any node will see it in time."""
        with self._lock:
            self._wanted |= set(chains)
            if not self._written.issuperset(chains):
                self._write()

    def drop(self, *chains: str) -> None:
        """Give layers up. It is written with the next heartbeat: a reference too many does no harm."""
        with self._lock:
            self._wanted -= set(chains)

    def heartbeat(self) -> None:
        """Write the file anew (the node lives, and uses these) and remove what earlier runs and lost writes left."""
        with self._lock:
            self._write()
            current = self.path.rpartition("/")[2]
            for name in self.share.names(layout.NODES):
                if name.startswith(self._prefix) and name != current:
                    self.share.remove(f"{layout.NODES}/{name}")

    def _write(self) -> None:
        wanted = self._wanted
        self._beat += 1
        record = NodeRecord(self.node, self.instance, wanted, self._beat, self.clock.wall())
        try:
            self.share.replace(self.path, layout.encode(record))
        except PodferryError:
            self._number += 1
            self._written = frozenset()
            raise
        self._written = wanted


def all_nodes(share: Share) -> dict[str, NodeRecord]:
    """Every node's references, by `NODE.INSTANCE`.

    Raises `ShareRefused` for a file that cannot be read, since it may hold any layer, and `ShareUnavailable` when the
    listing was out of date, since what replaced the missing file was not seen.
    """
    nodes: dict[str, NodeRecord] = {}
    for name in share.names(layout.NODES):
        try:
            record = layout.decode_node(name, share.read(f"{layout.NODES}/{name}"))
        except FileNotFoundError as gone:
            raise ShareUnavailable("the list of nodes changed while it was read", why=f"{name} is gone") from gone
        key = f"{record.node}.{record.instance}"
        known = nodes.get(key, record)
        newest = max(known, record, key=lambda one: one.seen)
        nodes[key] = NodeRecord(record.node, record.instance, known.layers | record.layers, newest.beat, newest.seen)
    return nodes


def forget(share: Share, node: str) -> int:
    """Remove the references of a node that will not come back; how many files that were."""
    prefix = f"{layout.check_node(node)}."
    names = [name for name in share.names(layout.NODES) if name.startswith(prefix)]
    for name in names:
        share.remove(f"{layout.NODES}/{name}")
    return len(names)
