"""What whoever watches a Migration may count on of an agent's reports (`podferry.agent.status_reporter`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import anyio
import pytest

from podferry.agent import status_reporter
from podferry.agent.status_reporter import Reporter
from podferry.core.phases import SourcePhase
from podferry.errors import Failed
from podferry.kube import status as store
from podferry.kube.client import MIGRATIONS
from podferry.kube.events import Events
from podferry.kube.migration import Ending, Migration

from . import Contract
from .api_server import ApiServerCase

PATIENCE = 30.0
NAME = "move"


class PlayedHalf(Protocol):
    """The source's half of a migration, as `podferry.workload.pod.cluster_port.PodMigration` with what a test has it do."""

    role: str

    def enter(self, phase: str, **changes: Any) -> None: ...

    def end(self, outcome: str, error: Failed | None = None) -> None: ...


@dataclass
class ReporterCase:
    """An API server, and a half to be told of."""

    server: ApiServerCase
    half: Any

    async def migration(self) -> Migration:
        api, namespace = self.server.api, self.server.namespace
        body = {"metadata": {"name": NAME}, "spec": {"podName": "train"}}
        made = Migration.from_json(await api.create(MIGRATIONS, body, namespace))

        def running(now: Migration) -> bool:
            now.status.phase = now.status.phase.RUNNING
            return True

        return await store.change(api, made, running)

    async def now(self) -> Migration:
        return Migration.from_json(await self.server.api.get(MIGRATIONS, NAME, self.server.namespace))

    async def until(self, holds: Callable[[Migration], bool]) -> Migration:
        with anyio.fail_after(PATIENCE):
            while not holds(now := await self.now()):
                await anyio.sleep(0.03)
        return now

    @asynccontextmanager
    async def reporting(self, seen: Migration | None) -> Any:
        """A reporter at work, which knows the Migration as `seen`; ends when it has returned."""
        api, over = self.server.api, anyio.Event()
        reporter = Reporter(api, Events(api, "podferry-agent", self.server.node), lambda: seen, self.half)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reporter.run, over.set)
            yield over
            with anyio.fail_after(PATIENCE):
                await over.wait()


class StatusReporterContract(Contract):
    """The fixture `reported` is a `ReporterCase`."""

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(status_reporter, "RETRY", 0.2)

    async def test_phases_and_the_end_are_told(self, reported: ReporterCase) -> None:
        async with reported.reporting(await reported.migration()):
            reported.half.enter(SourcePhase.PRECOPY, wire_bytes=500)
            now = await reported.until(
                lambda one: one.status.engine is not None and one.status.engine.source == "pre-copy"
            )
            assert now.status.progress is not None
            assert now.status.progress.bytes == 500
            reported.half.end("rolled-back", Failed("the dump failed"))
        ending = (await reported.now()).status.engine_ending
        assert ending is not None
        assert (ending.outcome, ending.message) == ("rolled-back", "the dump failed")

    @pytest.mark.parametrize("ends", ["while it is away", "before that"])
    async def test_a_server_that_is_away_is_told_when_it_is_back(self, reported: ReporterCase, ends: str) -> None:
        async with reported.reporting(await reported.migration()) as over:
            reported.half.enter(SourcePhase.COMMIT, downtime_ms=100.0)
            reported.server.cut()
            if ends == "while it is away":
                await anyio.sleep(0.5)
            reported.half.end("completed")
            await anyio.sleep(0.7)
            assert not over.is_set(), "nobody has been told yet"
            reported.server.mend()
        status = (await reported.now()).status
        assert status.engine_ending is not None
        assert (status.engine_ending.outcome, status.downtime) == ("completed", "100ms")

    async def test_what_others_write_meanwhile_stays(self, reported: ReporterCase) -> None:
        seen = await reported.migration()
        others = 0
        async with reported.reporting(seen):
            for number in range(10):
                reported.half.enter(SourcePhase.PRECOPY, wire_bytes=number)

                def write(now: Migration, number: int = number) -> bool:
                    now.status.message = f"by the controller, {number}"
                    return True

                await store.change(reported.server.api, await reported.now(), write)
                others = number
                await anyio.sleep(0.05)
            reported.half.end("completed")
        status = (await reported.now()).status
        assert status.message == f"by the controller, {others}"
        assert status.engine_ending is not None

    async def test_one_that_has_ended_is_not_written(self, reported: ReporterCase) -> None:
        """Nothing an agent says afterwards changes what was decided."""
        seen = await reported.migration()

        def over(now: Migration) -> bool:
            now.status.phase = now.status.phase.ROLLED_BACK
            now.status.ending = Ending(outcome="rolled-back", reason="TimedOut", message="decided")
            return True

        decided = await store.change(reported.server.api, seen.model_copy(deep=True), over)
        async with reported.reporting(seen):
            reported.half.enter(SourcePhase.COMMIT, downtime_ms=100.0)
            reported.half.end("completed")
        assert (await reported.now()).metadata["resourceVersion"] == decided.metadata["resourceVersion"]

    @pytest.mark.parametrize("known", [True, False])
    async def test_nobody_waits_to_tell_of_one_that_is_gone(self, reported: ReporterCase, known: bool) -> None:
        seen = await reported.migration()
        await reported.server.api.delete(MIGRATIONS, NAME, reported.server.namespace)
        async with reported.reporting(seen if known else None):
            reported.half.end("completed")
