"""The source's side: one tree, looked at and sent again and again until it stands still.

    source = Source(root)
    while job_runs:
        for chunk in source.send(source.plan()):
            transport(chunk)
    for chunk in source.send(source.plan(frozen=True)):
        transport(chunk)
    source.summary  # what the target must have come to as well

In a pass over a running container's tree only the tree's shape is certain; the content of a file that changes or
vanishes while it is read is whatever was read, and the file is looked at again in the next pass. In the last pass,
when the container is frozen, the same is an error.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash

from podferry.core.limits import FILES
from podferry.errors import Failed, Refused
from podferry.fs.beneath import open_beneath
from podferry.node.upper import plan as plans
from podferry.node.upper import tree_records
from podferry.node.upper.blocks import BLOCK, HOLE, Blocks, Shrunk, read_blocks
from podferry.node.upper.entries import Entry, Manifest
from podferry.node.upper.plan import TreePlan, TreeStep, diff
from podferry.node.upper.scan import VANISHED, scan
from podferry.node.upper.tree_records import How, Record, Summary


@dataclass(frozen=True)
class TreePolicy:
    """What a tree may hold and cost; both sides hold to it."""

    devices: bool = False
    """Device nodes other than whiteouts move, too."""
    max_bytes: int | None = None
    """Content of all passes together."""
    max_entries: int = 2 * FILES.most
    """Names that one pass makes or puts aside: each costs the target an inode, or memory. No honest source needs more for a tree
    that may move."""


class TreeSource:
    """The tree below `root`, and what the target has of it. Belongs to one thread at a time; closes with `close`."""

    def __init__(self, root: Path, policy: TreePolicy | None = None) -> None:
        self.policy = policy or TreePolicy()
        self.summary: Summary | None = None
        """Of the last pass that was sent to its end."""
        self._manifest: Manifest | None = None
        self._blocks: dict[tuple[int, int], Blocks] = {}
        self._stale: set[int] = set()
        self._suspects: set[bytes] = set()
        self._entries = self._sent = 0
        try:
            self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Failed.because(f"the upper layer {root} cannot be opened", error) from error

    def close(self) -> None:
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def plan(self, *, suspects: Collection[bytes] = (), frozen: bool = False) -> TreePlan:
        """Scan the tree and compare it with what the target has. Raises `Refused` and `Failed`.

        `suspects` are the paths that some process of the container has mapped shared (`shared_files`): their content
        may change without a trace. A path once named stays suspect, since the stores that matter may have been made
        before it was unmapped. `frozen` says that the container stands still and this is the last pass.
        """
        self._suspects.update(suspects)
        now = scan(self._root, self._manifest, suspects=self._suspects, frozen=frozen)
        plan = diff(self._manifest, now, frozen=frozen)
        if not self.policy.devices:
            for step in plan.steps:
                if step.entry.is_foreign_device:
                    raise Refused(
                        "the upper layer cannot be moved",
                        why=f"it holds a device node: {os.fsdecode(step.path)}",
                        remedy="remove it, or allow device nodes in the migration's policy",
                    )
        return plan

    def send(self, plan: TreePlan) -> Iterator[bytes]:
        """Carry out `plan`: chunks of at most `tree_records.MAX_CHUNK` bytes for `Receiver.feed`, in order.

        A pass that is not taken to its end leaves the target in a state nobody knows; the plan after it starts afresh.
        """
        self._manifest, self.summary = None, None
        self._stale.clear()
        self._entries = self._sent = 0
        if plan.fresh:
            self._blocks.clear()
        digest = xxhash.xxh3_128()
        for chunk in tree_records.chunks(self._records(plan)):
            digest.update(chunk)
            yield chunk
        summary = Summary(self._entries, self._sent, digest.hexdigest())
        yield b"".join(tree_records.end(summary))
        self._manifest = self._settle(plan.manifest)
        self.summary = summary

    def _records(self, plan: TreePlan) -> Iterator[Record]:
        entries = plan.manifest.entries
        yield tree_records.begin(fresh=plan.fresh)
        for path, slot in plan.parks:
            yield tree_records.park(path, slot)
        for path in plan.removes:
            yield tree_records.remove(path)
        for step in plan.steps:
            yield from self._step(step, frozen=plan.frozen)
        for path in plan.seals:
            self._entries += 1
            yield tree_records.attributes(path, entries[path])

    def _step(self, step: TreeStep, *, frozen: bool) -> Iterator[Record]:
        verb, path, entry = step.verb, step.path, step.entry
        if verb is plans.LinkVerb.LINK:
            self._entries += 1
            yield tree_records.link(path, step.leader)
            return
        if verb is plans.LinkVerb.UNPARK:
            yield tree_records.unpark(step.slot, path)
        if entry.is_regular:
            yield from self._content(step, frozen=frozen)
        elif verb is plans.LinkVerb.MAKE:
            yield tree_records.make(path, entry)
        if not entry.is_directory:
            self._entries += 1
            yield tree_records.attributes(path, entry)

    def _content(self, step: TreeStep, *, frozen: bool) -> Iterator[Record]:
        create = step.verb is plans.LinkVerb.MAKE
        try:
            fd = self._open(step.path, step.entry)
        except OSError as error:
            if frozen or error.errno not in VANISHED:
                raise Failed.because(f"{os.fsdecode(step.path)} of the upper layer cannot be read", error) from error
            self._stale.add(step.entry.ino)
            if create:
                self._blocks.pop((step.entry.dev, step.entry.ino), None)
                yield tree_records.file(step.path, How.CREATE, 0)
            return
        try:
            yield from self._blocks_of(fd, step, create=create)
            if frozen and not _unchanged(fd, step.entry):
                raise _moved(step)
        except Shrunk:
            if frozen:
                raise _moved(step) from None
            self._blocks.pop((step.entry.dev, step.entry.ino), None)
            self._stale.add(step.entry.ino)
        except OSError as error:
            raise Failed.because(f"{os.fsdecode(step.path)} of the upper layer cannot be read", error) from error
        finally:
            os.close(fd)

    def _open(self, path: bytes, entry: Entry) -> int:
        """The very file that was listed. Opening anything else could have effects (a FIFO, a device) or leak."""
        handle = open_beneath(self._root, path, os.O_PATH)
        try:
            found = os.fstat(handle)
            if (found.st_dev, found.st_ino) != (entry.dev, entry.ino) or not stat.S_ISREG(found.st_mode):
                raise FileNotFoundError(2, "replaced by another file")
            return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NOATIME | os.O_CLOEXEC)
        finally:
            os.close(handle)

    def _blocks_of(self, fd: int, step: TreeStep, *, create: bool) -> Iterator[Record]:
        """The blocks that the target lacks, and holes where it has data that is gone."""
        key = step.entry.dev, step.entry.ino
        found = os.fstat(fd)
        size, sparse = found.st_size, found.st_blocks * 512 < found.st_size
        before = None if create else self._blocks.get(key)
        yield tree_records.file(step.path, How.CREATE if create else How.PATCH if before else How.DISCARD, size)
        now = Blocks()
        for block in read_blocks(fd, size, sparse=sparse):
            now.put(block.index, block.digest)
            known = before.get(block.index) if before else HOLE
            if known == block.digest:
                continue
            if sparse and known != HOLE:
                yield _hole(block.index, size)
            for piece in block.pieces:
                self._sent += len(piece.data)
                yield tree_records.data(piece.offset, piece.data)
        for index in before.with_data() if before else ():
            if index * BLOCK < size and now.get(index) == HOLE:
                yield _hole(index, size)
        # A file of one block is sent whole when it changes: its digest would cost more than it saves.
        if size > BLOCK:
            self._blocks[key] = now
        else:
            self._blocks.pop(key, None)

    def _settle(self, manifest: Manifest) -> Manifest:
        """The manifest as the next pass may rely on it: files whose content is not certain count as changed."""
        entries = manifest.entries
        if self._stale:
            entries = {
                path: entry._replace(settled=False) if entry.ino in self._stale else entry
                for path, entry in entries.items()
            }
        if self._blocks:
            present = {(entry.dev, entry.ino) for entry in entries.values()}
            self._blocks = {key: blocks for key, blocks in self._blocks.items() if key in present}
        return Manifest(entries)


def _hole(index: int, size: int) -> Record:
    return tree_records.hole(index * BLOCK, min(BLOCK, size - index * BLOCK))


def _unchanged(fd: int, entry: Entry) -> bool:
    found = os.fstat(fd)
    return (found.st_size, found.st_ctime_ns) == (entry.size, entry.ctime_ns)


def _moved(step: TreeStep) -> Failed:
    return Failed(
        f"{os.fsdecode(step.path)} of the upper layer changed while its container was frozen",
        why="a process outside the container writes to it",
        remedy="stop that process and migrate again",
    )
