"""What an agent has to know of the pod that moves, as the controller writes it into the Migration: agents may read no pods."""

from __future__ import annotations

from typing import Any

from podferry.kube.migration import MovedContainer

Json = dict[str, Any]


def moved_containers(pod: Json) -> list[MovedContainer]:
    """The containers that run as long as the pod does, in the order in which the kubelet starts them."""
    sidecars = [one for one in pod["spec"].get("initContainers") or [] if one.get("restartPolicy") == "Always"]
    return [_of(one) for one in [*sidecars, *pod["spec"]["containers"]]]


def _of(container: Json) -> MovedContainer:
    probe = container.get("livenessProbe") or {}
    for kind in ("httpGet", "tcpSocket", "grpc"):
        if (asked := probe.get(kind)) is not None and (port := _port(asked.get("port"), container)) is not None:
            path = asked.get("path") or "/" if kind == "httpGet" else ""
            slashed = path if path.startswith("/") or not path else f"/{path}"
            return MovedContainer(name=container["name"], probe_port=port, probe_path=slashed)
    return MovedContainer(name=container["name"])


def _port(named: int | str | None, container: Json) -> int | None:
    """A port by its number or, as the kubelet does, by the name that the container gives it."""
    for one in container.get("ports") or []:
        if one.get("name") == named:
            return int(one["containerPort"])
    try:
        port = int(named or 0)
    except ValueError:
        return None
    return port if 0 < port <= 65535 else None
