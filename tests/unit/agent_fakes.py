"""A container on two nodes without any kernel behind it: what a migration does to it, in dictionaries.

`SourceNode` and `TargetNode` are what outlives a killed agent: containerd, CRIU, the cgroup, the lazy-pages daemon. `FakeSource`,
`FakeFrozen` and `FakeTarget` are a container on them. The job writes whenever anything happens
while it executes, so that whatever the engine forgets to send is seen at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import anyio
import xxhash

from podferry.engine.ports import IMAGES, LOG, UPPER, DirtySet, OriginalGone
from podferry.errors import Bug, Failed, PeerMisbehaved, PodferryError, Refused
from podferry.lazypages.page_source import Frame, Word
from podferry.memory.ranges import EMPTY, Runs
from podferry.model import Dump
from podferry.wire.batch import PageBatch
from podferry.wire.frames import HELD_PAGES, INLINE, PAGE, Drop, File, Pages
from podferry.wire.held_pages import HeldPages
from podferry.wire.messages import AddressSpaceSum, StateEnd, TreeSum
from podferry.workload.numbers import address_space_of, container_of_address_space, directory_of
from podferry.workload.source_memory import Left

Memory = dict[int, dict[int, bytes]]
BASE = 0x7000_0000_0000
FIRST, SECOND, LATE = 1, 7, 12
SHARED = 1 << 40
UNTOUCHED = BASE + 9 * PAGE
"""A page of the first space that CRIU lists and nobody owes: it was never written."""
ZERO = bytes(PAGE)


def page(number: int) -> bytes:
    """A page that no other number has."""
    return hashlib.sha256(str(number).encode()).digest() * (PAGE // 32)


def without_zeros(memory: Memory) -> Memory:
    """What a job can tell apart: an absent page and one of zeros are the same, and so is a space without any."""
    kept = {
        address_space: {at: data for at, data in pages.items() if data != ZERO}
        for address_space, pages in memory.items()
    }
    return {address_space: pages for address_space, pages in kept.items() if pages}


class SourceNode:
    """The original: it writes at each `tick` for as long as it executes. `number` is its in a pod."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.memory: Memory = {
            address_space: {BASE + n * PAGE: page(1000 * address_space + n) for n in range(8)}
            for address_space in (FIRST, SECOND)
        }
        self.files = {"data": b"first", "idle": b"never written again"}
        self.shared = page(6) + ZERO + page(7) + page(8)
        self.log = b"it begins\n"
        self.alive, self.frozen, self.held, self.scratch, self.quota = True, False, False, False, 1.0
        self.exec_locked = self.spoilt = False
        self.ended = anyio.Event()
        self.ticks = 0
        self.written: dict[int, set[int]] = {}
        self.gone: dict[int, set[int]] = {}
        self.address_spaces_gone: set[int] = set()

    @property
    def executing(self) -> bool:
        return self.alive and not self.frozen and not self.held

    def residue(self) -> list[str]:
        """What a migration that has ended must not leave here."""
        held = {"outgoing": self.scratch, "quota": self.quota != 1.0, "exec-lock": self.exec_locked}
        if self.alive:
            held |= {"held-dump": self.held, "freeze": self.frozen}
        return [kind for kind, there in held.items() if there]

    def tick(self) -> None:
        """Let the job compute a little: it writes, prints, frees memory, forks, and one of its processes exits."""
        if not self.executing:
            return
        self.ticks += 1
        self._write(FIRST, BASE + self.ticks % 8 * PAGE, page(self.ticks))
        self.log += b"tick %d\n" % self.ticks
        if self.ticks % 5 == 0:
            self.files["data"] = b"written at %d" % self.ticks
            self.files[f"new-{self.ticks}"] = page(self.ticks)[:40]
        if self.ticks % 7 == 0:
            self._write(FIRST, BASE + (self.ticks + 3) % 8 * PAGE, ZERO)
        if self.ticks % 3 == 0:
            at = BASE + (self.ticks + 5) % 8 * PAGE
            self.memory[FIRST].pop(at, None)
            self.gone.setdefault(FIRST, set()).add(at)
        if self.ticks == 6 and SECOND in self.memory:
            del self.memory[SECOND]
            self.address_spaces_gone.add(SECOND)
        if self.ticks >= 8:
            self._write(LATE, BASE + self.ticks % 4 * PAGE, page(-self.ticks))

    def _write(self, address_space: int, at: int, data: bytes) -> None:
        self.memory.setdefault(address_space, {})[at] = data
        self.written.setdefault(address_space, set()).add(at)

    def end_by_itself(self) -> bool:
        """The job's own end. A frozen job cannot end."""
        if not self.executing:
            return False
        self.alive = False
        self.ended.set()
        return True

    def crash(self) -> None:
        """The frozen original ends, though nobody asked for it: its node was switched off, say."""
        self.alive = self.held = self.frozen = self.exec_locked = False
        self.memory.clear()
        self.ended.set()

    def handlers(self) -> dict[str, Any]:
        async def outgoing(facts: Mapping[str, Any]) -> None:
            self.scratch = False

        async def hold(facts: Mapping[str, Any]) -> None:
            self.held = False

        async def freeze(facts: Mapping[str, Any]) -> None:
            self.frozen = False

        async def quota(facts: Mapping[str, Any]) -> None:
            self.quota = facts["quota"]

        async def door(facts: Mapping[str, Any]) -> None:
            self.exec_locked = False

        return {"outgoing": outgoing, "held-dump": hold, "freeze": freeze, "quota": quota, "exec-lock": door}


