"""What labs share and build once: each thing lies under a name with the hash of its recipe, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from podferry.lab.state import CACHE, locked


def key(recipe: object) -> str:
    """A short hash of a recipe (anything JSON can hold)."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def cached(kind: str, recipe: object, build: Callable[[Path], None], suffix: str = "") -> Path:
    """The path of `kind` made after `recipe`; `build` makes it at the path it is given where there is none yet.

    Two commands that want the same thing build it once. A build that fails leaves nothing.
    """
    path = CACHE / f"{kind}-{key(recipe)}{suffix}"
    if path.exists():
        return path
    with locked(CACHE / f"{kind}.lock"):
        if path.exists():
            return path
        partial = CACHE / f"{path.name}.partial"
        remove(partial)
        try:
            build(partial)
            partial.rename(path)
        except BaseException:
            remove(partial)
            raise
    return path


def prune(kept: set[Path]) -> None:
    """Remove what older recipes left behind: everything but `kept` and downloads. Only while no lab runs."""
    for path in CACHE.iterdir() if CACHE.is_dir() else ():
        if path not in kept and path.name.startswith(("node-", "job-", "site-", "dev-")):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a tree, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
