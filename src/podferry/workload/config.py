"""What an agent is told at its start: one JSON file, read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from podferry.errors import UsageError
from podferry.node.own_tmpfs import SIZE


@dataclass(frozen=True)
class Config:
    """An agent's settings.

    `node` is this node's name and must be the one in its certificate; `listen` is HOST:PORT for other agents; `certificates`
    holds ca.crt, node.crt and node.key; `peers` maps node names to HOST:PORT; `state` is on disk, `run` on a tmpfs;
    `containerd` and `namespace` say whose containers are moved; `crio` is CRI-O's socket where pods are its, empty elsewhere;
    `wrapper` is podferry-runc on this node; `logs` is the directory below which the output of containers that arrive is
    written; `capabilities` are those that they may have beyond containerd's default; `metrics` is HOST:PORT for Prometheus,
    empty for none; `kubelet` is the kubelet's directory, where pods have their volumes; `run_size` is the size of the tmpfs
    that is mounted at `run`, as mount(8) takes it, empty for none.
    """

    node: str
    listen: str
    certificates: Path
    peers: dict[str, str] = field(default_factory=dict)
    state: Path = Path("/var/lib/podferry")
    run: Path = Path("/run/podferry")
    containerd: Path = Path("/run/containerd/containerd.sock")
    namespace: str = "default"
    wrapper: Path = Path("/usr/local/sbin/podferry-runc")
    metrics: str = ""
    crio: str = ""
    kubelet: Path = Path("/var/lib/kubelet")
    logs: Path = Path("/var/log")
    capabilities: frozenset[str] = frozenset()
    run_size: str = SIZE

    @property
    def socket(self) -> Path:
        """Where people and scripts reach this agent."""
        return self.run / "agent.sock"

    @property
    def migrations(self) -> Path:
        """Journals and records of migrations, which outlive the agent."""
        return self.state / "migrations"

    @property
    def incoming(self) -> Path:
        """What has arrived for containers that are to be restored here; the OCI wrapper looks here too."""
        return self.run / "incoming"

    @property
    def staging(self) -> Path:
        """Files of pods that arrive, until the kubelet has made their places."""
        return self.state / "staging"

    @property
    def arrived(self) -> Path:
        """Marks of containers of pods that were restored here; the OCI wrapper looks here too."""
        return self.state / "arrived"

    @property
    def departed(self) -> Path:
        """Marks of pods that leave, or have left; the OCI wrapper looks here too."""
        return self.state / "departed"

    @property
    def translations(self) -> Path:
        """What is known of pods' connections that go on although an end has another address."""
        return self.state / "translations"

    @property
    def outgoing(self) -> Path:
        """CRIU's images of containers that leave."""
        return self.run / "outgoing"


PORT, METRICS_PORT = 7400, 7401
"""Where agents of a Kubernetes cluster listen for each other, and for Prometheus."""


def of_kubernetes(environment: Mapping[str, str]) -> Config:
    """The configuration of an agent in a pod of its own: the DaemonSet says which node it is on. Raises `UsageError`."""
    missing = [name for name in ("NODE_NAME", "NODE_IP") if not environment.get(name)]
    if missing:
        raise UsageError(
            "the agent's settings lack the name or the address of its node",
            why=f"{' and '.join(missing)} not set",
            remedy="start it by podferry's DaemonSet (deploy/agent.yaml)",
        )
    address = environment["NODE_IP"]
    host = f"[{address}]" if ":" in address else address
    return Config(
        node=environment["NODE_NAME"],
        listen=f"{host}:{PORT}",
        metrics=f"{host}:{METRICS_PORT}",
        certificates=Path("/var/lib/podferry/pki"),
        namespace="k8s.io",
        wrapper=Path("/opt/podferry/bin/podferry-runc"),
        run_size="",  # `podferry install` has mounted it on the node, before this container was made
    )


PATHS = frozenset({"certificates", "state", "run", "containerd", "wrapper", "kubelet", "logs"})


def load(path: Path) -> Config:
    """Read a configuration. Raises `UsageError` naming the file and the field that is wrong."""
    remedy = "see docs/agent.md for the fields"
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read the agent's configuration {path}", why=str(error.strerror)) from error
    except ValueError as error:
        raise UsageError(f"the agent's configuration {path} is not JSON", why=str(error), remedy=remedy) from error
    if not isinstance(data, dict):
        raise UsageError(f"the agent's configuration {path} is not a JSON object", remedy=remedy)
    known = {one.name: one for one in fields(Config)}
    unknown = sorted(set(data) - set(known))
    missing = sorted(
        name
        for name, one in known.items()
        if one.default is MISSING and one.default_factory is MISSING and name not in data
    )
    if unknown or missing:
        why = "; ".join(
            f"{word} field {', '.join(names)}" for word, names in (("unknown", unknown), ("missing", missing)) if names
        )
        raise UsageError(f"the agent's configuration {path} cannot be used", why=why, remedy=remedy)
    for name, value in data.items():
        wanted = {"peers": dict, "capabilities": list}.get(name, str)
        if not isinstance(value, wanted) or (wanted is list and not all(isinstance(one, str) for one in value)):
            raise UsageError(
                f"the agent's configuration {path} cannot be used", why=f"{name} is not a {wanted.__name__}"
            )
    typed: dict[str, Any] = {name: _typed(name, value) for name, value in data.items()}
    return Config(**typed)


def _typed(name: str, value: Any) -> Any:
    if name in PATHS:
        return Path(value)
    return frozenset(value) if name == "capabilities" else value