class FakeFrozen:
    """`podferry.workload.frozen.FrozenContainer` on a `SourceNode`, for an agent that was restarted."""

    def __init__(self, node: SourceNode, journal: Any) -> None:
        self.node, self.journal = node, journal

    def left(self) -> Left:
        if not self.node.alive:
            raise OriginalGone("the frozen original has ended")
        runs = {
            address_space: Runs((at, at + PAGE) for at in pages)
            for address_space, pages in address_spaces(self.node).items()
        }
        return Left(dict.fromkeys(runs, self.node), runs)  # type: ignore[arg-type]

    async def kill(self) -> None:
        if self.node.alive and not self.node.frozen:
            raise Bug("the original is killed although it executes")
        self.node.alive = self.node.held = self.node.frozen = self.node.exec_locked = False
        self.node.quota = 1.0
        self.node.ended.set()
        for kind in ("held-dump", "freeze", "quota", "exec-lock"):
            self.journal.release(kind)

    async def runs(self) -> bool:
        return self.node.alive

    def executing(self) -> bool:
        return self.node.executing

    async def close(self) -> None:
        pass


def address_spaces(node: SourceNode) -> Memory:
    """The node's memory, by the numbers of the wire."""
    return {address_space_of(node.number, pid): pages for pid, pages in node.memory.items()}


