"""The node's own programs, such as runc and CRIU, as its processes find them."""

from __future__ import annotations

import os
from pathlib import Path

from podferry.node import outside
from podferry.node.process import PATH


def found(program: str | Path) -> tuple[str, os.stat_result] | None:
    """The path on the node of `program`, a path or a name, and what tells that its file was replaced; None where there is none."""
    name = str(program)
    for path in [name] if name.startswith("/") else [f"{directory}/{name}" for directory in PATH.split(":")]:
        seen = outside.root() / path.lstrip("/")
        if os.access(seen, os.X_OK):
            return path, seen.stat()
    return None
