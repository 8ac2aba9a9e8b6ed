"""What the snapshotter does by the clock: heartbeats, leases, collection, the state of the share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from podferry.errors import Failed, PodferryError
from podferry.snapshotter.collect import Collector
from podferry.snapshotter.metrics import Metrics
from podferry.snapshotter.posix import PosixShare
from podferry.snapshotter.prefetch import Prefetcher
from podferry.snapshotter.publisher import Publisher
from podferry.snapshotter.snapshot_row import Home

log = structlog.get_logger()


@dataclass
class Chore:
    """Something done every so many seconds."""

    name: str
    every: float
    work: Callable[[], None]
    due: float = 0.0


@dataclass
class Housekeeping:
    """Runs the chores one after the other. One that fails is logged and comes again in its turn."""

    share: PosixShare
    publisher: Publisher
    collector: Collector | None
    prefetcher: Prefetcher
    metrics: Metrics
    heartbeat: float = 60.0  # seconds
    collect_every: float = 600.0
    note_every: float = 20.0
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Until `stop`."""
        store = self.publisher.store
        chores = [Chore("renew leases", store.leases.period / 4, self.publisher.renew)]
        chores.append(Chore("look at the share", 15.0, self._observe))
        if not store.read_only:
            chores.append(Chore("write references", self.heartbeat, store.references.heartbeat))
            chores.append(Chore("note what was read", self.note_every, self.prefetcher.note))
            if self.collector is not None:
                chores.append(Chore("collect", self.collect_every, self._collect))
        clock = store.clock
        while not self._stop.is_set():
            for chore in chores:
                if chore.due <= clock.monotonic():
                    chore.due = clock.monotonic() + chore.every
                    self._do(chore)
            next_due = min(chore.due for chore in chores)
            clock.pause(max(0.0, next_due - clock.monotonic()), self._stop)

    def stop(self) -> None:
        """Let `run` return."""
        self._stop.set()

    def _do(self, chore: Chore) -> None:
        try:
            chore.work()
        except PodferryError as error:
            self.metrics.failed(error)
            log.warning("chore failed", chore=chore.name, code=error.code, why=str(error))
        except Exception as error:  # the other chores go on: without them this node's leases and references would lapse
            self.metrics.failed(Failed.because(f"cannot {chore.name}", error))
            log.exception("chore failed", chore=chore.name, why=str(error))

    def _collect(self) -> None:
        assert self.collector is not None
        done = self.collector.collect()
        self.metrics.collected.inc(len(done.removed))
        if done.condemned or done.restored or done.removed:
            log.info("collected", condemned=done.condemned, restored=done.restored, removed=done.removed)

    def _observe(self) -> None:
        metadata = self.publisher.metadata
        self.metrics.waiting.set(len(metadata.layers(Home.DISK)))
        self.metrics.referred.set(len(self.publisher.store.references.layers))
        self.metrics.stuck.set(len(self.share.guard.stuck))
        up = False
        try:
            free, _ = self.share.space()
            self.metrics.free.set(free)
            up = True
        finally:
            was, self._up = getattr(self, "_up", None), up
            self.metrics.up.set(up)
            if was is False and up:
                log.info("the share is back")
                self.publisher.wake()
