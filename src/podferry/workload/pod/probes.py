"""A pod's liveness probes, as far as they reach it by the network. The kubelet restarts a container whose probe fails so often, and
a container that stands still to be moved answers nobody; so these are answered for it (`podferry.workload.answering`). Probes that
run a command are podferry-runc's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """A liveness probe at `port`. `path` is what an HTTP probe asks for; empty with the others (tcp, grpc)."""

    port: int
    path: str = ""


def network_probes(pod: Json) -> tuple[Probe, ...]:
    """Those of the containers that run as long as the pod does. A probe of another host than the pod does not reach it."""
    spec = pod["spec"]
    containers = [one for one in spec.get("initContainers") or [] if one.get("restartPolicy") == "Always"]
    found = [_of(one) for one in [*containers, *spec["containers"]]]
    return tuple(dict.fromkeys(one for one in found if one is not None))


def _of(container: Json) -> Probe | None:
    probe = container.get("livenessProbe") or {}
    for kind in ("httpGet", "tcpSocket", "grpc"):
        if (asked := probe.get(kind)) is not None:
            port = _port(asked.get("port"), container)
            path = asked.get("path") or "/" if kind == "httpGet" else ""
            return None if port is None else Probe(port, path if path.startswith("/") or not path else f"/{path}")
    return None


def _port(named: int | str | None, container: Json) -> int | None:
    """A port by its number or, as the kubelet does, by the name that the container gives it."""
    for one in container.get("ports") or []:
        if one.get("name") == named:
            return int(one["containerPort"])
    try:
        return int(named or 0) or None
    except ValueError:
        return None
