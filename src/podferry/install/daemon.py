"""The node's containerd: which process it is, what it is configured with, and starting it again."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from podferry.errors import Refused, TimedOut
from podferry.node import outside
from podferry.node.process import run

SOCKET = "/run/containerd/containerd.sock"
CONFIG = "/etc/containerd/config.toml"
RESTART_SECONDS = 60.0
_UNIT = re.compile(r"/([^/]+\.service)$", re.MULTILINE)


@dataclass(frozen=True)
class Daemon:
    """A containerd that runs: its process, its program as the node names it, its configuration, its version."""

    pid: int
    program: str
    config: str
    major: int

    def dump(self) -> str:
        """The configuration that it would start with now, as it understands it. Raises `CommandFailed` where it would not."""
        return run(outside.on_node([self.program, "--config", self.config, "config", "dump"]), timeout=30.0).stdout

    def restart(self) -> Daemon:
        """Start it again, by systemd or by whoever keeps it. Containers run on. Raises `TimedOut` if it does not come."""
        unit = _UNIT.search(Path(f"/proc/{self.pid}/cgroup").read_text())
        if unit and Path("/proc/1/comm").read_text().strip() == "systemd":
            run(outside.on_node(["systemctl", "restart", unit[1]]), timeout=RESTART_SECONDS)
        else:
            self._terminate()
        deadline = time.monotonic() + RESTART_SECONDS
        while True:
            pid = listener(SOCKET)
            if pid not in (None, self.pid):
                return find()
            if time.monotonic() > deadline:
                raise TimedOut(
                    "containerd does not come back", why=f"nobody listens at {SOCKET} after {RESTART_SECONDS:.0f} s"
                )
            time.sleep(0.1)  # the birth of a socket is no event that others could wait for

    def _terminate(self) -> None:
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self.pid)
            try:
                if listener(SOCKET) == self.pid:  # or else it has ended, and its pid may be another's
                    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            finally:
                os.close(pidfd)


def find() -> Daemon:
    """The containerd that listens at `SOCKET`. Raises `Refused` where none does."""
    pid = listener(SOCKET)
    if pid is None:
        raise Refused("containerd does not run on this node", why=f"nobody listens at {SOCKET}")
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    program = os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115 - as the node names it
    printed = run(outside.on_node([program, "--version"]), timeout=30.0).stdout
    version = re.search(r"\bv?(\d+)\.\d+\.\d+", printed)
    if version is None:
        raise Refused("cannot tell the version of containerd", why=printed.strip()[:200])
    return Daemon(pid, program, _config(words), int(version[1]))


def _config(words: list[str]) -> str:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--config", "-config", "-c"):
            return value if equals else following
    return CONFIG


def listener(socket: str, proc: Path = Path("/proc")) -> int | None:
    """The process that listens at a unix socket of this network namespace, None where none does."""
    lines = (proc / "net" / "unix").read_text().splitlines()[1:]
    # Flags 00010000 is __SO_ACCEPTCON: a socket that listens (Linux, net/unix/af_unix.c, unix_seq_show).
    fields = [line.split() for line in lines]
    inodes = {f"socket:[{one[6]}]" for one in fields if len(one) == 8 and one[3] == "00010000" and one[7] == socket}
    for entry in sorted((one for one in proc.iterdir() if one.name.isdigit()), key=lambda one: int(one.name)):
        try:
            if any(os.readlink(fd) in inodes for fd in (entry / "fd").iterdir()):  # noqa: PTH115
                return int(entry.name)
        except OSError:
            continue  # it ended while we looked
    return None
