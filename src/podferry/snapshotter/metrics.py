"""What the snapshotter counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from podferry.errors import PodferryError
from podferry.snapshotter.snapshot_row import SnapshotRow


class Metrics:
    """The snapshotter's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter(
            "podferry_snapshotter_calls_total", "containerd's calls", ["call", "code"], registry=self.registry
        )
        self.published = Counter(
            "podferry_layers_published_total", "Layers this node put on the share", registry=self.registry
        )
        self.publishing = Histogram(
            "podferry_layer_publish_seconds",
            "From the start of a layer's copy to its rename",
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self.registry,
        )
        self.failures = Counter(
            "podferry_share_failures_total", "Failed work on the share, by error", ["code"], registry=self.registry
        )
        self.collected = Counter(
            "podferry_layers_collected_total", "Unused layers this node removed", registry=self.registry
        )
        self.prefetched = Counter(
            "podferry_layers_prefetched_bytes_total", "Bytes of layers read ahead", registry=self.registry
        )
        self.waiting = Gauge("podferry_layers_waiting", "Layers not yet on the share", registry=self.registry)
        self.referred = Gauge("podferry_layers_referred", "Layers of the share in use here", registry=self.registry)
        self.up = Gauge("podferry_share_up", "Whether the share answers", registry=self.registry)
        self.stuck = Gauge("podferry_share_calls_stuck", "Calls that have not come back", registry=self.registry)
        self.free = Gauge("podferry_share_free_bytes", "Space left on the share", registry=self.registry)

    def called(self, call: str, code: str) -> None:
        self.calls.labels(call, code).inc()

    def layer_published(self, layer: SnapshotRow, seconds: float) -> None:
        self.published.inc()
        self.publishing.observe(seconds)

    def failed(self, error: PodferryError) -> None:
        self.failures.labels(error.code).inc()
