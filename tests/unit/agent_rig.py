"""Two real agents over fakes, on a clock of their own, with a fault wherever a test wants one.

Everything that touches the world is a *point*: each method of the ports, each line of a journal, each thing taken back, each
gate. A `Fault` acts before or after the nth time that a point is passed; a `Cut` cuts the link at a message. The clock leaps to
the next timer when nothing else is left to do, so that deadlines of an hour pass at once, and a hang is seen at once.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import inspect
import json
import logging
import selectors
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import structlog
from agent_fakes import (
    FakeChannel,
    FakeFrozen,
    FakePages,
    FakeSource,
    FakeTarget,
    Memory,
    SourceNode,
    TargetNode,
    without_zeros,
)
from anyio.abc import TaskStatus

from podferry.agent import migrations, service
from podferry.core.phases import SOURCE_ENDS, SOURCE_MAY_RUN, TARGET_ENDS, SourceEvent, SourcePhase, TargetPhase
from podferry.core.precopy import PreCopyPolicy
from podferry.engine import side
from podferry.engine.journal import JOURNAL, Journal, Part
from podferry.engine.order import Order
from podferry.engine.ports import FrozenSource, SourceJob, TargetJob
from podferry.engine.source import Source
from podferry.engine.target import Target
from podferry.errors import Failed, PeerLost, PodferryError, Refused
from podferry.model import Mode
from podferry.node.records import Container, Opaque
from podferry.wire.channel import Channel, Traffic
from podferry.wire.frames import Data
from podferry.wire.messages import Message, Offer
from podferry.wire.session import Role
from podferry.workload import source as workload_source
from podferry.workload import target as workload_target
from podferry.workload import threads
from podferry.workload.account import Account, Room
from podferry.workload.config import Config
from podferry.workload.offered import OfferedContainer
from podferry.workload.source import FrozenWorkload, Owner, SourceWorkload
from podferry.workload.target import Maker, TargetWorkload

NAME = "job"
BOUND = 300.0
"""Seconds of the leaping clock within which every migration must have ended; the order's own deadline is 60."""
SETTLE = 30.0


structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


class Killed(BaseException):
    """Unwinds the tasks of an agent that was killed; nothing of it may act any more."""


# The clock.


class LeapingLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while nothing can be done."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Leaper(self))

    def time(self) -> float:
        return self.now


