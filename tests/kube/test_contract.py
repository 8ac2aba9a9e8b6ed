"""The contract of the API server over the fake one and the real one."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from contracts.api_server import ApiServerCase, ApiServerContract

from podferry.kube.client import Api

from .conftest import fake_line, real_line
from .world import World


@pytest.mark.unit
class TestFakeApiServer(ApiServerContract):
    @pytest.fixture
    async def case(self, anyio_backend: str) -> AsyncIterator[ApiServerCase]:
        async with fake_line() as (api, server, cut, mend), World.open(api, "test", fake=server) as world:

            def forget() -> str:
                server.oldest = server.version
                return "1"

            yield ApiServerCase(api, world.namespace, world.nodes[0], cut, mend, forget)


@pytest.mark.cluster
class TestRealApiServer(ApiServerContract):
    @pytest.fixture
    async def case(self, control_plane: Path, tmp_path: Path, anyio_backend: str) -> AsyncIterator[ApiServerCase]:
        async with (
            real_line(control_plane, tmp_path) as (api, cut, mend),
            Api.open(control_plane) as direct,
            World.open(direct, f"t-{secrets.token_hex(3)}") as world,
        ):
            yield ApiServerCase(api, world.namespace, world.nodes[0], cut, mend, lambda: "1")
