"""What the layer store needs from the world: a share, a way to lay a layer's files on it, and a clock.

The rules of the store (leases, publishing, references, collection) are written against these ports only, so that the
same code runs over a real file system and over a simulated one that delays, reorders and forgets.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from podferry.snapshotter.layout import FormName, LayerRecord


class Share(Protocol):
    """A directory that every node mounts. Paths are relative, with `/`.

    What is relied on, and nothing else:

    - `create` gives a name to one caller only (O_EXCL), `rename` of a directory is atomic and never replaces a
      directory that has entries;
    - what a call has written is on the server when the call returns;
    - a read of an existing file gives its latest content (close-to-open), but names may be stale for some seconds:
      a listing or a look-up may miss what is there or show what is gone;
    - a call may fail although it took effect (a lost reply), or take effect after its caller gave up.

    Answers are FileNotFoundError and FileExistsError; everything else that goes wrong is an error of
    `podferry.snapshotter.faults`.
    """

    def create(self, path: str, data: bytes) -> None:
        """A new file. FileExistsError when the name is taken."""

    def rewrite(self, path: str, data: bytes) -> None:
        """New content for an existing file, in place. FileNotFoundError when it is gone."""

    def replace(self, path: str, data: bytes) -> None:
        """A file with this content, whether or not there was one; readers see the old one or the new one whole."""

    def read(self, path: str) -> bytes:
        """A small file's content."""

    def names(self, path: str) -> list[str]:
        """What a directory holds, sorted; nothing for one that does not exist."""

    def refresh(self, path: str) -> None:
        """From now on, look-ups in this directory show at least what the server has now. Costs two changes in it, so
        it is for decisions that would otherwise repeat much work; correctness never rests on it."""

    def make(self, path: str) -> None:
        """A new directory. FileExistsError when the name is taken."""

    def rename(self, old: str, new: str) -> None:
        """Move a file or directory. FileExistsError when `new` is a directory with entries."""

    def remove(self, path: str) -> None:
        """Remove a file; one that is gone is no error."""

    def remove_tree(self, path: str) -> None:
        """Remove a directory and what is in it; one that is gone is no error."""


@dataclass(frozen=True)
class Payload:
    """What a form has written: the digest that its `check` will compare, and the size in bytes and inodes."""

    digest: str
    bytes: int
    inodes: int


class Form(Protocol):
    """How a layer's files lie on the share."""

    @property
    def name(self) -> FormName:
        """The form's name, part of the share's format."""

    @property
    def payload(self) -> str:
        """The file, beside the record, whose digest is kept."""

    def write(self, source: Path, into: str) -> Payload:
        """Lay the files under the local directory `source` into the directory `into` of the share, durably."""

    def check(self, at: str, record: LayerRecord) -> None:
        """Read the whole layer at `at` back from the share. Raises `LayerDamaged` when it is not what `record` says."""

    def glance(self, at: str, record: LayerRecord) -> None:
        """The same from a few metadata calls, for every first use: is the payload there, of the right kind and size."""


class KeptDigests(Protocol):
    """What this node has kept of the layers that it uses."""

    def keep(self, record: LayerRecord) -> None:
        """The node begins to use this layer."""

    def demand(self, record: LayerRecord) -> None:
        """Raise `LayerExchanged` where this is not the layer that the node uses."""


class Clock(Protocol):
    """Time as the store uses it."""

    def monotonic(self) -> float:
        """Seconds that only go forward; means nothing to another node."""

    def wall(self) -> float:
        """Seconds since the epoch. Never used for a decision that must be right."""

    def pause(self, seconds: float, stop: threading.Event | None = None) -> bool:
        """Wait, or less if `stop` is set: True then."""


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    def pause(self, seconds: float, stop: threading.Event | None = None) -> bool:
        return (stop or threading.Event()).wait(seconds)
