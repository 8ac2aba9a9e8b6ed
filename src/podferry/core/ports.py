"""What the engine needs of the world: every effect of a migration passes through one of these.

`agent/source.py` and `agent/target.py` are written against them; `agent/leaving.py` and `agent/arriving.py` fulfil them with the
real containerd, runc, CRIU, kernel and disk, and a unit test with fakes that fail, stall or die at will.

Memory is spoken of in *spaces* (one per process, named by its pid inside the container, as CRIU's images name it) and *runs*
(half-open ranges of addresses in bytes, multiples of the page size).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Run = tuple[int, int]
Json = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """What one look at the job's memory found: what to send, and what the target must forget."""

    written: Mapping[int, Sequence[Run]] = field(default_factory=dict)
    dropped: Mapping[int, Sequence[Run]] = field(default_factory=dict)
    ended: Sequence[int] = ()

    @property
    def bytes(self) -> int:
        """How much there is to send."""
        return sum(end - start for runs in self.written.values() for start, end in runs)


@dataclass(frozen=True)
class Batch:
    """Pages of one space: the runs they come from, and their contents one after another.

    `data` is None for pages that hold only zeros or are gone. Otherwise it is valid until the next batch is taken.
    """

    space: int
    runs: tuple[Run, ...]
    data: memoryview | None


@dataclass(frozen=True)
class Totals:
    """What one side counted of a stream; both sides must have counted the same."""

    entries: int = 0
    bytes: int = 0
    digest: str = ""

    def to_dict(self) -> Json:
        """As JSON carries it."""
        return {"entries": self.entries, "bytes": self.bytes, "digest": self.digest}


class LeavingJob(Protocol):
    """A running container on the source, as far as a migration touches it."""

    async def look(self) -> Change:
        """All memory that is present at the first call; at later ones what was written or dropped since the last."""
        ...

    async def last_look(self) -> Change:
        """The last one, with the job frozen: nothing may change after it. The tracker is gone when it returns."""
        ...

    def read(self, change: Change) -> Iterator[Batch]:
        """Read what `change` lists, a megabyte at a time; what is dropped comes as batches without data."""
        ...

    def upper(self, *, last: bool) -> AsyncIterator[bytes]:
        """One pass over the upper layer: what changed since the pass before. In the last one nothing may change."""
        ...

    def upper_totals(self) -> Totals:
        """What the last finished pass sent."""
        ...

    def log(self) -> AsyncIterator[tuple[int, bytes]]:
        """What the container has printed since the last pass: (offset, bytes)."""
        ...

    async def freeze(self) -> None:
        """Stop every task of the container; they stay stopped until `thaw`."""
        ...

    async def dump(self) -> Mapping[str, bytes]:
        """CRIU writes everything but the private memory and then holds the frozen job. Returns its images by name."""
        ...

    async def slow_down(self, quota: float) -> None:
        """Leave the job this share (0 to 1) of the processor time that it may use now."""
        ...

    async def ended(self) -> str:
        """Return, with how it ended, once the container has ended by itself."""
        ...

    async def commit(self) -> None:
        """Kill the frozen original. Only after the target said that it runs."""
        ...

    async def close(self) -> None:
        """Let go of descriptors and watchers; nothing of the container is touched."""
        ...


class ArrivingJob(Protocol):
    """The container that is to run on the target."""

    async def prepare(self) -> None:
        """Its record, snapshot and places for pages and images. Raises `Refused` where name or image stand in the way."""
        ...

    async def poise(self) -> None:
        """Have its task created up to the point where only the state is missing."""
        ...

    def pages(self, round: int, space: int, address: int, data: memoryview) -> None:
        """Put arrived pages into the store."""
        ...

    def drop(self, space: int, start: int, end: int) -> None:
        """Pages that are zero or gone."""
        ...

    def end_space(self, space: int) -> None:
        """A process has ended."""
        ...

    def tree(self, record: memoryview) -> None:
        """A record of the upper layer."""
        ...

    def log(self, offset: int, data: memoryview) -> None:
        """A piece of what the container printed."""
        ...

    def image(self, name: str, offset: int, data: memoryview, *, last: bool) -> None:
        """A piece of one of CRIU's images."""
        ...

    async def verify(self, images: Mapping[str, Any], upper: Totals, log_bytes: int) -> None:
        """Everything is here and whole, or a `Failed` says what is not."""
        ...

    async def release(self) -> None:
        """Restore it. It runs when this returns; where it raises, it never will."""
        ...

    async def filled(self) -> Json:
        """Return, with figures, once every page is in its place."""
        ...
