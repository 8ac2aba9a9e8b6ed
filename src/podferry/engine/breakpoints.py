"""Breakpoints: hold an agent at the beginning of a phase, to look at it or to kill it there.

With PODFERRY_BREAKPOINTS naming a directory, an agent that is about to act in a phase for which the directory holds a file
`ROLE-PHASE-NAME` (say, `source-cut-over-train` for the container `train`, `source-cut-over-ns_train` for the pod `ns/train`)
makes `ROLE-PHASE-NAME.reached` beside it and waits until the file is gone. The failure tests kill agents so, at every phase of
the table. Without the variable there are no breakpoints.
"""

from __future__ import annotations

import os
from pathlib import Path

import anyio

VARIABLE = "PODFERRY_BREAKPOINTS"
POLL_INTERVAL = 0.02


async def hold(role: str, phase: str, name: str) -> None:
    """Wait at the beginning of `phase` while there is a breakpoint for the container `name`."""
    directory = os.environ.get(VARIABLE)
    if not directory:
        return
    breakpoints = Path(directory) / f"{role}-{phase}-{name.replace('/', '_')}"
    if breakpoints.exists():
        breakpoints.with_name(f"{breakpoints.name}.reached").touch()
        while breakpoints.exists():
            await anyio.sleep(POLL_INTERVAL)