class _Leaper(selectors.PollSelector):
    def __init__(self, loop: LeapingLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("nothing will ever happen again")
        if not ready and timeout:
            self._loop.now += timeout
        return ready


# The link.


class Pipe:
    """One direction of a connection."""

    def __init__(self) -> None:
        self.data, self.open, self.news = bytearray(), True, anyio.Event()

    def tell(self) -> None:
        self.news.set()
        self.news = anyio.Event()


class MemoryLink:
    """`podferry.wire.link.Link` between two tasks of one process. What was written before a cut still arrives."""

    def __init__(self, peer: str, incoming: Pipe, outgoing: Pipe) -> None:
        self.peer, self._in, self._out = peer, incoming, outgoing
        self.received = self.sent = 0
        self.waited = 0.0
        self._error: PodferryError | None = None

    @property
    def usable(self) -> bool:
        return self._error is None and self._out.open

    async def read(self, buffer: memoryview) -> int:
        while self._error is None:
            if self._in.data:
                count = min(len(buffer), len(self._in.data))
                buffer[:count] = self._in.data[:count]
                del self._in.data[:count]
                self.received += count
                return count
            if not self._in.open:
                self.fail(PeerLost(f"{self.peer} closed the connection"))
            else:
                await self._in.news.wait()
        raise self._error

    async def write(self, data: bytes | memoryview) -> None:
        if self._error is None and not self._out.open:
            self.fail(PeerLost(f"{self.peer} closed the connection"))
        if self._error is not None:
            raise self._error
        self._out.data += data
        self.sent += len(data)
        self._out.tell()

    def fail(self, error: PodferryError) -> PodferryError:
        self._error = self._error or error
        self.cut()
        return self._error

    def cut(self) -> None:
        for pipe in (self._in, self._out):
            pipe.open = False
            pipe.tell()


class CountedChannel(Channel):
    """A channel that is cut where the test says so."""

    def __init__(self, rig: Rig, link: MemoryLink, role: Role, peer: str) -> None:
        super().__init__(link, role)  # type: ignore[arg-type]
        self.peer, self._rig, self._memory_link = peer, rig, link
        rig.used.append(weakref.ref(self))

    @property
    def traffic(self) -> Traffic:
        return Traffic(self._memory_link.sent, self._memory_link.received, 0.0)

    async def send(self, item: Message | Data) -> None:
        if isinstance(item, Data):
            await super().send(item)
            return
        side, name = str(self.session.role), type(item).__name__
        self._rig.messages.append((side, name))
        cut = self._rig.cut
        here = cut is not None and (cut.side, cut.number) == (side, self._rig.count(side))
        if here and cut.when == "before":
            self._cut()
        await super().send(item)
        if here and cut.when == "after":
            self._cut()

    def _cut(self) -> None:
        self._rig.was_cut = True
        self._memory_link.cut()
        self._rig.down_until = anyio.current_time() + self._rig.cut.seconds


# Faults.


@dataclass(frozen=True)
class Cut:
    """Cut the link `before` or `after` the message `number` (from 1) of `side`; for so many seconds nobody can connect."""

    side: str
    number: int
    when: str = "before"
    seconds: float = 3.0


Act = Callable[["Rig"], "Awaitable[None] | None"]


@dataclass(frozen=True)
class Fault:
    """Do `act` when the point `name` of `side` is passed for the `nth` time."""

    side: str
    name: str
    act: Act
    when: str = "before"
    nth: int = 1


def fail(rig: Rig) -> None:
    raise Failed("a fault of the test's", why="it was asked for")


def refuse(rig: Rig) -> None:
    raise Refused("the container has no cpu controller", why="it was asked for")


def oserror(rig: Rig) -> None:
    raise OSError(errno.EIO, "Input/output error")


def die(rig: Rig) -> None:
    life = LIFE.get()
    life.kill()
    raise Killed


def stop(rig: Rig) -> None:
    LIFE.get().scope.cancel()


def cancel(rig: Rig) -> None:
    rig.cancel()


def end_by_itself(rig: Rig) -> None:
    rig.source.end_by_itself()


def crash(rig: Rig) -> None:
    rig.target.crash()


def lose(rig: Rig) -> None:
    rig.source.crash()


async def stall(rig: Rig) -> None:
    life = LIFE.get()
    rig.stalled = True
    await life.death.wait()
    raise Killed


def methods(*ports: type) -> list[str]:
    """What a port can be asked to do: the methods of its protocol."""
    return list(dict.fromkeys(name for port in ports for name in dir(port) if not name.startswith("_")))


# Agents.


@dataclass
class Life:
    """One process of an agent: from its start until it is killed or stopped."""

    node: str
    dead: bool = False
    links: list[MemoryLink] = field(default_factory=list)
    death: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    def kill(self) -> None:
        self.dead = True
        self.death.set()
        for link in self.links:
            link.cut()


LIFE: ContextVar[Life] = ContextVar("life")


class MortalJournal(Journal):
    """A journal in which a dead agent writes nothing."""

    def __init__(self, directory: Path, rig: Rig, side: str) -> None:
        self._rig, self._side, self._open = rig, side, True
        super().__init__(directory)

    def _append(self, line: dict[str, Any], *, sync: bool = False) -> None:
        name = "line " + next(f"{key} {line[key]}" if isinstance(line[key], str) else key for key in line)
        self._rig.point(self._side, name, "before")
        super()._append(line, sync=sync)
        self._rig.point(self._side, name, "after")
        self._rig.told()

    def save_record(self, record: Any) -> None:
        self._rig.point(self._side, "record", "before")
        super().save_record(record)

    def close(self) -> None:
        if self._open:
            self._open = False
            super().close()


class Guarded:
    """A port's fake behind its points."""

    def __init__(self, job: Any, port: tuple[type, ...], rig: Rig, side: str) -> None:
        self._job, self._names, self._rig, self._side = job, set(methods(*port)), rig, side

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._job, name)
        return guarded(self._rig, self._side, name, method) if name in self._names else method


