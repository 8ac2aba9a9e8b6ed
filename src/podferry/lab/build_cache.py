"""What labs share and build once: each thing lies under a name with the hash of its recipe, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from podferry.lab import cgroups
from podferry.lab.state import CACHE, locked

_BUILT = re.compile(r"[a-z.]+-[0-9a-f]{16}(\.tar)?")


def key(recipe: object) -> str:
    """A short hash of a recipe (anything JSON can hold)."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def place(kind: str, recipe: object, suffix: str = "") -> Path:
    """Where `cached` has, or would put, `kind` made after `recipe`."""
    return CACHE / f"{kind}-{key(recipe)}{suffix}"


def cached(kind: str, recipe: object, build: Callable[[Path], None], suffix: str = "") -> Path:
    """The path of `kind` made after `recipe`; `build` makes it at the path it is given where there is none yet.

    Two commands that want the same thing build it once. A build that fails leaves nothing.
    """
    path = place(kind, recipe, suffix)
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
            _forget_older(kind, path)
        except BaseException:
            remove(partial)
            raise
    return path


def _forget_older(kind: str, kept: Path) -> None:
    """Remove what older recipes left behind, unless a lab runs, which may stand on it."""
    if not cgroups.labs():
        for path in CACHE.glob(f"{kind}-*"):
            if path != kept and _BUILT.fullmatch(path.name):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file or a tree, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
