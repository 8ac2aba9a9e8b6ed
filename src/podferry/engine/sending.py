"""Send a job's state: pages, the upper layer, the log, CRIU's images, and at the end their totals."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import xxhash

from podferry.core.limits import of_image
from podferry.engine.migration_record import MigrationRecord
from podferry.engine.page_sender import PageSender
from podferry.engine.ports import LOG, DirtySet, Images, SourceJob
from podferry.errors import Failed
from podferry.wire.channel import Channel
from podferry.wire.frames import INLINE, MAX_PAYLOAD, PAGE, Drop, File, Pages, Tree
from podferry.wire.held_pages import HeldPages
from podferry.wire.messages import MOST_SUMS, AddressSpaceSum, FileSum, StateEnd, StatePart

OF_PAGES = "pages-"
"""How the names of CRIU's images begin that hold memory, page by page."""


class Sender:
    """Sends one container over `channel`, and tells `record` how far it is."""

    def __init__(self, channel: Channel, migration_record: MigrationRecord) -> None:
        self.channel, self._record = channel, migration_record
        self._pages = PageSender(channel)
        self._files: list[FileSum] = []
        self._log_bytes = {LOG: 0}

    async def dirty(self, job: SourceJob, dirty: DirtySet, number: int) -> int:
        """Read and send what `change` lists, as round `number`. Returns how many pages carried data."""
        return await self.frames(job.read(dirty, number))

    async def frames(self, frames: Iterable[Pages | Drop]) -> int:
        """Send frames as they are made. Returns how many pages carried data."""
        return sum([await self._frame(frame) for frame in frames])

    async def shared(self, job: SourceJob, number: int) -> int:
        """One pass over the shared memory, in round `number`. Returns how many bytes of it were new to the target."""
        pages = 0
        async with aclosing(job.changed_shared(number)) as frames:
            async for frame in frames:
                pages += await self._frame(frame)
        return pages * PAGE

    async def _frame(self, frame: Pages | Drop) -> int:
        await self._pages.send(frame)
        pages = 0
        if isinstance(frame, Pages):
            pages = frame.count
            self._record.memory_bytes += len(frame.payload)
        self._record.sent(self.channel.traffic.sent)
        return pages

    async def files(self, job: SourceJob, *, last: bool) -> None:
        """One pass over the trees and the logs."""
        async for tree, record in job.trees(last=last):
            await self.channel.send(Tree(tree, record))
            self._record.upper_bytes += len(record)
            self._record.sent(self.channel.traffic.sent)
        async for directory, offset, data in job.logs(last=last):
            await self.channel.send(File(directory, "log", offset, data))
            self._log_bytes[directory] = offset + len(data)

    async def images(self, job: SourceJob) -> None:
        """Have CRIU dump the frozen job, and send its images."""
        await self.send_images(job, await self.dump(job))

    async def dump(self, job: SourceJob) -> Images:
        """Have CRIU dump the frozen job."""
        with self._record.span("dump", detail="CRIU, all but private memory"):
            images = await job.dump()
        if closed := job.closed_connections():
            self._record.extra["closed_connections"] = closed
        self._record.extra["dump"] = str(job.dumped())
        return images

    async def send_images(self, job: SourceJob, images: Images) -> None:
        """Send what `dump` returned."""
        total = sum(map(size_of, images.values()))
        with self._record.span("send images", detail=f"{total >> 10} KiB"):
            for (directory, name), content in images.items():
                await self._image(directory, name, content, job.held_pages(directory))

    async def _image(self, directory: int, name: str, content: bytes | Path, held: HeldPages) -> None:
        """Send one image piece by piece, and of memory only what the target does not hold: of a job with much shared memory it may
        be larger than this node's memory is."""
        size, digest, offset = size_of(content), xxhash.xxh3_128(), 0
        of_image(name).demand(size, f"the job, in its image {name}")
        with content.open("rb", buffering=0) if isinstance(content, Path) else BytesIO(content) as file:
            while True:
                piece = file.read(MAX_PAYLOAD)
                digest.update(piece)
                end = offset + len(piece)
                if not piece and end < size:
                    raise Failed(f"the image {name} is cut short", why=f"{end} of {size} bytes are there")
                await self.channel.send(_piece(File(directory, name, offset, piece, last=end >= size), held))
                self._record.sent(self.channel.traffic.sent)
                offset = end
                if offset >= size:
                    break
        self._files.append(FileSum(directory, name, offset, digest.hexdigest()))

    async def state_end(
        self, job: SourceJob, address_spaces: tuple[AddressSpaceSum, ...], *, trees: bool = True
    ) -> None:
        """Say what the target must have when everything has arrived; in a rehearsal no `trees` have."""
        logs = (FileSum(directory, "log", size, "") for directory, size in self._log_bytes.items())
        files = [*self._files, *logs]
        id, last = self._record.id, max(len(files), len(address_spaces)) // MOST_SUMS * MOST_SUMS
        for at in range(0, last, MOST_SUMS):
            part = slice(at, at + MOST_SUMS)
            await self.channel.send(StatePart(id, tuple(files[part]), address_spaces[part]))
        await self.channel.send(
            StateEnd(id, tuple(files[last:]), address_spaces[last:], job.tree_totals() if trees else ())
        )


def _piece(whole: File, held: HeldPages) -> File:
    """A piece of an image: where it is memory, of which the target holds some, only the other pages go with their contents."""
    piece = memoryview(whole.payload)
    if not held or not whole.name.startswith(OF_PAGES) or len(piece) % PAGE:
        return whole
    runs, lacking, at = held.take(piece), [], 0
    for address, pages in runs:
        end = at + pages * PAGE
        if address == INLINE:
            lacking.append(piece[at:end])
        at = end
    return replace(whole, payload=b"".join(lacking), runs=tuple(runs))


def size_of(content: bytes | Path) -> int:
    """How many bytes an image has."""
    return content.stat().st_size if isinstance(content, Path) else len(content)