class FakeMemory:
    """`podferry.workload.source_memory.SourceMemory` on a `SourceNode`."""

    def __init__(self, node: SourceNode) -> None:
        self.node = node
        self._looked = False
        self._sent: dict[int, Runs] = {}
        self.left: Left | None = None

    def scan(self) -> DirtySet:
        node = self.node
        written, dropped = node.written, {pid: set(at) for pid, at in node.gone.items()}
        if not self._looked:
            written = {pid: set(pages) for pid, pages in node.memory.items()}
        self._looked = True
        gone = [address_space_of(node.number, pid) for pid in node.address_spaces_gone]
        found = DirtySet(
            {self._address_space(pid): self._runs(pages) for pid, pages in written.items() if pid in node.memory},
            {self._address_space(pid): self._runs(pages) for pid, pages in dropped.items()}
            | {address_space: self._sent.get(address_space, EMPTY) for address_space in gone},
        )
        node.written, node.gone, node.address_spaces_gone = {}, {}, set()
        return found

    def _address_space(self, pid: int) -> int:
        return address_space_of(self.node.number, pid)

    def _runs(self, pages: set[int]) -> Runs:
        return Runs((at, at + PAGE) for at in pages)

    def _own(self, found: Mapping[int, Runs]) -> dict[int, Runs]:
        return {
            address_space: runs
            for address_space, runs in found.items()
            if container_of_address_space(address_space)[0] == self.node.number
        }

    def leave(self, change: DirtySet) -> Iterator[Drop]:
        dropped, written = self._own(change.dropped), self._own(change.written)
        for address_space in {**dropped, **written}:
            yield from self._forget(
                address_space, dropped.get(address_space, EMPTY) | written.get(address_space, EMPTY)
            )
        self.left = Left(dict.fromkeys(written, self.node), written)  # type: ignore[arg-type]

    def read(self, change: DirtySet, round: int) -> Iterator[Pages | Drop]:
        for address_space, runs in self._own(change.dropped).items():
            yield from self._forget(address_space, runs)
        for address_space, runs in self._own(change.written).items():
            batch, memory = PageBatch(address_space, round), address_spaces(self.node).get(address_space, {})
            there = Runs((at, at + PAGE) for at, data in memory.items() if at in runs and data != ZERO)
            for start, end in there:
                yield from batch.add(start, b"".join(memory[at] for at in range(start, end, PAGE)))
            yield from batch.flush()
            yield from self._forget(address_space, runs - there)
            self._sent[address_space] = self._sent.get(address_space, EMPTY) | there

    def _forget(self, address_space: int, runs: Runs) -> Iterator[Drop]:
        void = self._sent.get(address_space, EMPTY) & runs
        self._sent[address_space] = self._sent.get(address_space, EMPTY) - runs
        if void:
            yield Drop(address_space, tuple(void))

    def totals(self) -> tuple[AddressSpaceSum, ...]:
        return tuple(AddressSpaceSum(address_space, runs.size // PAGE) for address_space, runs in self._sent.items())


class FakeTree:
    """`podferry.workload.source_tree.SourceTree` on a `SourceNode`."""

    def __init__(self, node: SourceNode) -> None:
        self.node = node
        self._sent: dict[str, bytes] = {}

    async def changes(self, *, last: bool) -> AsyncIterator[bytes]:
        if last and self.node.executing:
            raise Bug("the last pass over the files of a job that executes")
        changed = {name: data for name, data in self.node.files.items() if self._sent.get(name) != data}
        for record in [json.dumps([name, data.hex()]).encode() for name, data in changed.items()]:
            yield record
        self._sent |= changed

    def total(self, number: int) -> TreeSum:
        return replace(tree_sum(self._sent), tree=number)

    async def close(self) -> None:
        pass


class FakeShared:
    """`podferry.workload.shared_memory.SharedMemory` of a container that changes it once, after the first pass."""

    def __init__(self, node: SourceNode) -> None:
        self.node, self.held = node, HeldPages()

    async def changed(self, round: int) -> AsyncGenerator[Pages | Drop, None]:
        space, memory = address_space_of(self.node.number, HELD_PAGES), memoryview(self.node.shared)
        for start, end in self.held.changed(SHARED, memory):
            yield Pages(space, round, ((SHARED + start, (end - start) // PAGE),), bytes(memory[start:end]))
        self.node.shared = self.node.shared[:-PAGE] + page(9)


class FakeSource(FakeFrozen):
    """`podferry.workload.source_container.SourceContainer` on a `SourceNode`."""

    cgroup, dumped = None, Dump.MEMORY_SKIPPING

    def __init__(self, node: SourceNode, journal: Any) -> None:
        super().__init__(node, journal)
        self.memory, self.tree = FakeMemory(node), FakeTree(node)
        self.shared = FakeShared(node)
        self._log_sent = 0

    async def scan_dirty(self) -> DirtySet:
        return self.memory.scan()

    async def final_scan(self) -> DirtySet:
        if self.node.executing:
            raise Bug("the last look at a job that executes")
        return self.memory.scan()

    def left(self) -> Left:
        if self.memory.left is None:
            raise Bug("nothing was left for later")
        return self.memory.left

    async def logs(self, *, last: bool) -> AsyncIterator[tuple[int, int, bytes]]:
        offset, self._log_sent = self._log_sent, len(self.node.log)
        if data := self.node.log[offset:]:
            yield directory_of(self.node.number, LOG), offset, data

    async def names_settled(self) -> None:
        """No file of it has lost its name."""

    async def stand_by(self) -> None:
        self.journal.acquire("outgoing", node=self.node.number)
        self.node.scratch = True
        self.journal.acquire("held-dump", node=self.node.number)

    async def lock_exec(self) -> None:
        self.journal.acquire("exec-lock", node=self.node.number)
        self.node.exec_locked = True

    async def freeze(self) -> None:
        self.journal.acquire("freeze", node=self.node.number)
        self.node.frozen = True
        self.node.quota = 1.0
        self.journal.release("quota")

    def members(self) -> list[int]:
        return [self.node.number]

    async def unaccepted(self, members: Collection[int]) -> tuple[str, ...]:
        if not self.node.frozen:
            raise Bug("looked at while it runs")
        return ()

    async def dump(self) -> Mapping[tuple[int, str], bytes]:
        self.journal.acquire("outgoing", node=self.node.number)
        self.node.scratch = True
        self.journal.acquire("held-dump", node=self.node.number)
        if not self.node.alive or self.node.spoilt:
            raise Failed("there is nothing to dump")
        if not self.node.frozen:
            raise Bug("the dump of a job that executes")
        self.node.held = True
        lazy = {address_space: sorted(pages) for address_space, pages in self.node.memory.items()}
        lazy[FIRST].append(UNTOUCHED)
        directory = directory_of(self.node.number, IMAGES)
        return {(directory, "pagemap.img"): json.dumps(lazy).encode(), (directory, "empty.img"): b""} | {
            (directory, "pages-1.img"): self.node.shared
        }

    async def demand_quota(self) -> None:
        pass

    async def throttle(self, quota: float) -> None:
        if self.journal.held("quota") is None:
            self.journal.acquire("quota", node=self.node.number, quota=self.node.quota)
        self.node.quota = quota

    async def ended(self) -> str:
        await self.node.ended.wait()
        return "exit status 3"


class FakePages:
    """`podferry.workload.remote_pages.FrozenPages` without processes behind it: `nodes` stand in for the pids."""

    def __init__(self, nodes: Mapping[int, SourceNode], runs: Mapping[int, Runs]) -> None:
        self._nodes, self._all, self._left = nodes, dict(runs), dict(runs)

    def start_over(self) -> None:
        self._left = dict(self._all)

    @property
    def bytes(self) -> int:
        return sum(runs.size for runs in self._left.values())

    def answer(self, address_space: int, address: int) -> Iterator[Pages | Drop]:
        if address not in self._all.get(address_space, EMPTY):
            yield Drop(address_space, ((address, address + PAGE),))
        elif address in self._left[address_space]:
            yield self._take(address_space, address)

    def rest(self) -> Iterator[Pages | Drop]:
        for address_space, runs in list(self._left.items()):
            for start, end in runs:
                for at in range(start, end, PAGE):
                    if at in self._left[address_space]:
                        yield self._take(address_space, at)

    def _take(self, address_space: int, at: int) -> Pages | Drop:
        node = self._nodes[address_space]
        if not node.alive:
            raise OriginalGone("the frozen original has ended")
        data = address_spaces(node).get(address_space, {}).get(at, ZERO)
        self._left[address_space] = self._left.get(address_space, EMPTY) - Runs.of(at, at + PAGE)
        return Drop(address_space, ((at, at + PAGE),)) if data == ZERO else Pages(address_space, 0, ((at, 1),), data)

    def close(self) -> None:
        pass


class TargetNode:
    """The other node: what was made there for the container, and what runs there. `number` is the container's in a pod."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.container = self.scratch = self.task = self.daemon = False
        self.running = self.released = self.postcopy = self.died = False
        self.crashed = self.marked = self.taken = False
        self.store: Memory = {}
        self.shared: dict[int, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.log = b""
        self.images: dict[str, bytes] = {}
        self.memory: Memory = {}
        self.lost = anyio.Event()
        self.absent: set[tuple[int, int]] = set()
        self.wants: list[tuple[int, int]] = []
        self.news = anyio.Event()

    @property
    def executing(self) -> bool:
        return self.running

    def residue(self) -> list[str]:
        """What a migration that has ended must not leave here."""
        held = {"scratch": self.scratch, "lazy-pages-daemon": self.daemon}
        if not self.running:
            held |= {"container": self.container, "task": self.task}
        return [kind for kind, there in held.items() if there]

    def tell(self) -> None:
        self.news.set()
        self.news = anyio.Event()

    def arrived(self, address_space: int, start: int, end: int, *, zero: bool = False) -> None:
        """The lazy-pages daemon hears of pages."""
        for at in range(start, end, PAGE):
            if (address_space, at) in self.absent:
                self.absent.remove((address_space, at))
                if not zero:
                    self.memory.setdefault(address_space, {})[at] = self.store[address_space][at]
        self.wants = [want for want in self.wants if want in self.absent]
        self.tell()

    def lose(self) -> None:
        """podferry-runc is killed while it waits for the state."""
        self.task = False
        self.lost.set()

    def crash(self) -> None:
        """The job's shim is killed, and the job with it: who is gone lacks no page, so the lazy-pages daemon is done."""
        self.running = self.task = False
        self.absent.clear()
        self.wants.clear()
        self.tell()

    def handlers(self) -> dict[str, Any]:
        async def container(facts: Mapping[str, Any]) -> None:
            self.container = False

        async def scratch(facts: Mapping[str, Any]) -> None:
            self.scratch = False

        async def task(facts: Mapping[str, Any]) -> None:
            self.task = self.running = False

        async def daemon(facts: Mapping[str, Any]) -> None:
            self.daemon = False

        return {"container": container, "scratch": scratch, "task": task, "lazy-pages-daemon": daemon}


async def first_of(events: list[anyio.Event]) -> None:
    """Return once one of the events is set."""
    async with anyio.create_task_group() as waits:

        async def wait(event: anyio.Event) -> None:
            await event.wait()
            waits.cancel_scope.cancel()

        for event in events:
            waits.start_soon(wait, event)


class FakeChannel:
    """`podferry.workload.page_channel.DaemonPageChannel` without sockets: `nodes` stand in for their paths."""

    def __init__(self, nodes: Sequence[TargetNode]) -> None:
        if not all(node.daemon for node in nodes):
            raise Failed("the lazy-pages daemon takes no connection")
        self._nodes = nodes
        self._asked: set[tuple[int, int]] = set()

    def arrived(self, address_space: int, start: int, end: int) -> None:
        node, pid = self._node(address_space)
        node.arrived(pid, start, end)

    def zero(self, address_space: int, start: int, end: int) -> None:
        node, pid = self._node(address_space)
        node.arrived(pid, start, end, zero=True)

    def _node(self, address_space: int) -> tuple[TargetNode, int]:
        number, pid = container_of_address_space(address_space)
        if number >= len(self._nodes):
            raise PeerMisbehaved(f"memory of container {number}, which the workload does not have")
        return self._nodes[number], pid

    async def flush(self) -> None:
        await anyio.lowlevel.checkpoint()

    async def next_request(self) -> Frame | None:
        while True:
            for node in self._nodes:
                for pid, at in node.wants:
                    address_space = address_space_of(node.number, pid)
                    if (address_space, at) not in self._asked:
                        self._asked.add((address_space, at))
                        return Frame(Word.WANT, address_space, at, at + PAGE)
            if not any(node.daemon for node in self._nodes):
                return None
            await first_of([node.news for node in self._nodes])

    def close(self) -> None:
        pass


class FakeContainerMaker:
    """`podferry.workload.target_container.ContainerMaker` on a `TargetNode`."""

    name, flags, made_already = "part", (), None

    def __init__(self, node: TargetNode) -> None:
        self.node = node

    async def is_here(self) -> bool:
        return self.node.running

    async def has_ended(self) -> bool:
        return not self.node.running

    def mark_arrived(self) -> None:
        pass


class FakeTarget:
    """`podferry.workload.target_container.TargetContainer` on a `TargetNode`."""

    def __init__(self, node: TargetNode, journal: Any) -> None:
        self.node, self.journal = node, journal
        self.maker = FakeContainerMaker(node)
        self._closed = self._watched = self._made = self._prepared = False

    async def prepare(self) -> None:
        self.journal.acquire("container", node=self.node.number)
        if self.node.taken:
            self.journal.release("container")
            raise Refused("there is a container of this name here already")
        self._prepared = True
        self.node.container = True
        self.journal.acquire("scratch", node=self.node.number)
        self.node.scratch = True

    def expect_restore(self, **how: Any) -> None:
        pass

    async def start_lazypages(self, *, postcopy: bool) -> None:
        self.journal.acquire("lazy-pages-daemon", node=self.node.number)
        self.node.daemon = True
        self.node.postcopy = postcopy

    async def make(self, timeout: float) -> None:
        if self._made:
            return
        if not self.node.task:
            self.journal.acquire("task", node=self.node.number)
            await anyio.sleep(0.05)
            self.node.task, self.node.lost = True, anyio.Event()
        self._made = True

    async def lost(self) -> PodferryError:
        if self._watched:
            raise Bug("two tasks wait for one end")  # as of the descriptor that the real one waits for
        self._watched = True
        try:
            await self.node.lost.wait()
        finally:
            self._watched = False
        return Failed("nobody waits for the state any more")

    def pages(self, round: int, pid: int, address: int, data: memoryview) -> None:
        if self._closed or not self._prepared:
            raise Bug("pages came when there was no store")
        into = self.node.shared if pid == HELD_PAGES else self.node.store.setdefault(pid, {})
        for offset in range(0, len(data), PAGE):
            into[address + offset] = bytes(data[offset : offset + PAGE])

    def drop(self, pid: int, start: int, end: int) -> None:
        for at in range(start, end, PAGE):
            self.node.store.get(pid, {}).pop(at, None)

    def tree(self, record: memoryview) -> None:
        if not self._prepared:
            raise Bug("a record of the upper layer came before the container was prepared")
        name, data = json.loads(bytes(record))
        self.node.files[name] = bytes.fromhex(data)

    def log(self, offset: int, data: memoryview) -> None:
        if not self._prepared or offset != len(self.node.log):
            raise PeerMisbehaved("the log came out of order")
        self.node.log += bytes(data)

    def image(self, name: str, offset: int, data: memoryview, *, last: bool) -> None:
        self.node.images[name] = self.node.images.get(name, b"")[:offset] + bytes(data)

    def image_of_pages(self, piece: File) -> None:
        inline, data = bytes(piece.payload), b""
        for address, pages in piece.runs:
            for at in range(address, address + pages * PAGE, PAGE):
                if address == INLINE:
                    data, inline = data + inline[:PAGE], inline[PAGE:]
                else:
                    data += self.node.shared.pop(at) if address else ZERO
        self.image(piece.name, piece.offset, memoryview(data), last=piece.last)

    async def judge(self, end: StateEnd) -> None:
        images = directory_of(self.node.number, IMAGES)
        announced = {one.name: one.size for one in end.files if one.directory == images}
        if announced != {name: len(data) for name, data in self.node.images.items()}:
            raise Failed("images did not arrive whole")
        if self.node.store or self.node.files:
            raise Bug("memory or files came in a rehearsal")

    async def verify(self, end: StateEnd) -> None:
        node, number = self.node, self.node.number
        images, log = directory_of(number, IMAGES), directory_of(number, LOG)
        sums = {one.name: (one.size, one.digest) for one in end.files if one.directory == images}
        came = {name: (len(data), xxhash.xxh3_128_hexdigest(data)) for name, data in node.images.items()}
        if sums != came or replace(tree_sum(node.files), tree=number) not in end.trees:
            raise Failed("images or files did not arrive whole")
        if [one.size for one in end.files if one.directory == log] != [len(node.log)]:
            raise Failed("the log did not arrive whole")
        numbered = [(container_of_address_space(one.address_space), one.pages) for one in end.address_spaces]
        counted = {pid: pages for (part, pid), pages in numbered if part == number}
        if not node.postcopy and counted != {pid: len(pages) for pid, pages in node.store.items()} | {
            pid: 0 for pid, pages in counted.items() if not pages
        }:
            raise Failed("memory did not arrive whole")

    async def release(self) -> float:
        node = self.node
        if not node.released:
            await self.make(0)
            node.released = True
            node.memory = {address_space: dict(pages) for address_space, pages in node.store.items()}
            if node.postcopy:
                lazy = json.loads(node.images["pagemap.img"])
                listed = {(int(address_space), at) for address_space, pages in lazy.items() for at in pages}
                node.absent = {
                    (address_space, at) for address_space, at in listed if at not in node.store.get(address_space, {})
                }
                node.wants = sorted(node.absent)[:1]
                node.tell()
        while node.wants and node.daemon and not node.running:
            await node.news.wait()
        if not (node.daemon or node.running):
            raise Failed("the lazy-pages daemon died")
        if not node.task:
            raise Failed("there is no task")
        node.running = True
        node.wants = sorted(node.absent)[-2:]
        node.tell()
        return 0.0

    def differences(self) -> tuple[str, ...]:
        return ("comm of 1/1: was a, is b",)

    def daemon_socket(self) -> TargetNode:
        self._prepared = True
        return self.node

    def remote_pages_complete(self, channel: FakeChannel) -> None:
        for pid, at in sorted(self.node.absent):
            channel.zero(address_space_of(self.node.number, pid), at, at + PAGE)

    async def close(self) -> None:
        self._closed = True

    async def resumed(self) -> float:
        if not self.node.running:
            raise Failed("the job is gone")
        return 0.0

    async def filled(self) -> dict[str, Any]:
        while self.node.absent:
            if not self.node.daemon:
                raise Failed("the lazy-pages daemon died")
            await self.node.news.wait()
        if self.node.postcopy and not (self.node.marked or await self.maker.is_here()):
            raise Failed("the job has ended before all of its memory had arrived")
        return {"pages": 1}

    def entrust(self) -> None:
        for kind in ("task", "container"):
            self.journal.release(kind)


def tree_sum(files: Mapping[str, bytes]) -> TreeSum:
    """What a tree of these files amounts to."""
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    return TreeSum(UPPER, len(files), sum(map(len, files.values())), digest)
