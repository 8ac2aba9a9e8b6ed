"""The ports of the engine: every effect of a migration passes through one of these.

`source.py` and `target.py` are written against them; `podferry.workload` fulfils them with the real containerd, runc, CRIU, kernel
and disk, and a unit test with fakes that fail, stall or die at will.

What moves is a *workload*: one container or more, frozen together and committed by one GO. Memory is spoken of in *spaces*, one per
process; files come as *trees* and in flat *directories*. All three have numbers, in which the container's is contained, and which
are the same on both sides and on the wire (`podferry.workload.numbers`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from podferry.errors import Failed, PodferryError
from podferry.lazypages.page_source import Frame
from podferry.memory.ranges import EMPTY, Runs
from podferry.model import Dump
from podferry.wire.frames import Drop, File, Pages
from podferry.wire.held_pages import HeldPages
from podferry.wire.messages import AddressSpaceSum, StateEnd, TreeSum

Json = dict[str, Any]

UPPER, IMAGES, LOG = 0, 0, 1
"""Of the first container: the tree of its upper layer; the directories of CRIU's images and of its log. Directories of images are
even, of logs odd."""


def is_log(directory: int) -> bool:
    """Whether a directory holds what a container printed."""
    return directory % 2 == LOG


@dataclass(frozen=True)
class DirtySet:
    """The result of one dirty scan of the job's memory: the pages to send, and those that the target must forget."""

    written: Mapping[int, Runs] = field(default_factory=dict)
    dropped: Mapping[int, Runs] = field(default_factory=dict)

    def __or__(self, later: DirtySet) -> DirtySet:
        """Both, to be read now: of what one says is written and the other that it is gone, the reading tells."""

        def both(one: Mapping[int, Runs], other: Mapping[int, Runs]) -> Mapping[int, Runs]:
            return {
                address_space: one.get(address_space, EMPTY) | other.get(address_space, EMPTY)
                for address_space in {**one, **other}
            }

        return DirtySet(both(self.written, later.written), both(self.dropped, later.dropped))

    @property
    def bytes(self) -> int:
        """The number of bytes to send."""
        return sum(runs.size for runs in self.written.values())


Images = Mapping[tuple[int, str], bytes | Path]
"""Images and what goes with them, by directory and name: files, which may be larger than memory, and small contents."""


class OriginalGone(Failed):
    """Post-copy: the frozen original has ended, and with it the memory that the target has not got."""

    code = "PF243"


class JobDied(Failed):
    """On the target: the job, or a part of it, has run there to an end, and cannot go on. The right to run does not come back."""

    code = "PF244"


class RemotePages(Protocol):
    """Post-copy on the source: the memory that the target has not got (`podferry.workload.remote_pages`).

    Frames are only made of what was read: where the original has ended, `OriginalGone` is raised, since zeros would be lies.
    """

    @property
    def bytes(self) -> int:
        """The number of bytes still to be pushed."""
        ...

    def answer(self, address_space: int, address: int) -> Iterator[Pages | Drop]:
        """The frames that answer for the page at `address` of `space`."""
        ...

    def rest(self) -> Iterator[Pages | Drop]:
        """All pages that are still remote."""
        ...

    def start_over(self) -> None:
        """Count all pages handed out as remote again, since it is unknown which of them arrived."""
        ...

    def close(self) -> None:
        """Let go of the processes."""
        ...


