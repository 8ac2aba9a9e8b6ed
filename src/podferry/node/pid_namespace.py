"""Processes and threads as their own pid namespace numbers them, by which CRIU's images name them."""

from __future__ import annotations

from pathlib import Path


def number_inside(pid: int, thread: int | None = None) -> int:
    """The pid of a process in its own pid namespace, or the number of one of its threads. Raises `OSError` where it has ended."""
    status = Path(f"/proc/{pid}/task/{thread or pid}/status").read_text()
    return int(status.partition("\nNSpid:")[2].split("\n", 1)[0].split()[-1])
