"""The node's containerd: which process it is, what it is configured with, and starting it again."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from podferry.errors import Refused, TimedOut
from podferry.install.files import Root
from podferry.node import outside
from podferry.node.process import run

SOCKET = "/run/containerd/containerd.sock"
CONFIG = "/etc/containerd/config.toml"
RESTART_SECONDS = 60.0
CONNECT_SECONDS = 5.0
_UNIT = re.compile(r"/([^/]+\.service)$", re.MULTILINE)


@dataclass(frozen=True)
class Daemon:
    """A containerd that runs: its process, its program as the node names it, its configuration, its version."""

    pid: int
    program: str
    config: str
    major: int
    name: str = "containerd"

    def dump(self) -> str:
        """The configuration that it would start with now, as it understands it. Raises `CommandFailed` where it would not."""
        return run(outside.on_node([self.program, "--config", self.config, "config", "dump"]), timeout=30.0).stdout

    def restart(self) -> None:
        """Start it again. Containers run on. Raises `TimedOut` if it does not come."""
        restart(self.name, self.pid, SOCKET)


def restart(name: str, pid: int, socket: str) -> None:
    """Have the daemon of this pid, which listens at the node's `socket`, started again: by systemd or by whoever keeps it.

    Raises `TimedOut` if it does not come.
    """
    unit = _UNIT.search(Path(f"/proc/{pid}/cgroup").read_text())
    there = Root(outside.root()).path(socket)
    if unit and Path("/proc/1/comm").read_text().strip() == "systemd":
        run(outside.on_node(["systemctl", "restart", unit[1]]), timeout=RESTART_SECONDS)
    else:
        _terminate(pid, there)
    deadline = time.monotonic() + RESTART_SECONDS
    while listener(there) in (None, pid):
        if time.monotonic() > deadline:
            raise TimedOut(
                f"{name} does not come back", why=f"no process listens at {socket} after {RESTART_SECONDS:.0f} s"
            )
        time.sleep(0.1)  # the birth of a socket is no event that others could wait for


def _terminate(pid: int, there: Path) -> None:
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            if listener(there) == pid:  # or else it has ended, and its pid may be another's
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        finally:
            os.close(pidfd)


def find() -> Daemon:
    """The containerd that listens at `SOCKET`. Raises `Refused` where none does."""
    pid = listener(_socket())
    if pid is None:
        raise Refused("containerd does not run on this node", why=f"no process listens at {SOCKET}")
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    program = os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115 - as the node names it
    printed = run(outside.on_node([program, "--version"]), timeout=30.0).stdout
    version = re.search(r"\bv?(\d+)\.\d+\.\d+", printed)
    if version is None:
        raise Refused("cannot tell the version of containerd", why=printed.strip()[:200])
    return Daemon(pid, program, _config(words), int(version[1]))


def _socket() -> Path:
    return Root(outside.root()).path(SOCKET)


def _config(words: list[str]) -> str:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--config", "-config", "-c"):
            return value if equals else following
    return CONFIG


def listener(path: Path) -> int | None:
    """The process that listens at a unix socket, None where none does: the kernel's word on the other end of a connection.

    Any process that shares the node's network namespace may have bound the same name in a file system of its own: that is another
    socket, though /proc/net/unix shows it by the same path.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as ours:
        ours.settimeout(CONNECT_SECONDS)
        try:
            ours.connect(str(path))
        except OSError:
            return None
        pid, _, _ = struct.unpack("3i", ours.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid or None
