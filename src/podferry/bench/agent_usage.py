"""What the benchmark asks of a lab's agents and of their nodes."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from podferry.errors import Failed, PodferryError
from podferry.lab import Lab

PERIOD = 0.05
DAEMON = "podferry.lazypages.daemon"


def ask(lab: Lab, node: str, op: str, **arguments: Any) -> Any:
    """Ask a node's agent over its socket (`agent.control` has the protocol) and return the result.

    Raises the error that the agent answers with, or `Failed` where it went away.
    """
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(lab.agent_socket(node)))
        link.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
        with link.makefile("rb") as lines:
            for line in lines:
                answer = json.loads(line)
                if "error" in answer:
                    raise PodferryError.from_dict(answer["error"])
                if "result" in answer:
                    return answer["result"]
    raise Failed(f"the agent of {node} went away before it answered '{op}'")


def sent_bytes(lab: Lab, node: str) -> int:
    """What a node's link has carried away from it so far, headers included."""
    return int((lab.root(node) / "sys/class/net/eth0/statistics/tx_bytes").read_text())


def anonymous_bytes(lab: Lab, node: str, pid: int) -> int:
    """The private memory that a process of a node has touched; `pid` as the node counts."""
    return _field(lab.root(node) / f"proc/{pid}/smaps_rollup", "Anonymous")


def agent_pid(lab: Lab, node: str) -> int:
    """The agent's process, as its node counts."""
    return int((lab.root(node) / "run/service/agent/supervise/pid").read_text())


def forget_peak(lab: Lab, node: str) -> None:
    """Begin to look for the agent's largest size anew (proc(5), clear_refs 5)."""
    (lab.root(node) / f"proc/{agent_pid(lab, node)}/clear_refs").write_text("5")


def peak_bytes(lab: Lab, node: str) -> int:
    """The agent's largest size since `forget_peak`."""
    return _field(lab.root(node) / f"proc/{agent_pid(lab, node)}/status", "VmHWM")


@dataclass(frozen=True)
class Sample:
    """The target at a moment (ns): bytes in the page store, in the lazy-pages daemon, and in the job."""

    at: int
    store: int
    daemon: int
    job: int


class TargetSampler:
    """Samples of the target from the lazy-pages daemon's start on, twenty a second, on a thread of its own."""

    def __init__(self, lab: Lab, node: str, bundle: Path) -> None:
        self._root, self._bundle = lab.root(node), bundle
        self.samples: list[Sample] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> TargetSampler:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        daemon: Path | None = None
        while not self._end.wait(PERIOD):
            daemon = daemon or self._find_daemon()
            if daemon is not None:
                self.samples.append(Sample(time.time_ns(), self._store(), _resident(daemon), self._job()))

    def _find_daemon(self) -> Path | None:
        for process in self._root.glob("proc/[0-9]*"):
            with suppress(OSError):
                if DAEMON.encode() in (process / "cmdline").read_bytes():
                    return process
        return None

    def _store(self) -> int:
        total = 0
        with suppress(OSError):
            for path in self._root.glob("run/podferry/arriving/*/store/*"):
                with suppress(OSError):
                    total += path.stat().st_blocks * 512
        return total

    def _job(self) -> int:
        try:
            pid = int((self._root / self._bundle / "init.pid").read_text())
        except (OSError, ValueError):
            return 0
        return _resident(self._root / f"proc/{pid}")


def _resident(process: Path | None) -> int:
    try:
        return _field(process / "status", "RssAnon") if process else 0
    except OSError:
        return 0


def _field(path: Path, name: str) -> int:
    """A field of /proc in bytes, which has it in KiB; 0 where it is missing."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0
