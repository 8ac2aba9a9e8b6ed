"""Switches of `runc checkpoint` for what criu.conf asks for as well.

runc has them from 1.3 on, and tells CRIU "no" where they are not given, which counts more than what CRIU's file of settings says.
Earlier ones tell CRIU nothing of these, and do not know the switches.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from podferry.node import outside
from podferry.node.node_programs import found
from podferry.node.process import run

WANTED = ("--link-remap", "--tcp-skip-in-flight")
"""In criu.conf: `link-remap`, `skip-in-flight`."""
TIMEOUT = 10.0
"""Seconds that runc has to print its help."""


def switches(runc: str | Path) -> tuple[str, ...]:
    """Those of `WANTED` that the node's `runc` knows, a path or a name. Its help is read once, and again when it was replaced.

    Raises `CommandFailed` and `TimedOut`.
    """
    if (one := found(runc)) is None:
        return ()
    path, file = one
    return _known(path, file.st_ino, file.st_mtime_ns)


@cache
def _known(runc: str, _inode: int, _changed: int) -> tuple[str, ...]:
    said = run(outside.on_node([runc, "checkpoint", "--help"]), timeout=TIMEOUT).stdout
    return tuple(one for one in WANTED if f"{one} " in said)
