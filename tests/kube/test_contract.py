"""The contracts of the API server, and of what an agent reports to it, over the fake one and the real one."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from contracts.api_server import ApiServerCase, ApiServerContract
from contracts.status_reporter import ReporterCase, StatusReporterContract

from podferry.kube.client import Api
from podferry.workload.pod.cluster_port import PodName

from .conftest import fake_line, real_line
from .engine import Half
from .world import World


@pytest.fixture
def reported(case: ApiServerCase) -> ReporterCase:
    """The source's half, played."""
    return ReporterCase(case, Half("id", "source", PodName(case.namespace, "train", "uid")))


@pytest.mark.unit
class TestFakeApiServer(ApiServerContract, StatusReporterContract):
    @pytest.fixture
    async def case(self, anyio_backend: str) -> AsyncIterator[ApiServerCase]:
        async with fake_line() as (api, server, cut, mend), World.open(api, "test", fake=server) as world:

            def forget() -> str:
                server.oldest = server.version
                return "1"

            yield ApiServerCase(api, world.namespace, world.nodes[0], cut, mend, forget)


@pytest.mark.cluster
class TestRealApiServer(ApiServerContract, StatusReporterContract):
    @pytest.fixture
    async def case(self, control_plane: Path, tmp_path: Path, anyio_backend: str) -> AsyncIterator[ApiServerCase]:
        async with (
            real_line(control_plane, tmp_path) as (api, cut, mend),
            Api.open(control_plane) as direct,
            World.open(direct, f"t-{secrets.token_hex(3)}") as world,
        ):
            yield ApiServerCase(api, world.namespace, world.nodes[0], cut, mend, lambda: "1")
