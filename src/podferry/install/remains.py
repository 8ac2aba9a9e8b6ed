"""What a node's agent has kept, and goes with it: its key, journals, what was staged for containers that were to arrive.

The layers of the snapshotter stay: containerd has containers and images made of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

from podferry.engine.journal import unfinished
from podferry.install.containerd_service import listener
from podferry.install.files import Root
from podferry.workload.pod.translations import remove_all

STATE, RUN = "/var/lib/podferry", "/run/podferry"
KEPT = {
    STATE: ("pki", "migrations", "staging", "arrived", "departed", "translations"),
    RUN: ("incoming", "outgoing", "arriving", "leaving", "restored", "staging", "waiting", "agent.sock"),
}


def in_use(root: Root) -> str:
    """Why what is kept is still needed; empty where it is not."""
    if listener(root.path(f"{RUN}/agent.sock")) is not None:
        return "its agent still runs"
    if open_ := unfinished(root.path(f"{STATE}/migrations")):
        return f"{len(open_)} migrations have not ended, among them {open_[0].name}: their jobs may stand still here"
    return ""


def remove(root: Root, report: Callable[[str], None]) -> list[str]:
    """Remove all of it; the paths that went. What cannot be removed is told."""
    gone: list[str] = []
    remove_all(root.path(STATE) / "translations", report)
    for directory, names in KEPT.items():
        before = len(gone)
        for name in names:
            place = root.path(directory) / name
            if not place.exists() and not place.is_symlink():
                continue
            try:
                if place.is_dir() and not place.is_symlink():
                    shutil.rmtree(place)
                else:
                    place.unlink()
            except OSError as error:
                report(f"left {directory}/{name}: {error.strerror}")
                continue
            gone.append(f"{directory}/{name}")
        if len(gone) > before:
            root.remove_empty(directory)  # somebody else's may be in it
    if gone:
        report(f"removed {', '.join(gone)}")
    return gone
