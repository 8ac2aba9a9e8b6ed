"""Copying committed layers to the share, in the background.

containerd's `Commit` must not wait for a network, so a layer is committed on the node's disk and put in this queue,
which is nothing but the layers in the metadata whose home is still the disk: a crash loses nothing, and a share that comes
back gets what has gathered. The lease that `Prepare` took is kept alive until the layer is published.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from podferry.errors import Failed, PodferryError
from podferry.snapshotter.faults import LayerExchanged, LayerUnfit
from podferry.snapshotter.leases import Lease
from podferry.snapshotter.metadata import Metadata, this_boot
from podferry.snapshotter.snapshot_row import Home, SnapshotRow
from podferry.snapshotter.store import LayerStore

RETRY = (5.0, 60.0)  # seconds after a failure: the first, and the longest
BETWEEN_LAYERS = 0.5  # seconds; containerd takes less from one layer's commit to the next one's Prepare
YIELDS_TO_PULLS = 15.0  # seconds at most, since other nodes may wait for the layer
STAYS = "stays on this node: "

log = structlog.get_logger()


@dataclass
class _Held:
    lease: Lease
    since: float


@dataclass
class Publisher:
    """Moves layers from the node's disk to the share. `hold_limit` is for how long, in seconds, a lease is kept for a
    layer that containerd has not committed: it may have died. `pulling` tells whether containerd unpacks layers now."""

    root: Path
    metadata: Metadata
    store: LayerStore
    hold_limit: float = 900.0
    pulling: Callable[[], bool] = lambda: False
    published: Callable[[SnapshotRow, float], None] = lambda layer, seconds: None
    failed: Callable[[PodferryError], None] = lambda error: None
    _held: dict[str, _Held] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _wake: threading.Event = field(default_factory=threading.Event)
    _stopped: bool = False

    def wake(self) -> None:
        """There is something to publish."""
        self._wake.set()

    def stop(self) -> None:
        """Let `run` return after the layer at hand."""
        self._stopped = True
        self._wake.set()

    def hold(self, chain: str, lease: Lease) -> None:
        """Keep a lease until its layer is published or given up."""
        with self._lock:
            self._held[chain] = _Held(lease, self.store.clock.monotonic())

    def holds(self, chain: str) -> bool:
        """Whether this node itself is making the layer."""
        with self._lock:
            return chain in self._held

    def abandon(self, chain: str) -> None:
        """containerd gave up a layer: another node may make it."""
        self._release(chain)

    def run(self) -> None:
        """Publish until `stop`."""
        pause = RETRY[0]
        while not self._stopped:
            self._wake.clear()
            self._yield_to_pulls()
            if self.publish_all():
                self._wake.wait()
                pause = RETRY[0]
            elif not self._wake.wait(pause):
                pause = min(pause * 2, RETRY[1])

    def _yield_to_pulls(self) -> None:
        """Wait while layers are unpacked here: to pack and copy one meanwhile would take the processor and the link from them."""
        clock = self.store.clock
        until = clock.monotonic() + YIELDS_TO_PULLS
        while self.metadata.layers(Home.DISK) and not self._stopped and clock.monotonic() < until:
            clock.pause(BETWEEN_LAYERS)
            if not self.pulling():
                return

    def publish_all(self) -> bool:
        """Publish every layer that waits; False when some could not be and should be tried again."""
        complete = True
        for layer in [] if self.store.read_only else self.metadata.layers(Home.DISK):
            if self._stopped:
                return True
            if not layer.note.startswith(STAYS):
                complete = self.publish(layer) and complete
        self.drop_copies()
        return complete

    def publish(self, layer: SnapshotRow) -> bool:
        """Publish one layer; False when it should be tried again."""
        assert layer.chain is not None
        begun = self.store.clock.monotonic()
        try:
            if layer.boot != this_boot():  # nothing says how much of it had reached the disk when the machine stopped
                raise LayerUnfit("the machine was restarted before the layer was published")
            self.store.publish(layer.chain, self.root / "snapshots" / str(layer.id) / "fs")
        except (LayerUnfit, LayerExchanged) as error:
            self.metadata.note(layer.id, f"{STAYS}{error}")
            self.failed(error)
            log.warning("layer stays on this node", chain=layer.chain, code=error.code, why=str(error))
        except (PodferryError, OSError) as error:
            self.metadata.note(layer.id, str(error))
            self.failed(Failed.because("not published", error) if isinstance(error, OSError) else error)
            log.warning("layer not published yet", chain=layer.chain, why=str(error))
            return False
        else:
            self.metadata.move(layer.id, Home.SHARE)
            seconds = self.store.clock.monotonic() - begun
            self.published(layer, seconds)
            log.info("layer published", chain=layer.chain, seconds=round(seconds, 3))
        self._release(layer.chain)
        return True

    def drop_copies(self) -> None:
        """Delete the disk copies of published layers that no container mounted before they moved."""
        for layer in self.metadata.layers(Home.SHARE):
            if layer.moved_at is not None and not self.metadata.users_of_copy(layer):
                shutil.rmtree(self.root / "snapshots" / str(layer.id), ignore_errors=True)
                self.metadata.emptied(layer.id)

    def renew(self) -> None:
        """Show that the leases' owner lives. Called a few times per lease period."""
        now = self.store.clock.monotonic()
        waiting = {layer.chain for layer in self.metadata.layers(Home.DISK)}
        with self._lock:
            held = dict(self._held)
        for chain, one in held.items():
            given_up = chain not in waiting and now - one.since > self.hold_limit
            if given_up or not self.store.leases.renew(one.lease):
                with self._lock:
                    self._held.pop(chain, None)

    def _release(self, chain: str) -> None:
        with self._lock:
            one = self._held.pop(chain, None)
        if one is not None:
            try:
                self.store.leases.release(one.lease)
            except PodferryError as error:  # it will expire
                log.info("lease not released", chain=chain, why=str(error))