def guarded(rig: Rig, side: str, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, its beginning and its end being points."""

    async def call(*args: Any, **kwargs: Any) -> Any:
        await rig.apoint(side, name, "before")
        result = await method(*args, **kwargs)
        await rig.apoint(side, name, "after")
        return result

    async def aiterate(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        await rig.apoint(side, name, "before")
        async for item in method(*args, **kwargs):
            yield item
        await rig.apoint(side, name, "after")

    def iterate(*args: Any, **kwargs: Any) -> Iterator[Any]:
        rig.point(side, name, "before")
        yield from method(*args, **kwargs)
        rig.point(side, name, "after")

    def plain(*args: Any, **kwargs: Any) -> Any:
        rig.point(side, name, "before")
        result = method(*args, **kwargs)
        rig.point(side, name, "after")
        return result

    if inspect.iscoroutinefunction(method):
        return call
    if inspect.isasyncgenfunction(method):
        return aiterate
    return iterate if inspect.isgeneratorfunction(method) else plain


RECORD = Container(NAME, "image", "overlayfs", NAME, Opaque("spec", b"{}"))


class FakeKind:
    """A kind of workload that looks at nothing, and refuses what the test says."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.source, self.target = rig.source_of, rig.target_of
        self.translations = None
        self.source_handlers = lambda: rig.handlers("source")
        self.target_handlers = lambda: rig.handlers("target")

    def view(self, name: str) -> SimpleNamespace:
        offered = OfferedContainer(RECORD, ("layer",))
        choice = SimpleNamespace(kind="wp-async", reason="a fake")
        view: SimpleNamespace = SimpleNamespace(
            offered=offered,
            connections=(),
            asked_for=lambda connections: view,
            lost=lambda connections: None,
            demand_movable=lambda mode, connections: choice,
            warnings=lambda mode: [f"{mode} is worth knowing"],
            offer=lambda id, mode: Offer(id, name, mode, offered.to_dict(), {}, 1, 1),
        )
        return view

    def frozen(self, journal: Journal, name: str) -> Guarded | None:
        return self.rig.frozen(journal) if "offered" in journal.facts else None

    def weigh(self, offer: Offer, offered: OfferedContainer) -> tuple[SimpleNamespace, list[PodferryError]]:
        return SimpleNamespace(to_dict=dict), self.rig.refusals

    def sweep(self) -> None:
        """Nothing is left."""


class FakedAgent(service.Agent):
    """The real agent, but for its beginning: no sockets, certificates, containerd."""

    def __init__(self, rig: Rig, node: str) -> None:
        self.rig, self.config = rig, rig.configs[node]
        self.log = structlog.get_logger().bind(node=node)
        self.life = Life(node)
        self._cluster = rig.cluster
        self.alone = FakeKind(rig)  # type: ignore[assignment]
        self._oversee(self.alone, Account(lambda: self.rig.free))  # type: ignore[arg-type]
        self.errors: list[PodferryError] = []

    async def live(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Recover, and work until killed or stopped."""
        LIFE.set(self.life)
        try:
            with self.life.scope:
                async with anyio.create_task_group() as self._tasks:
                    self.rig.agents[self.life.node] = self
                    self.migrations.recover()
                    task_status.started()
                    await anyio.sleep_forever()
        except (Killed, BaseExceptionGroup):
            if not self.life.dead:
                raise
        finally:
            self.life.kill()

    @asynccontextmanager
    async def _dial(self, node: str) -> AsyncIterator[Channel]:  # type: ignore[override]
        there = self.rig.agents.get(node)
        if there is None or there.life.dead or anyio.current_time() < self.rig.down_until:
            raise PeerLost(f"cannot reach {node}")
        up, down = Pipe(), Pipe()
        mine, theirs = MemoryLink(node, down, up), MemoryLink(self.life.node, up, down)
        self.life.links.append(mine)
        there.life.links.append(theirs)
        there._tasks.start_soon(there.take, CountedChannel(self.rig, theirs, Role.TARGET, self.life.node), theirs)
        channel = CountedChannel(self.rig, mine, Role.SOURCE, node)
        try:
            yield channel
        except PodferryError as error:
            await channel.complain(error)
            raise
        finally:
            mine.cut()

    async def take(self, channel: Channel, link: MemoryLink) -> None:
        """What `transport.serve` does with a connection."""
        LIFE.set(self.life)
        try:
            await self.peers.converse(channel)
        except PodferryError as error:
            self.errors.append(error)
            await channel.complain(error)
        except Exception as error:
            self.log.exception("a conversation failed")
            self.errors.append(Failed.because("a conversation failed", error))
        finally:
            link.cut()


@dataclass
class Rig:
    """Two nodes `a` and `b`, an agent on each that starts again when it dies, and a job on `a`."""

    directory: Path
    faults: list[Fault] = field(default_factory=list)
    cut: Cut | None = None
    order: Order = field(default_factory=lambda: Order(timeout=60.0))
    refusals: list[PodferryError] = field(default_factory=list)
    resolve: SourceEvent | None = None
    cluster: Any = None

    def __post_init__(self) -> None:
        self.source, self.target = SourceNode(), TargetNode()
        self.agents: dict[str, FakedAgent] = {}
        self.trace: list[tuple[str, str]] = []
        self.messages: list[tuple[str, str]] = []
        self.awaited: set[tuple[str, str]] = set()
        self.passed: Counter[tuple[str, str, str]] = Counter()
        self.fired: list[Fault] = []
        self.violations: list[str] = []
        self.used: list[weakref.ref[Any]] = []
        self.down_until = 0.0
        self.stalled = self.over = self.was_cut = False
        self.restarts = 0
        self.free = Room(1 << 40, 1 << 40, 1 << 40)
        self.helped = False
        self.refused = ""
        self.frozen_memory: Memory | None = None
        peers = {"a": "a:1", "b": "b:1"}
        self.configs = {
            node: Config(node, f"{node}:1", Path(), peers, state=self.directory / node, run=self.directory / node)
            for node in peers
        }
        for config in self.configs.values():
            config.migrations.mkdir(parents=True)

    # Points.

    def count(self, side: str) -> int:
        """How many messages `side` has begun to send."""
        return sum(one == side for one, _ in self.messages)

    def _due(self, side: str, name: str, when: str) -> list[Fault]:
        if LIFE.get().dead:
            raise Killed
        if when == "before":
            self.trace.append((side, name))
            self.source.tick()
        self.sample()
        self.passed[side, name, when] += 1
        nth = self.passed[side, name, when]
        due = [one for one in self.faults if (one.side, one.name, one.when, one.nth) == (side, name, when, nth)]
        self.fired += due
        return due

    def point(self, side: str, name: str, when: str) -> None:
        for fault in self._due(side, name, when):
            fault.act(self)

    async def apoint(self, side: str, name: str, when: str) -> None:
        self.awaited.add((side, name))
        for fault in self._due(side, name, when):
            if (pending := fault.act(self)) is not None:
                await pending
        await anyio.lowlevel.checkpoint()
        if LIFE.get().dead:
            raise Killed

    def sample(self) -> None:
        """I1, at every point."""
        if self.source.executing and self.target.executing:
            self.violations.append(f"both execute after {self.trace[-1]}")

    async def hold(self, role: str, phase: str, *_: str) -> None:
        await self.apoint(role, f"breakpoint {phase}", "before")

    # What the agents are made with.

    def journal(self, directory: Path) -> MortalJournal:
        return MortalJournal(directory, self, "source" if directory.is_relative_to(self.directory / "a") else "target")

    def nodes(self, side: str) -> list[Any]:
        """What each container has on a node."""
        return [self.source if side == "source" else self.target]

    def containers(self, fake: Any, side: str, journal: Journal) -> list[Any]:
        """The workload's containers, as a node has them."""
        return [fake(node, Part(journal, node.number)) for node in self.nodes(side)]

    def owner(self, journal: Journal) -> Any:
        """Whose they are."""
        return Owner()

    def source_of(self, view: Any, journal: Journal, *_: Any) -> Guarded:
        containers = self.containers(FakeSource, "source", journal)
        self.used += [weakref.ref(one) for one in containers]
        return Guarded(SourceWorkload(containers, self.owner(journal)), (SourceJob,), self, "source")

    def frozen(self, journal: Journal) -> Guarded:
        workload = FrozenWorkload(self.containers(FakeFrozen, "source", journal), self.owner(journal))
        return Guarded(workload, (FrozenSource,), self, "source")

    def maker(self, config: Config, journal: Journal) -> Any:
        """Who makes them on the target."""
        return Maker()

    def target_of(self, journal: Journal, name: str, *_: Any) -> Guarded:
        config = self.configs["b"]
        containers = self.containers(FakeTarget, "target", journal)
        workload = TargetWorkload(config, journal, containers, self.maker(config, journal))
        return Guarded(workload, (TargetJob,), self, "target")

    def handlers(self, side: str) -> dict[str, Any]:
        there = self.source.handlers() if side == "source" else self.target.handlers()
        return {kind: guarded(self, side, f"undo {kind}", handler) for kind, handler in there.items()}

    # One migration.

    def move(self, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> Rig:
        """Run one to its end, and hold it to the invariants."""

        async def direct(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
            return function(*args)

        with monkeypatch.context() as patch:
            patch.setattr(migrations, "Journal", self.journal)
            patch.setattr(workload_source, "FrozenPages", FakePages)
            patch.setattr(workload_target, "DaemonPageChannel", FakeChannel)
            patch.setattr(threads, "to_thread", SimpleNamespace(run_sync=direct))
            patch.setattr(side.breakpoints, "hold", self.hold)
            anyio.run(self._run, replace(self.order, mode=mode), backend_options={"loop_factory": LeapingLoop})
        self.check()
        return self

    async def _run(self, order: Order) -> None:
        self._news = anyio.Event()
        async with anyio.create_task_group() as tasks:
            for node in ("a", "b"):
                await tasks.start(self._keep_alive, node)
            self.agents["a"]._tasks.start_soon(self._ask, order)
            with anyio.move_on_after(BOUND):
                await self._ended()
            if not self.all_ended():
                self.helped = True
                self.faults, self.cut = [], None
                self._help()
                with anyio.move_on_after(BOUND):
                    await self._ended()
            await anyio.sleep(SETTLE)
            self.over = True
            self.record_messages()
            tasks.cancel_scope.cancel()

    def _help(self) -> None:
        """What a person does with a migration that does not end: decides, or starts both agents again."""
        sources = self.agents["a"].migrations.sources.values()
        if self.resolve is not None and any(one.phase is SourcePhase.LOST for one in sources):
            try:
                for source in sources:
                    source.resolve(self.resolve)
            except Refused as refused:  # then the nodes must meet again
                self.refused, self.down_until = str(refused), 0.0
            return
        for agent in list(self.agents.values()):
            agent.life.kill()
            agent.life.scope.cancel()

    async def _keep_alive(self, node: str, *, task_status: TaskStatus[None]) -> None:
        await anyio.lowlevel.checkpoint()
        with anyio.CancelScope() as scope:
            while not scope.cancel_called:
                agent = FakedAgent(self, node)
                async with anyio.create_task_group() as tasks:
                    await tasks.start(agent.live)
                    task_status.started()
                    task_status = anyio.TASK_STATUS_IGNORED
                self.restarts += 1
                await anyio.sleep(0.5)

    async def _ask(self, order: Order) -> None:
        agent = self.agents["a"]
        LIFE.set(agent.life)
        try:
            agent._set_out(NAME, "b", order)
        except (OSError, PodferryError):  # whoever asked is told so; nothing began
            self.told()

    @property
    def id(self) -> str:
        """The migration's; empty before it has one."""
        return next((one.name for one in self.configs["a"].migrations.iterdir()), "")

    def told(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    async def _ended(self) -> None:
        while not self.all_ended():
            await self._news.wait()

    def phase(self, node: str) -> str:
        """The last phase in a node's journal."""
        return (self.phases(node) or [""])[-1]

    def phases(self, node: str) -> list[str]:
        """All phases in a node's journal."""
        path = self.configs[node].migrations / self.id / JOURNAL
        if not path.exists():
            return []
        return [line["phase"] for text in path.read_text().splitlines() if "phase" in (line := json.loads(text))]

    def all_ended(self) -> bool:
        never_began = not self.phases("a") and not self.agents["a"].migrations.sources
        return (
            bool(self.id) and (never_began or self.phase("a") in SOURCE_ENDS) and self.phase("b") in TARGET_ENDS | {""}
        )

    def cancel(self) -> None:
        for source in self.agents["a"].migrations.sources.values():
            source.cancel()

    def record_messages(self) -> None:
        """The last word of both agents, for assertions after the loop has ended."""
        self.halves: list[Source | Target] = [
            *self.agents["a"].migrations.sources.values(),
            *self.agents["b"].migrations.targets.values(),
        ]
        self.records = {node: (self.journal_of(node).load_record() or {}) for node in ("a", "b") if self.phases(node)}

    def kept(self) -> list[Any]:
        """Connections, and the job on its way out, that the agents still hold now that all has ended."""
        for agent in self.agents.values():
            agent.errors.clear()  # these are the tests' own, and the links', with the frames that errors came through
            agent.life.links.clear()
        gc.collect()
        return [one for ref in self.used if (one := ref()) is not None]

    def journal_of(self, node: str) -> Journal:
        journal = Journal(self.configs[node].migrations / self.id)
        journal.close()
        return journal

    @property
    def passed_the_right(self) -> bool:
        return SourcePhase.RESUME in self.phases("a")

    # What must hold.

    def check(self) -> None:
        """The numbered rules, whatever went wrong."""
        assert self.violations == [], "I1"
        assert self.all_ended(), f"I4: {self.phases('a')}, {self.phases('b')}"
        source, target = SourcePhase(self.phase("a") or SourcePhase.CHECK), self.phase("b")
        if target != TargetPhase.DIED:
            assert (source in SOURCE_MAY_RUN) == (target in ("", TargetPhase.GAVE_UP)), f"{source}, {target}"
        if not self.source.ended.is_set():
            assert self.source.executing, f"I3: {source}"
        if not self.passed_the_right:
            assert not self.target.executing, "I3"
        if source is SourcePhase.COMPLETED and target != TargetPhase.DIED:
            assert not self.source.alive
            assert self.target.executing
            self.check_what_arrived()
        unsaid = {one.name.removeprefix("undo ") for one in self.fired if one.name.startswith("undo ")}
        assert set(self.source.residue()) <= unsaid, "I5"
        assert set(self.target.residue()) <= unsaid, "I5"
        for half in self.halves:
            assert half.journal.ledger.entries == [], "I5"

    def check_what_arrived(self) -> None:
        """What runs at the target is what was frozen at the source."""
        assert without_zeros(self.target.memory) == without_zeros(self.source.memory)
        assert self.target.files == self.source.files
        assert self.target.log == self.source.log


def order(**policy: Any) -> Order:
    """An order of the tests."""
    return Order(timeout=60.0, policy=PreCopyPolicy(**policy))


def unique(points: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The points in the order in which they were first passed."""
    return list(dict.fromkeys(points))