class PageChannel(Protocol):
    """Post-copy on the target: the channel to the lazy-pages daemons (`podferry.workload.page_channel`)."""

    def arrived(self, address_space: int, start: int, end: int) -> None:
        """The store has these pages now."""
        ...

    def zero(self, address_space: int, start: int, end: int) -> None:
        """These pages hold only zeros, and will not come."""
        ...

    async def flush(self) -> None:
        """Send what was said."""
        ...

    async def next_request(self) -> Frame | None:
        """The next pages that a thread of the job waits for; None once the lazy-pages daemon has ended."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


class FrozenSource(Protocol):
    """The frozen original on the source, once the right to run has passed."""

    def remote_pages(self) -> RemotePages:
        """Post-copy: the memory that the target has not got. Where nobody remembers what it got, that is all memory.
        Raises `OriginalGone`."""
        ...

    async def commit(self) -> None:
        """Kill the frozen original. Only after the target said that it runs. May be called again after a failure."""
        ...

    async def replaced(self) -> bool:
        """After GO: whether the workload's name was given to its successor. Then nothing of it may run here any more, whatever
        becomes of the move."""
        ...

    async def abandon(self) -> None:
        """Kill the frozen original, which was `replaced` in vain. May be called again after a failure."""
        ...

    async def runs(self) -> bool:
        """Whether the container is there and has not ended; frozen counts."""
        ...

    def executing(self) -> bool:
        """Whether it is there and not frozen. It is asked at every step past GO, and must cost next to nothing."""
        ...

    async def close(self) -> None:
        """Let go of descriptors and watchers; nothing of the container is touched."""
        ...


class SourceJob(FrozenSource, Protocol):
    """A running container on the source, as far as a migration touches it."""

    async def scan_dirty(self) -> DirtySet:
        """All memory that is present at the first call; at later ones what was written or dropped since the last."""
        ...

    async def final_scan(self) -> DirtySet:
        """The last one, with the job frozen: nothing may change after it. The tracker is gone when it returns."""
        ...

    def leave_remote(self, dirty: DirtySet) -> Iterator[Drop]:
        """Post-copy: leave what `change` lists for later. The frames make the target forget what it has of it."""
        ...

    def read(self, dirty: DirtySet, round: int) -> Iterator[Pages | Drop]:
        """Read what `change` lists, as frames of up to a megabyte. Send each before the next is taken."""
        ...

    def changed_shared(self, round: int) -> AsyncGenerator[Pages | Drop, None]:
        """One pass over the shared memory, all of it at the first: the pages that changed since the pass before. Send each frame
        before the next is taken."""
        ...

    def held_pages(self, directory: int) -> HeldPages:
        """What the target holds of the shared memory that CRIU saves in the images of `directory`."""
        ...

    def trees(self, *, last: bool) -> AsyncIterator[tuple[int, bytes]]:
        """One pass over the upper layer: (tree, record) of what changed since the pass before. In the last nothing may change."""
        ...

    def tree_totals(self) -> tuple[TreeSum, ...]:
        """The totals of the last finished pass over each tree."""
        ...

    def memory_totals(self) -> tuple[AddressSpaceSum, ...]:
        """The number of pages of each address space that the target must hold by now."""
        ...

    def logs(self, *, last: bool) -> AsyncIterator[tuple[int, int, bytes]]:
        """The container's output since the last pass: (directory, offset, bytes)."""
        ...

    async def stand_by(self) -> None:
        """Begin what the dump needs that can be begun while the job runs: the freeze is near."""
        ...

    async def lock_exec(self) -> None:
        """Nothing is in the container but the job itself, until the migration has ended: what came in from outside cannot move."""
        ...

    async def freeze(self) -> None:
        """Stop every task of the container; they stay stopped until `thaw`."""
        ...

    async def dump(self) -> Images:
        """CRIU writes everything but the private memory and then holds the frozen job. Returns its images by directory and name."""
        ...

    def closed_connections(self) -> tuple[str, ...]:
        """TCP connections to others than the job itself, `LOCAL -> REMOTE`, which `dump` has closed in the images."""
        ...

    def dumped(self) -> Dump:
        """What `dump` did not have to do."""
        ...

    async def throttle(self, quota: float) -> None:
        """Leave the job this share (0 to 1) of the processor time that it used before it was first slowed down.
        `freeze` gives it back."""
        ...

    async def ended(self) -> str:
        """Return, with how it ended, once the container has ended by itself."""
        ...


class TargetJob(Protocol):
    """The container that is to run on the target."""

    async def prepare(self) -> None:
        """Its record, snapshot and places for pages and images. Raises `Refused` where name or image stand in the way."""
        ...

    async def make_ready(self, *, postcopy: bool) -> None:
        """Have its task created up to the point where only the state is missing; in `postcopy`, pages come afterwards.
        May be called a second time, for post-copy."""
        ...

    async def lost(self) -> PodferryError:
        """Before GO: return, with the reason, once what was prepared waits no more. It was killed, or somebody lost patience.
        One task at a time may wait for it."""
        ...

    def pages(self, round: int, address_space: int, address: int, data: memoryview) -> None:
        """Put arrived pages into the store."""
        ...

    def drop(self, address_space: int, start: int, end: int) -> None:
        """Pages that are zero or gone."""
        ...

    def tree(self, number: int, record: memoryview) -> None:
        """A record of a tree."""
        ...

    def log(self, directory: int, offset: int, data: memoryview) -> None:
        """A piece of what a container printed."""
        ...

    def image(self, directory: int, name: str, offset: int, data: memoryview, *, last: bool) -> None:
        """A piece of one of CRIU's images."""
        ...

    def image_of_pages(self, piece: File) -> None:
        """A piece of one of CRIU's images, of pages of which some are here already, in the address space of shared memory. They are
        needed there no more."""
        ...

    async def verify(self, end: StateEnd) -> None:
        """Everything is here and whole, or a `Failed` says what is not."""
        ...

    @property
    def makes_after_go(self) -> bool:
        """Whether the task can only be created once the right to run is here, by `make_late`."""
        ...

    async def make_late(self) -> None:
        """After GO, before `release`: have the task created."""
        ...

    async def release(self) -> float:
        """Restore it. It has run when this returns, and may have ended by itself since; where it raises, it has not, and never
        will. `JobDied`: it has, and cannot go on.

        Returns since when it runs, in seconds of this node's monotonic clock.
        """
        ...

    def differences(self) -> tuple[str, ...]:
        """After `release`: what the job has not here as it had it on the source, and could not be given."""
        ...

    def open_page_channel(self) -> PageChannel:
        """Post-copy: connect to the lazy-pages daemon. Pages that arrive from now on must be told to it."""
        ...

    def remote_pages_complete(self, channel: PageChannel) -> None:
        """Post-copy: the source has sent all remote pages; what is still absent is zero."""
        ...

    async def close(self) -> None:
        """Let go of descriptors and watchers; what was made stays."""
        ...

    async def resumed(self) -> float:
        """Since when it runs, as `release` returns it, for an agent that was restarted. Raises where it is gone."""
        ...

    async def is_here(self) -> bool:
        """Whether containerd has a task of it, running or ended."""
        ...

    async def filled(self) -> Json:
        """Return, with figures, once every page is in its place."""
        ...
