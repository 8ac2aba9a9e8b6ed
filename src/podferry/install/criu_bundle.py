"""A CRIU of our own, for nodes that have none or one that is too old."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from podferry.errors import CommandFailed, TimedOut
from podferry.node import outside
from podferry.node.process import PATH, run

DIRECTORY = "/opt/podferry/criu"
"""Where it is, in our image and on a node: a program, its libraries and a loader, independent of all else there."""
OLDEST = (4, 2)
"""On Linux 6.16 and later older ones cannot dump a container that has any socket of inet open."""


def wanted(root: Path) -> bool:
    """Whether the node at `root` needs ours: its own is missing, or too old."""
    own = _version_of_the_nodes(root)
    return own is None or own < OLDEST


def files(bundle: Path) -> Iterator[tuple[str, bytes, int]]:
    """What is to be on the node: path, content, mode."""
    for file in sorted(path for path in bundle.rglob("*") if path.is_file()):
        yield f"{DIRECTORY}/{file.relative_to(bundle)}", file.read_bytes(), file.stat().st_mode & 0o777


def _version_of_the_nodes(root: Path) -> tuple[int, ...] | None:
    for directory in PATH.split(":"):
        if directory.startswith(DIRECTORY) or not (root / directory.lstrip("/") / "criu").exists():
            continue
        try:
            printed = run(outside.on_node([f"{directory}/criu", "--version"]), timeout=10.0).stdout
        except (CommandFailed, TimedOut):
            return None
        found = re.search(r"(\d+)\.(\d+)", printed)
        return (int(found[1]), int(found[2])) if found else None
    return None
