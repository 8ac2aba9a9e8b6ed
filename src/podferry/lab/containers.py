"""Containers of a lab that podferry can move: started by ctr on one node, found wherever they have gone."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from podferry.errors import CommandFailed, UsageError
from podferry.lab import registry
from podferry.lab.debian import architecture
from podferry.lab.lab import Lab
from podferry.lab.machine_config import SNAPSHOTTER
from podferry.lab.root_images import JOB_IMAGE

RUNTIME = "/usr/local/sbin/podferry-runc"
LOGS = Path("/var/log/podferry/containers")
NAMESPACE, KUBERNETES = "default", "k8s.io"
FOLLOW_SECONDS = 0.5
CHUNK = 1 << 20
"""Bytes of a log that are read at once."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,62}[A-Za-z0-9])?")
_CTR = ["ctr", "-n", NAMESPACE]


def start(
    lab: Lab,
    node: str,
    name: str,
    argv: Sequence[str],
    *,
    image: str = JOB_IMAGE,
    env: Mapping[str, str] | None = None,
) -> None:
    """Start a container on a node, in the background; an empty `argv` runs the image's own command.

    `image` is a reference that the lab's registry has (a name without a registry is one of the lab's own), or the path of
    an OCI archive on this machine, which is put there first. Output goes to `LOGS`/NAME.log on the node. Raises
    `UsageError` for a name that is taken in the lab.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} cannot be a container's name", remedy="use letters, digits, dots, dashes and underscores"
        )
    lab.node(node)
    if taken := find(lab, name):
        raise UsageError(f"there is a container {name} on {taken}", remedy=f"podferry lab stop {name}, or another name")
    if Path(image).is_file():
        reference = push(lab, Path(image), compress=False)
    else:
        reference = image if "/" in image else registry.reference_of(image)
    pull(lab, node, reference)
    settings = [f"--env={key}={value}" for key, value in (env or {}).items()]
    log = f"--log-uri=file://{LOGS / name}.log"
    for one in (
        lab.status().nodes
    ):  # one of that name that moved left its log on the node where it ended; agents overwrite none
        if one.alive:
            lab.exec(one.name, ["rm", "-f", f"{LOGS / name}.log"])
    # ctr would ask for its default share of the CPU even where a node has no cpu controller.
    options = ["--detach", "--snapshotter", SNAPSHOTTER, "--runc-binary", RUNTIME, "--cpu-shares=0", log]
    lab.exec(node, [*_CTR, "run", *options, *settings, reference, name, *argv])


def stop(lab: Lab, name: str) -> None:
    """Kill a container and remove it, wherever it is; its log stays. Raises `UsageError` where there is none."""
    nodes = holders(lab, name)
    if not nodes:
        raise UsageError(f"lab {lab.name} has no container {name}")
    for node in nodes:
        lab.exec(node, [*_CTR, "task", "delete", "--force", name], check=False)
        lab.exec(node, [*_CTR, "container", "delete", name])


def find(lab: Lab, name: str) -> str | None:
    """The node that a container is on; where two have it (it is on its way), the one where it runs."""
    nodes = holders(lab, name)
    running = [node for node in nodes if _status(lab, node, name) == "RUNNING"]
    return next(iter(running or nodes), None)


def holders(lab: Lab, name: str) -> list[str]:
    """The nodes whose containerd knows a container of this name."""
    alive = [node.name for node in lab.status().nodes if node.alive]
    listing = [*_CTR, "containers", "list", "-q", f"id=={name}"]
    return [node for node in alive if lab.exec(node, listing).stdout.split()]


def push(lab: Lab, archive: Path, *, compress: bool = True) -> str:
    """Put an OCI archive of this machine into the lab's registry; nodes that have an image of that name forget it.

    Returns its reference.
    """
    reference = registry.push(lab, archive, compress=compress)
    for node in lab.status().nodes:
        for namespace in (NAMESPACE, KUBERNETES) if node.alive else ():
            lab.exec(node.name, ["ctr", "-n", namespace, "images", "remove", reference], check=False)
    return reference


def pull(lab: Lab, node: str, reference: str, *, snapshotter: str = SNAPSHOTTER) -> None:
    """Have a node's containerd pull an image, where it has none of that name.

    With podferry's snapshotter, layers that any node has pulled before come from the share. Raises `UsageError` where the
    registry has no such image.
    """
    listing = [*_CTR, "images", "list", "-q", f"name=={reference}"]
    if not lab.exec(node, listing).stdout.split():
        # Without these two, ctr of containerd 1.7 downloads every layer before it asks the snapshotter.
        ask_first = ["--local=false", f"--platform=linux/{architecture()}"]
        try:
            lab.exec(node, [*_CTR, "images", "pull", *ask_first, f"--snapshotter={snapshotter}", reference])
        except CommandFailed as failed:
            if not any("not found" in line for line in failed.evidence):
                raise
            raise UsageError(
                f"the lab's registry has no image {reference}",
                remedy="podferry lab image build, then podferry lab image push; or give the path of an OCI archive",
            ) from failed


def output(lab: Lab, name: str, *, follow: bool = False) -> Iterator[bytes]:
    """A container's output from its first line, wherever it has gone since; with `follow` until it ends, else as far as it
    had come when this was called.

    A move takes the log along, so that a byte keeps its place in it. Raises `UsageError` where there is no log.
    """
    offset = 0
    node = _log_holder(lab, name)
    # A job may write faster than we read: without a bound the end of its log would never come.
    end = None if follow else _size(lab, node, name)
    while True:
        ended = not follow or not _lives(lab, name)  # asked first: what it wrote before it ended is read below
        while chunk := _read(lab, node, name, offset, CHUNK if end is None else min(CHUNK, end - offset)):
            offset += len(chunk)
            yield chunk
        if ended:
            return
        time.sleep(FOLLOW_SECONDS)
        node = _log_holder(lab, name)


def _log_holder(lab: Lab, name: str) -> str:
    """The node to read a container's log from: where it is, or where its log was last written."""
    if node := find(lab, name):
        return node
    times = {
        node.name: log.stat().st_mtime
        for node in lab.status().nodes
        if node.alive and (log := _log(lab, node.name, name)).is_file()
    }
    if not times:
        raise UsageError(f"lab {lab.name} has no container {name} and no log of one")
    return max(times, key=lambda node: times[node])


def _size(lab: Lab, node: str, name: str) -> int:
    try:
        return _log(lab, node, name).stat().st_size
    except FileNotFoundError:
        return 0


def _read(lab: Lab, node: str, name: str, offset: int, most: int) -> bytes:
    try:
        with _log(lab, node, name).open("rb") as file:
            file.seek(offset)
            return file.read(most)
    except FileNotFoundError:
        return b""  # it has not been moved here yet


def _log(lab: Lab, node: str, name: str) -> Path:
    return lab.root(node) / f"{LOGS / name}.log".lstrip("/")


def _lives(lab: Lab, name: str) -> bool:
    return any(_status(lab, node, name) not in ("", "STOPPED") for node in holders(lab, name))


def _status(lab: Lab, node: str, name: str) -> str:
    """containerd's word for the state of the container's task, or nothing where it has none."""
    for line in lab.exec(node, [*_CTR, "tasks", "list"]).stdout.splitlines()[1:]:
        task, _, status = line.split()
        if task == name:
            return status
    return ""
