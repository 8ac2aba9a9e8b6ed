"""The contracts of containers over real ones, with real CRIU and runc."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from contract_cases import RealSourceCase, RealTargetCase
from contracts.source_container import SourceContainerCase, SourceContainerContract
from contracts.target_container import TargetContainerCase, TargetContainerContract
from node_job import Job

from podferry.memory.tracking.tracker import choose, probe

pytestmark = pytest.mark.node


class TestSourceContainer(SourceContainerContract):
    @pytest.fixture
    async def case(self, job: Job, place: Path, anyio_backend: str) -> AsyncIterator[SourceContainerCase]:
        case = RealSourceCase(job, place, choose(probe()).kind)
        yield case
        await case.close()


class TestTargetContainer(TargetContainerContract):
    @pytest.fixture
    async def case(self, job: Job, place: Path, anyio_backend: str) -> AsyncIterator[TargetContainerCase]:
        case = RealTargetCase(job, place, choose(probe()).kind)
        yield case
        await case.close()
