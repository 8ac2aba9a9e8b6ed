"""Files of a node that is reached below a directory, and the ledger of those that were changed."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath

from podferry.errors import Failed
from podferry.fs.beneath import DIRECTORY, open_beneath
from podferry.fs.private import private_directory
from podferry.fs.replacing import replace_file

LEDGER = "/var/lib/podferry/install"
"""Where a node keeps what was there before."""


class Root:
    """A node's files, below the directory `top`. Symbolic links are those of the node: they never lead out of `top`."""

    def __init__(self, top: Path) -> None:
        self.top = top

    def path(self, path: str) -> Path:
        """The place of the node's file `path`, symbolic links on the way followed."""
        done, links = self.top, 0
        todo = list(PurePosixPath(path).parts)[1:]
        while todo:
            part = todo.pop(0)
            if part == "..":
                done = done if done == self.top else done.parent
                continue
            here = done / part
            if not here.is_symlink():
                done = here
                continue
            links += 1
            if links > 40:
                raise Failed(f"too many symbolic links: {path}")
            target = PurePosixPath(os.readlink(here))  # noqa: PTH115 - of the node's root
            if target.is_absolute():
                done = self.top
            todo = [one for one in target.parts if one != "/"] + todo
        return done

    def read(self, path: str) -> bytes | None:
        """What is in a file; None where there is none."""
        try:
            return self.path(path).read_bytes()
        except FileNotFoundError:
            return None

    def replace(self, path: str, content: bytes, mode: int) -> None:
        """Put a file in its place in one step: a container that starts meanwhile finds the old one or the new one."""
        place = self.path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, content, mode=mode)

    def remove_empty(self, path: str) -> None:
        """Remove a directory in which nothing is left; one that something is mounted on stays.

        `rmdir` of a directory that is a mount point in another mount namespace succeeds, and takes the mount away there
        (`detach_mounts` of fs/namespace.c): called from a container it would unmount the node's own file system.
        """
        place = self.path(path)
        with suppress(OSError):
            parent = os.open(place.parent, DIRECTORY | os.O_CLOEXEC)
            try:
                os.close(open_beneath(parent, os.fsencode(place.name), DIRECTORY))  # EXDEV for a mount point
                os.rmdir(place.name, dir_fd=parent)
            finally:
                os.close(parent)


@dataclass(frozen=True)
class InstalledFile:
    """One file that was written: what is ours (sha256), and the mode of what was there before, None where nothing was."""

    path: str
    ours: str
    mode: int | None


class InstalledFiles:
    """What was written on a node, and what was there before."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._directory = root.path(LEDGER)
        self.entries: dict[str, InstalledFile] = {}
        self.restart_due = False
        """Whether containerd has not been started again since its settings were changed."""
        try:
            known = json.loads((self._directory / "ledger.json").read_text())
        except FileNotFoundError:
            return
        except ValueError as damaged:
            raise Failed.because(f"{LEDGER}/ledger.json is damaged", damaged) from damaged
        self.entries = {one["path"]: InstalledFile(**one) for one in known["entries"]}
        self.restart_due = known["restart_due"]

    def write(self, path: str, content: bytes, *, mode: int = 0o644) -> bool:
        """Have `content` at `path`; true if that changed anything."""
        present = self._root.read(path)
        place = self._root.path(path)
        if present == content and place.stat().st_mode & 0o7777 == mode and path in self.entries:
            return False
        if path not in self.entries:
            before = None if present is None else place.stat().st_mode & 0o7777
            if present is not None:
                private_directory(self._directory, below=self._directory)
                shutil.copy2(place, self._saved(path))
            self.entries[path] = InstalledFile(path, "", before)
        self.entries[path] = InstalledFile(path, sha256(content).hexdigest(), self.entries[path].mode)
        self.save()
        self._root.replace(path, content, mode)
        return present != content

    def original(self, path: str) -> bytes | None:
        """What was at `path` before the first `write`, or is there where nothing was written."""
        if path not in self.entries:
            return self._root.read(path)
        return None if self.entries[path].mode is None else self._saved(path).read_bytes()

    def is_ours(self, path: str) -> bool:
        """Whether `path` is as it was written."""
        present = self._root.read(path)
        return path in self.entries and present is not None and sha256(present).hexdigest() == self.entries[path].ours

    def put_back(self, path: str) -> None:
        """Restore what was at `path` before."""
        entry = self.entries[path]
        place = self._root.path(path)
        if entry.mode is None:
            place.unlink(missing_ok=True)
        else:
            self._root.replace(path, self._saved(path).read_bytes(), entry.mode)
            shutil.copystat(self._saved(path), place)
        self.forget(path)

    def forget(self, path: str) -> None:
        """Leave `path` as it is from now on."""
        self._saved(path).unlink(missing_ok=True)
        del self.entries[path]
        self.save()

    def save(self) -> None:
        """Put the ledger itself on disk; where nothing is left to note, nothing of it stays."""
        if not self.entries and not self.restart_due:
            shutil.rmtree(self._directory, ignore_errors=True)
            return
        known = {"entries": [asdict(one) for one in self.entries.values()], "restart_due": self.restart_due}
        self._root.replace(f"{LEDGER}/ledger.json", json.dumps(known, indent=2).encode(), 0o600)

    def _saved(self, path: str) -> Path:
        return self._directory / f"original-{sha256(path.encode()).hexdigest()[:16]}"
