"""A pod's liveness probes, as far as they reach it by the network. The kubelet restarts a container whose probe fails so often, and
a container that stands still to be moved answers nobody; so these are answered for it (`podferry.workload.answering`). Probes that
run a command are podferry-runc's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the process that answers probes stays small
    from podferry.kube.migration import MovedContainer


@dataclass(frozen=True)
class Probe:
    """A liveness probe at `port`. `path` is what an HTTP probe asks for; empty with the others (tcp, grpc)."""

    port: int
    path: str = ""


def network_probes(containers: Iterable[MovedContainer]) -> tuple[Probe, ...]:
    """Those of the containers that move, each once."""
    found = [Probe(one.probe_port, one.probe_path) for one in containers if one.probe_port is not None]
    return tuple(dict.fromkeys(found))
