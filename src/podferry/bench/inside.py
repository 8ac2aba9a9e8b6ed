"""The baselines' part that runs inside a lab's node: runc and CRIU as they come, driven as a careful person would.

They are helped where podferry helps itself: CRIU has podferry's settings, images stay in memory, the target's root is mounted
beforehand, and images cross the link unencrypted. Each command prints one JSON object; moments are ns of unix time.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from podferry.bench.workload import DIRECTORY
from podferry.criu.checkpoint import CRIU_CONF
from podferry.errors import Failed
from podferry.lab.machine_config import SNAPSHOTTER
from podferry.node.process import Arg, ending, last_lines, pasteable, run, spawn

HOME = Path("/run/bench")
ID = "bench"
RUNC = ("runc", "--root", HOME / "runc")
IMAGES_PORT, PAGES_PORT = 7200, 7201
ROOTFS, IMAGES, WORK = HOME / "rootfs", HOME / "images", HOME / "work"
ENVIRONMENT = {"CRIU_CONFIG_FILE": str(CRIU_CONF)}
TIMEOUT = 150.0
"""Seconds; ten times what the slowest step takes. CRIU's lazy migration was seen to hang for ever on a busy machine."""
READY = b"ready\n"


def prepare(argv: Sequence[str], image: str) -> dict[str, Any]:
    """A bundle over the image's root, and empty directories for CRIU."""
    clean()
    for directory in (ROOTFS, IMAGES, WORK):
        directory.mkdir(parents=True)
    run(["ctr", "-n", "default", "images", "mount", "--rw", "--snapshotter", SNAPSHOTTER, image, ROOTFS])
    (ROOTFS / DIRECTORY).mkdir()  # runc moves no files: what the job writes to must be on both nodes
    run(["runc", "spec"], cwd=HOME)
    spec = json.loads((HOME / "config.json").read_text())
    spec["process"] |= {"terminal": False, "args": list(argv), "cwd": "/"}
    spec["root"] = {"path": str(ROOTFS), "readonly": False}
    spec["linux"]["cgroupsPath"] = f"/{ID}"
    (HOME / "config.json").write_text(json.dumps(spec))
    return {}


def start() -> dict[str, Any]:
    """Start the container."""
    _detached([*RUNC, "--log", HOME / "runc.log", "run", "--detach", "--bundle", HOME, ID], HOME / "runc.log")
    return {}


def clean() -> dict[str, Any]:
    """Remove the container and all that was made for it, as far as it is there."""
    run([*RUNC, "delete", "--force", ID], check=False)
    run(["ctr", "-n", "default", "images", "unmount", "--rm", "--snapshotter", SNAPSHOTTER, ROOTFS], check=False)
    shutil.rmtree(HOME, ignore_errors=True)
    return {}


def floor() -> dict[str, Any]:
    """Pause, checkpoint and restore the container where it is; returns what each took, in ms."""
    began = time.time_ns()
    steps = {}
    for name, act in (("pause", _pause), ("checkpoint", _checkpoint), ("restore", _restore)):
        since = time.time_ns()
        act()
        steps[name] = (time.time_ns() - since) / 1e6
    return {"steps": steps, "began": began, "ended": time.time_ns()}


def leave(address: str) -> dict[str, Any]:
    """CRIU's checkpoint, then its images to the target."""
    began = time.time_ns()
    _checkpoint()
    frozen = time.time_ns()
    _send(address)
    return {"began": began, "frozen": frozen, "sent": time.time_ns()}


def leave_lazily(address: str) -> dict[str, Any]:
    """CRIU's checkpoint that keeps the memory here until the target's lazy-pages daemon has fetched it."""
    began = time.time_ns()
    reader, writer = os.pipe()
    lazy = ["--lazy-pages", "--page-server", f"0.0.0.0:{PAGES_PORT}", "--status-fd", str(writer)]
    dump = spawn(_checkpointing(*lazy), env=ENVIRONMENT, pass_fds=[writer])
    os.close(writer)
    if not os.read(reader, 1):
        raise Failed("the lazy checkpoint failed", evidence=last_lines(WORK / "dump.log"))
    frozen = time.time_ns()
    _send(address)
    sent = time.time_ns()
    if dump.wait(TIMEOUT):
        raise Failed("the lazy checkpoint failed", evidence=last_lines(WORK / "dump.log"))
    return {"began": began, "frozen": frozen, "sent": sent}


def arrive() -> dict[str, Any]:
    """Take in images and restore from them."""
    _receive()
    received = time.time_ns()
    _restore()
    restored = time.time_ns()
    return {"received": received, "restored": restored, "home": restored}


def arrive_lazily(address: str) -> dict[str, Any]:
    """Take in images, restore without memory, and fetch it from `address` afterwards."""
    _receive()
    received = time.time_ns()
    reader, writer = os.pipe()
    argv: list[Arg] = ["criu", "lazy-pages", "--images-dir", IMAGES, "--work-dir", WORK, "--log-file", "lazy.log"]
    argv += ["--page-server", "--address", address, "--port", str(PAGES_PORT), "--status-fd", str(writer)]
    daemon = spawn(argv, pass_fds=[writer])
    os.close(writer)
    if not os.read(reader, 1):
        raise Failed("criu lazy-pages failed", evidence=last_lines(WORK / "lazy.log"))
    _restore("--lazy-pages")
    restored = time.time_ns()
    if daemon.wait(TIMEOUT):
        raise Failed("criu lazy-pages failed", evidence=last_lines(WORK / "lazy.log"))
    return {"received": received, "restored": restored, "home": time.time_ns()}


def _pause() -> None:
    run([*RUNC, "pause", ID])


def _checkpointing(*options: Arg) -> list[Arg]:
    return [*RUNC, "checkpoint", *options, "--image-path", IMAGES, "--work-path", WORK, ID]


def _checkpoint() -> None:
    run(_checkpointing(), env=ENVIRONMENT, log=WORK / "dump.log", timeout=TIMEOUT)


def _restore(*options: Arg) -> None:
    argv: list[Arg] = [*RUNC, "restore", "--detach", *options, "--bundle", HOME]
    argv += ["--image-path", IMAGES, "--work-path", WORK, ID]
    _detached(argv, WORK / "restore.log")


def _detached(argv: Sequence[Arg], log: Path) -> None:
    """Run runc, whose container keeps its descriptors: a pipe would not end before the container does."""
    if status := spawn(argv, env=ENVIRONMENT).wait(TIMEOUT):
        raise Failed(f"failed: {pasteable(argv)}", why=ending(status), evidence=last_lines(log))


def _send(address: str) -> None:
    with (
        socket.create_connection((address, IMAGES_PORT)) as link,
        link.makefile("wb", buffering=0) as stream,
        tarfile.open(fileobj=stream, mode="w|", bufsize=1 << 20) as archive,
    ):
        archive.add(IMAGES, arcname=".")


def _receive() -> None:
    with socket.create_server(("", IMAGES_PORT)) as listener:
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()
        link, _ = listener.accept()
    with link, link.makefile("rb", buffering=1 << 20) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        archive.extractall(IMAGES, filter="data")


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "prepare": lambda argv, image: prepare(json.loads(argv), image),
    "start": start,
    "clean": clean,
    "floor": floor,
    "leave": leave,
    "leave-lazily": leave_lazily,
    "arrive": arrive,
    "arrive-lazily": arrive_lazily,
}

if __name__ == "__main__":
    print(json.dumps(COMMANDS[sys.argv[1]](*sys.argv[2:])))
