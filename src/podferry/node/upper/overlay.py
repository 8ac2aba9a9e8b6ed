"""What a mounted overlay must be told after its upper directory was filled behind its back."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from podferry.errors import Failed


def refresh_root(merged: Path) -> None:
    """Let the overlay mounted at `merged` read its root's mode and owner anew. Raises `Failed`.

    The root's inode is the one that an overlay holds from the mount on; permissions are checked by its cached copy of
    the upper directory's mode and owner (measured, kernel 6.18), which setting them through the overlay renews. The
    mode is set to what it is, so nothing else changes but the root's ctime.
    """
    try:
        root = os.open(merged, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fchmod(root, stat.S_IMODE(os.fstat(root).st_mode))
        finally:
            os.close(root)
    except OSError as error:
        raise Failed.because(f"the root of the overlay at {merged} cannot be refreshed", error) from error
