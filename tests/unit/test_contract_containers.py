"""The contracts of containers over the fakes of the unit tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_fakes import FakeChannel, FakeFrozen, FakePages, FakeSource, FakeTarget, SourceNode, TargetNode
from contracts.source_container import SourceContainerCase, SourceContainerContract
from contracts.target_container import TargetContainerCase, TargetContainerContract

from podferry.engine.journal import Journal, Part

pytestmark = pytest.mark.unit


class FakeSourceCase:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.node, self.journal = SourceNode(), Journal(directory)
        self.container = FakeSource(self.node, Part(self.journal, 0))

    async def works(self) -> None:
        before = self.node.ticks
        self.node.tick()
        assert self.node.ticks == before + 1

    async def stands_still(self) -> None:
        before = self.node.ticks
        self.node.tick()
        assert self.node.ticks == before

    async def take_back(self) -> None:
        assert await self.journal.ledger.unwind(self.node.handlers()) == []

    async def end(self) -> None:
        assert self.node.end_by_itself()

    def spoil_the_dump(self) -> None:
        self.node.spoilt = True

    def residue(self) -> list[str]:
        return self.node.residue()

    def printed(self) -> bytes:
        return self.node.log

    def found_by_another_agent(self) -> Any:
        return FakeFrozen(self.node, Part(Journal(self.directory), 0))


class TestFakeSource(SourceContainerContract):
    @pytest.fixture
    def case(self, tmp_path: Path) -> Iterator[SourceContainerCase]:
        case = FakeSourceCase(tmp_path / "m")
        yield case
        case.journal.close()


class FakeTargetCase:
    def __init__(self, directory: Path) -> None:
        self.directory = directory / "target"
        self.leaving = FakeSourceCase(directory / "source")
        self.source = self.leaving.container
        self.node, self.whole_journal = TargetNode(), Journal(self.directory)
        self.journal = Part(self.whole_journal, 0)
        self.container = FakeTarget(self.node, self.journal)

    async def take_back(self) -> None:
        assert await self.whole_journal.ledger.unwind(self.node.handlers()) == []

    def residue(self) -> list[str]:
        return [*self.node.residue(), *["runs"] * self.node.running]

    async def works(self) -> None:
        assert self.node.executing

    def take_the_name(self) -> Callable[[], bool]:
        self.node.taken = True
        return lambda: self.node.taken

    def kill_wrapper(self) -> None:
        self.node.lose()

    def kill_feeder(self) -> None:
        self.node.daemon = False
        self.node.tell()

    def found_by_another_agent(self) -> Any:
        return FakeTarget(self.node, Part(Journal(self.directory), 0))

    def channel(self) -> FakeChannel:
        return FakeChannel([self.container.daemon_socket()])

    def remote_pages(self) -> FakePages:
        left = self.source.left()
        return FakePages(left.pids, left.runs)  # type: ignore[arg-type]

    def close(self) -> None:
        self.leaving.journal.close()
        self.whole_journal.close()


class TestFakeTarget(TargetContainerContract):
    @pytest.fixture
    def case(self, tmp_path: Path) -> Iterator[TargetContainerCase]:
        case = FakeTargetCase(tmp_path)
        yield case
        case.close()
