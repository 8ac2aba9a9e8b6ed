"""An agent that moves nothing: the real control socket and the real record, with a script behind them.

What a migration does is decided by the container's name; see `SCRIPTS`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import anyio
from anyio.from_thread import start_blocking_portal

from podferry.agent.control import Emit, serve
from podferry.core.connections import LISTEN, End, KernelSocket, judge, told
from podferry.core.precopy import Round
from podferry.engine.migration_record import MigrationRecord
from podferry.errors import CommandFailed, Failed, Refused, UsageError
from podferry.model import Connections, Mode, Outcome

MIB = 1 << 20
SCRIPTS = {
    "train": "completes",
    "greedy": "is refused",
    "shy": "is refused before it has a record",
    "weak": "is rolled back",
    "broken": "fails",
    "slow": "runs until it is cancelled",
    "mute": "the agent goes away in the middle",
}

_DATABASE = KernelSocket("tcp", End(ip_address("fd00::5"), 40000), End(ip_address("fd00:96::7"), 5432), 1)
SOCKETS = [_DATABASE, KernelSocket("tcp", End(ip_address("::"), 80), None, LISTEN)]


class FakeAgent:
    """One node's agent; `stories` are its migrations by id."""

    def __init__(
        self, node: str, containers: dict[str, str], records: dict[str, MigrationRecord] | None = None
    ) -> None:
        self.node_name = node
        self.containers = containers
        self.records = {} if records is None else records
        self.asked: list[dict[str, Any]] = []
        self.begun = threading.Event()
        self.deaf = False
        self.refuses_to_stand_down = False
        self._cancelled: dict[str, anyio.Event] = {}

    @property
    def ops(self) -> dict[str, Any]:
        """The operations, as `control.serve` takes them."""
        names = ("ps", "check", "migrate", "status", "cancel", "resolve", "node")
        return {name: getattr(self, name) for name in names}

    async def ps(self, emit: Emit) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "node": self.node_name,
                "state": state,
                "memory_bytes": 512 * MIB,
                "image": "podferry.local/job:1",
                "movable": state == "running",
                "why": "" if state == "running" else f"it is {state}",
            }
            for name, state in self.containers.items()
        ]

    async def node(self, emit: Emit) -> dict[str, Any]:
        return {"node": self.node_name, "version": "0"}

    async def check(
        self,
        emit: Emit,
        name: str,
        to: str,
        *,
        rehearse: bool = False,
        max_freeze_s: float | None = None,
        connections: str = Connections.CLOSE,
    ) -> dict[str, Any]:
        self._known(name)
        self.asked.append({"rehearse": rehearse, "connections": connections})
        refusals = [io_uring().to_dict()] if name == "greedy" or (rehearse and name == "weak") else []
        rehearsal = {"id": "m1", "outcome": "rolled-back" if refusals else "rehearsed"}
        rehearsal |= {} if refusals else {"stood_still_ms": 104.0, "forecast_ms": 222.0, "written_bytes": 4096}
        return {
            "name": name,
            "source": self.node_name,
            "target": to,
            "movable": not refusals,
            "refusals": refusals,
            "warnings": ["the clock of [b]node-b[/b] is 2 s ahead"],
            "tracker": "userfaultfd",
            "tracker_reason": "kernel 6.18 has PAGEMAP_SCAN",
            "memory_bytes": 512 * MIB,
            "upper_bytes": 3 * MIB,
            **told(judge(SOCKETS)),
            **({"rehearsal": rehearsal} if rehearse else {}),
        }

    async def migrate(
        self,
        emit: Emit,
        name: str,
        to: str,
        mode: str,
        timeout_s: float | None,
        max_downtime_ms: float | None,
        bandwidth: int | None,
        allow_postcopy: bool,
        max_freeze_s: float | None = None,
        connections: str = Connections.CLOSE,
    ) -> dict[str, Any]:
        wishes = {"mode": mode, "max_downtime_ms": max_downtime_ms, "connections": connections}
        self.asked.append({"bandwidth": bandwidth, **wishes})
        self._known(name)
        if name == "shy":
            raise io_uring()
        migration_record = MigrationRecord(f"m{len(self.records) + 1}", name, self.node_name, to, Mode(mode))
        self.records[migration_record.id] = migration_record
        events: list[dict[str, Any]] = []
        migration_record.listen(events.append)

        async def flush() -> None:
            while events:
                await emit(events.pop(0))

        migration_record.enter("check")
        await flush()
        if name == "greedy":
            migration_record.end(Outcome.REFUSED, "io_uring", io_uring())
        elif name == "broken":
            migration_record.end(Outcome.FAILED, "both ends are gone", Failed("the job is lost"))
        elif name == "slow":
            self._cancelled[migration_record.id] = anyio.Event()
            migration_record.enter("pre-copy")
            await flush()
            self.begun.set()
            await self._cancelled[migration_record.id].wait()
            migration_record.enter("undo", "thawing the source")
            migration_record.end(Outcome.CANCELLED, "somebody asked for it")
        elif name == "mute":
            raise anyio.ClosedResourceError
        else:
            self._move(migration_record, weak=name == "weak")
        await flush()
        return migration_record.to_dict()

    async def status(self, emit: Emit, id: str | None) -> list[dict[str, Any]]:
        return [
            migration_record.to_dict()
            for migration_record in self.records.values()
            if id in (None, migration_record.id)
        ]

    async def cancel(self, emit: Emit, id: str) -> dict[str, Any]:
        if id not in self._cancelled:
            raise UsageError(f"no migration '{id}' is under way")
        if not self.deaf:
            self._cancelled[id].set()
        return self.records[id].to_dict()

    async def resolve(self, emit: Emit, id: str, run_on: str, *, filled: bool = False) -> dict[str, Any]:
        if id not in self.records:
            raise UsageError(f"this node is not the source of a migration {id}")
        if self.refuses_to_stand_down:
            raise Refused("the job runs here already")
        self.asked.append({"resolve": id, "run_on": run_on} | ({"filled": True} if filled else {}))
        return self.records[id].to_dict()

    def _known(self, name: str) -> None:
        if name not in self.containers:
            raise UsageError(f"no container '{name}'", remedy="podferry ps")

    def _move(self, migration_record: MigrationRecord, *, weak: bool) -> None:
        migration_record.enter("pre-copy")
        migration_record.expect(560 * MIB)
        migration_record.extra["tracker"], migration_record.extra["dump"] = "userfaultfd", "memory-skipping"
        migration_record.memory_bytes, migration_record.upper_bytes = 512 * MIB, 3 * MIB
        pages = 131072
        for number in range(1, 5):
            migration_record.add_round(make_round(number, pages))
            migration_record.sent(migration_record.wire_bytes + pages * 4096)
            pages //= 37
        migration_record.add_span("pre-copy", "source", 12, 4650)
        migration_record.add_span("upper layer", "source", 40, 900)
        if weak:
            migration_record.enter("undo")
            error = CommandFailed("failed: runc restore", why="exit status 1", evidence=["<Error> \x1b[31mno pidns"])
            migration_record.end(Outcome.ROLLED_BACK, "the target could not restore it", error)
            return
        migration_record.enter("prepare-target")
        migration_record.add_span("create", "target", 4300, 4810)
        migration_record.enter("cut-over")
        for name, where, start, end in (
            ("freeze", "source", 4812, 4821),
            ("last scan", "source", 4821, 4826),
            ("dump", "source", 4826, 4931),
            ("last pages", "source", 4826, 4861),
            ("images", "source", 4931, 4940),
            ("go", "source", 4940, 4943),
            ("restore", "target", 4943, 5031),
            ("first fault", "target", 5031, 5034),
            ("fill", "target", 5034, 5390),
            ("commit", "source", 5036, 5080),
        ):
            migration_record.add_span(name, where, start, end, detail=f"{name} <done> & well")
        migration_record.enter("resume")
        migration_record.downtime_ms = 222.0
        migration_record.end(Outcome.COMPLETED)
        migration_record.total_ms = 5391.0


def make_round(number: int, pages: int) -> Round:
    """A pre-copy round that sent `pages` pages."""
    seconds = max(0.02, pages / 30000)
    return Round(number=number, pages=pages, bytes=pages * 4096, seconds=seconds, pending_bytes=pages * 111)


def io_uring() -> Refused:
    """A refusal."""
    return Refused("it has io_uring rings", why="CRIU cannot dump them", remedy="set UV_USE_IO_URING=0 for the job")


@contextmanager
def serving(agent: FakeAgent, path: Path) -> Iterator[FakeAgent]:
    """Let `agent` answer at `path`, in a thread."""
    started = threading.Event()
    with start_blocking_portal() as portal:
        scope: list[anyio.CancelScope] = []

        async def main() -> None:
            with anyio.CancelScope() as here:
                scope.append(here)
                await serve(path, agent.ops, started=started.set)

        served = portal.start_task_soon(main)
        assert started.wait(10)
        try:
            yield agent
        finally:
            portal.call(scope[0].cancel)
            served.result(10)
