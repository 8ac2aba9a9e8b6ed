"""What the source tells the target of a container: its record, where its image is, where its output goes.

It comes from a peer, and the target acts on it as root: so it is decoded strictly, and what it names is bounded.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from podferry.core.preflight import OWN_BINDS
from podferry.errors import PeerMisbehaved, Refused
from podferry.node.checkpoint import FLAGS
from podferry.node.jobfacts import binds
from podferry.node.records import Container, Opaque, Stdio

LOG_ROOTS = (Path("/var/log"),)
"""A container's output is only ever written below these, whatever the source says."""

MOST_LAYERS, LONGEST = 500, 255
"""overlayfs takes no more layers (OVL_MAX_STACK in fs/overlayfs/ovl_entry.h); characters of a layer's name."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
OPTIONS_TYPE = "containerd.runc.v1.Options"
_SCHEME = "file://"


@dataclass(frozen=True)
class Offered:
    """A container as it is offered. `layers` are the chain ids of its image, the lowest first: what its root stands on.
    `flags` are those of the dump and the restore."""

    record: Container
    layers: tuple[str, ...] = ()
    stdio: Stdio = field(default_factory=Stdio)
    flags: tuple[str, ...] = ()

    def record_here(self, wrapper: Path) -> Container:
        """The record as this node keeps it: with its own podferry-runc, whatever path the source names."""
        options = self.record.runc_options()
        options.binary_name, options.root = str(wrapper), ""
        value = Opaque(OPTIONS_TYPE, options.SerializeToString())
        return replace(self.record, snapshot_key=self.record.id, options=value)

    @property
    def log(self) -> Path | None:
        """The file that containerd's shim writes the container's output to, if it does."""
        return log_file(self.stdio)

    def to_dict(self) -> dict[str, Any]:
        """As it travels; `from_dict` is its inverse."""
        return {
            "record": base64.b64encode(self.record.to_bytes()).decode(),
            "layers": list(self.layers),
            "stdio": asdict(self.stdio),
            "flags": list(self.flags),
        }

    @staticmethod
    def from_dict(data: dict[str, Any], name: str) -> Offered:
        """Decode an offer of the container `name`. Raises `PeerMisbehaved` for what no source of ours sends."""
        try:
            record = Container.from_bytes(base64.b64decode(data["record"], validate=True))
            stdio, layers, flags = Stdio(**data["stdio"]), tuple(data["layers"]), tuple(data["flags"])
        except (KeyError, TypeError, binascii.Error) as error:
            raise PeerMisbehaved.because("not an offer of a container", error) from error
        if record.id != name or not _ID.fullmatch(name):
            raise PeerMisbehaved("an offer names one container and holds another", why=f"{name!r}, {record.id!r}")
        if not set(flags) <= FLAGS:
            raise PeerMisbehaved("not an offer of a container", why=f"flags {flags!r}")
        if len(layers) > MOST_LAYERS or not all(isinstance(one, str) and len(one) <= LONGEST for one in layers):
            raise PeerMisbehaved("not an offer of a container", why="its layers are not a list of names")
        offered = Offered(record, layers, stdio, flags)
        spec = record.spec_json()
        if spec.get("hooks"):
            raise Refused(
                "the container has hooks, which would run on the target as root", remedy="run it without hooks"
            )
        if foreign := sorted(one.source for one in binds(spec) if one.destination not in OWN_BINDS):
            raise Refused("the container wants directories of this node", why=", ".join(foreign[:8]))
        if (log := offered.log) is not None and not any(log.is_relative_to(root) for root in LOG_ROOTS):
            raise PeerMisbehaved(f"the source wants output written to {log}", why=f"that is not below {LOG_ROOTS[0]}")
        return offered


def log_file(stdio: Stdio) -> Path | None:
    """The file behind a task's output. Raises `Refused` for output that cannot follow the container."""
    names = {one for one in (stdio.stdout, stdio.stderr) if one}
    if not names and not stdio.stdin:
        return None
    if len(names) != 1 or stdio.stdin or stdio.terminal or not next(iter(names)).startswith(_SCHEME):
        raise Refused(
            "the container's input or output cannot follow it",
            why=f"it goes to {', '.join(sorted(names | {stdio.stdin} - {''}))}, which only this node has",
            remedy="start the container with its output in one log file (ctr run --log-uri file:///var/log/...)",
        )
    path = Path(next(iter(names)).removeprefix(_SCHEME))
    if not path.is_absolute() or ".." in path.parts:
        raise Refused(f"the container's output goes to {path}", why="that is not a plain absolute path")
    return path
