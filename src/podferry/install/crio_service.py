"""The node's CRI-O: which process it is, what it is configured with, what is added for podferry, and starting it again.

CRI-O merges the files of its drop-in directory over its main file, in the order of their names (crio.conf.d(5)), so a file of our
own is all it takes. containerd's counterparts are `daemon` and `settings`.
"""

from __future__ import annotations

import os
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from podferry.errors import Refused
from podferry.install import containerd_service
from podferry.install.files import Root
from podferry.node import kubelet, outside
from podferry.node.process import PATH, run

SOCKET = "/run/crio/crio.sock"
DROP_INS = "/etc/crio/crio.conf.d"
NAME = "90-podferry.conf"
RUNTIME = "podferry"
RUNC_STATE = "/run/runc"
"""Where CRI-O has runc keep its state, unless its settings say otherwise."""
CONTAINERS = "/run/containers/storage/overlay-containers"
_DUMP_SECONDS = 30.0

Table = dict[str, Any]


@dataclass(frozen=True)
class CrioDaemon:
    """A CRI-O that runs: its process, its program as the node names it, the flags that say what it is configured with."""

    pid: int
    program: str
    flags: tuple[str, ...]
    drop_ins: str
    name: str = "CRI-O"

    def dump(self) -> str:
        """The settings that it would start with now, as it understands them. Raises `CommandFailed` where it would not."""
        return run(outside.on_node([self.program, *self.flags, "config"]), timeout=_DUMP_SECONDS).stdout

    def restart(self) -> None:
        """Start it again. Containers run on: conmon keeps them. Raises `TimedOut` if it does not come."""
        containerd_service.restart(self.name, self.pid, SOCKET)

    def settings(self, wrapper: str) -> dict[str, str]:
        """The files to write. Raises `Refused` where there is no runc to call."""
        if not _has_runc(Root(outside.root())):
            raise Refused(
                "this node has no runc, and podferry's runtime is runc by another program",
                why=f"it is in none of {PATH.replace(':', ', ')}; CRI-O may well use crun, which cannot restore what runc saved",
                remedy="install runc beside it; pods without the RuntimeClass podferry are not touched by that",
            )
        return {f"{self.drop_ins}/{NAME}": drop_in(self.dump(), wrapper)}


def find() -> CrioDaemon | None:
    """The CRI-O that listens at `SOCKET`; None where none does."""
    pid = containerd_service.listener(Root(outside.root()).path(SOCKET))
    if pid is None:
        return None
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return CrioDaemon(pid, os.readlink(f"/proc/{pid}/exe"), *flags_of(words))  # noqa: PTH115 - as the node names it


def flags_of(words: list[str]) -> tuple[tuple[str, ...], str]:
    """The flags of a `crio` that choose its configuration, and the directory of drop-ins."""
    kept, drop_ins = [], DROP_INS
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--config", "-c", "--config-dir", "-d"):
            given = value if equals else following
            kept += [name, given]
            drop_ins = given if name in ("--config-dir", "-d") else drop_ins
    return tuple(kept), drop_ins.rstrip("/") or DROP_INS


def makes_the_pods() -> bool:
    """Whether this node's pods are CRI-O's: the kubelet says so, or containerd does not run."""
    found = kubelet.find()
    if found is not None and found.endpoint:
        return found.has_crio
    return containerd_service.listener(Root(outside.root()).path(containerd_service.SOCKET)) is None


def drop_in(dump: str, wrapper: str) -> str:
    """The drop-in's text: the runtime is the node's own runc in all but its program. `dump` is CRI-O's word on its settings."""
    try:
        runtime: Table = tomllib.loads(dump).get("crio", {}).get("runtime", {})
    except tomllib.TOMLDecodeError as damaged:
        raise Refused.because("CRI-O's settings are not TOML", damaged) from damaged
    known = runtime.get("runtimes", {})
    runc, usual = known.get("runc", {}), known.get(runtime.get("default_runtime", "runc"), {})
    # How conmon runs is the node's choice whatever runtime it calls; the rest of a runtime that is not runc need not fit.
    ours = {key: value for key, value in usual.items() if key.startswith("monitor_")} | runc
    ours |= {
        "runtime_path": wrapper,
        "runtime_type": "oci",
        "runtime_root": runc.get("runtime_root") or RUNC_STATE,
    }
    ours = {key: value for key, value in ours.items() if value not in ("", None)}
    return tomli_w.dumps({"crio": {"runtime": {"runtimes": {RUNTIME: ours}}}})


def users(root: Root, wrapper: str) -> list[str]:
    """The containers that conmon runs by `wrapper`."""
    found = []
    for pid_file in sorted(root.path(CONTAINERS).glob("*/userdata/conmon-pidfile")):
        with suppress(OSError, ValueError):
            words = Path(f"/proc/{int(pid_file.read_text())}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if wrapper in words:
                found.append(pid_file.parents[1].name)
    return found


def _has_runc(root: Root) -> bool:
    return any(root.path(f"{directory}/runc").exists() for directory in PATH.split(":"))
