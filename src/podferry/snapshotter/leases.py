"""Leases: of many nodes that need the same layer, one makes it.

A lease is a file that one node creates (O_EXCL) and whose count it raises while it lives. Nobody compares clocks of two
machines: who finds a lease watches its count, and takes it for dead when the count has stood still for a whole period
by the watcher's own clock. Taking over means creating the next generation's file, which again only one can.

Leases save work; nothing unsafe happens when two nodes hold one (a listing may be stale). What must not happen twice is
decided by the rename that publishes.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from podferry.snapshotter import layout
from podferry.snapshotter.layer_ports import Clock, Share
from podferry.snapshotter.layout import LeaseRecord


@dataclass
class Lease:
    """A lease that this node holds."""

    name: str
    generation: int
    record: LeaseRecord

    @property
    def path(self) -> str:
        return f"{layout.LEASES}/{self.name}.{self.generation}"


@dataclass(frozen=True)
class Taken:
    """Somebody else holds it."""

    node: str


@dataclass
class Leases:
    """This node's view of the leases on a share. `period` is how long a count may stand still, in seconds."""

    share: Share
    clock: Clock
    node: str
    period: float = 30.0
    _seen: dict[str, tuple[LeaseRecord, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, name: str) -> Lease | Taken:
        """The lease `name`, or who has it. To be called again while waiting: that is how a dead owner is noticed."""
        self.share.refresh(layout.LEASES)
        generations = self._generations(name)
        top = max(generations, default=0)
        if top:
            try:
                holder = layout.decode_lease(self.share.read(f"{layout.LEASES}/{name}.{top}"))
            except FileNotFoundError:
                return Taken("")  # released this moment, or an old listing; the next call will tell
            if self._alive(f"{name}.{top}", holder):
                return Taken(holder.node)
        lease = Lease(name, top + 1, LeaseRecord(self.node, layout.new_token()))
        try:
            self.share.create(lease.path, layout.encode(lease.record))
        except FileExistsError:
            try:
                winner = layout.decode_lease(self.share.read(lease.path))
            except FileNotFoundError:
                return Taken("")
            if winner.token != lease.record.token:  # ours, if only the reply was lost
                return Taken(winner.node)
        for old in generations:
            self.share.remove(f"{layout.LEASES}/{name}.{old}")
        return lease

    def holder(self, name: str) -> str:
        """Who makes what the lease `name` is for, with its count, which rises while it lives; empty where nobody does."""
        self.share.refresh(layout.LEASES)
        if not (top := max(self._generations(name), default=0)):
            return ""
        try:
            found = layout.decode_lease(self.share.read(f"{layout.LEASES}/{name}.{top}"))
        except FileNotFoundError:
            return ""
        return f"{found.node} {top}.{found.beat}"

    def renew(self, lease: Lease) -> bool:
        """Show that the owner lives; False when the lease is not ours any more."""
        try:
            found = layout.decode_lease(self.share.read(lease.path))
            if found.token != lease.record.token:
                return False
            lease.record = LeaseRecord(self.node, lease.record.token, lease.record.beat + 1)
            self.share.rewrite(lease.path, layout.encode(lease.record))
        except FileNotFoundError:
            return False
        return True

    def release(self, lease: Lease) -> None:
        """Give it up; whoever waits goes on at once."""
        try:
            if layout.decode_lease(self.share.read(lease.path)).token == lease.record.token:
                self.share.remove(lease.path)
        except FileNotFoundError:
            return

    def _generations(self, name: str) -> list[int]:
        tails = [entry[len(name) + 1 :] for entry in self.share.names(layout.LEASES) if entry.startswith(f"{name}.")]
        return sorted(int(tail) for tail in tails if tail.isdecimal() and len(tail) < 10)

    def _alive(self, key: str, holder: LeaseRecord) -> bool:
        now = self.clock.monotonic()
        with self._lock:
            before = self._seen.get(key)
            if before is None or before[0] != holder:
                self._seen[key] = (holder, now)
                return True
            if now - before[1] < self.period:
                return True
            del self._seen[key]
            return False
