"""A dump that is ready to begin: runc is started while the job still runs, and held just before CRIU touches anything.

`runc checkpoint` spends a third of its time before the dump: it starts, asks CRIU for its version, then for its features (each a
CRIU of its own), and puts the request together. None of that needs a frozen job. So runc is started early and finds first in
its PATH a `criu` of ours (`gated/criu`, and behind it `gatekeeper.py`), which lets those questions through and holds the
request to dump until the agent opens the gate.

The gate is a FIFO of which the agent holds the writing end: one byte opens it, and its end without one (the agent is dead)
ends the attempt, as does the end of runc. Nothing has happened to the job then.

A memory-skipping dump (`memory_skipping.py`) needs CRIU to see some files otherwise than everybody else does: that, too, is
done there.

An agent in a pod is among other files than runc is. So `gated/criu` is put on the node (`podferry.install`), and runs the
gatekeeper by the Python of the agent's container.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from podferry.errors import CommandFailed, TimedOut
from podferry.node import outside
from podferry.node.process import PATH, Arg, run

SHIM = Path(__file__).with_name("gated") / "criu"
ON_NODE = Path("/opt/podferry/gated/criu")
"""Where the installer puts it for agents in pods."""
GATEKEEPER = Path(__file__).with_name("gatekeeper.py")
TRY_TIMEOUT = 10.0  # seconds


class DumpGate:
    """The agent's end. `path` is where the FIFO is made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path, 0o600)
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    @staticmethod
    def usable() -> bool:
        """Whether runc can run our `criu`: not where the package lies on a file system that runs no programs. For an agent in
        a pod it is tried, in some 100 ms: on the node it may be missing, be another version's, or lack `chroot`.
        """
        if not outside.in_pod():
            return os.access(SHIM, os.X_OK)
        try:
            tried = run(outside.on_node(["criu", "try"]), env=_way(PATH), check=False, timeout=TRY_TIMEOUT)
        except (OSError, CommandFailed, TimedOut):
            return False
        return tried.returncode == 0

    def environment(self, path: str) -> dict[str, str]:
        """What runc needs in its environment, whose PATH would be `path`."""
        return _way(path) | {"PODFERRY_GATE": str(self.path)}

    def open(self) -> None:
        """Let the dump begin. If runc is not so far yet, it will not wait when it is."""
        os.write(self._fd, b"1")

    def close(self) -> None:
        """Let go of the gate: a dump that still waits for it does not take place."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def _way(path: str) -> dict[str, str]:
    """The environment in which `criu` is ours, where PATH would be `path`."""
    shim = ON_NODE if outside.in_pod() else SHIM
    return {
        "PATH": f"{shim.parent}:{path}",
        "PODFERRY_PATH": path,
        "PODFERRY_GATEKEEPER": shlex.join(map(str, _gatekeeper())),
    }


def _gatekeeper() -> list[Arg]:
    """The command that runs the gatekeeper from among the node's files."""
    return [*outside.from_node([sys.executable, "-SI", GATEKEEPER]), outside.root()]
