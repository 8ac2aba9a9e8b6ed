"""The contract of the API server over the fake one and the real one."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
import yaml
from contracts.api_server import ApiServerCase, ApiServerContract

from podferry.kube.client import Api

from .fake import FakeApiServer
from .line import Line
from .world import World


@pytest.mark.unit
class TestFakeApiServer(ApiServerContract):
    @pytest.fixture
    async def case(self, anyio_backend: str) -> AsyncIterator[ApiServerCase]:
        server = FakeApiServer()

        def forget() -> str:
            server.oldest = server.version
            return "1"

        async with httpx2.AsyncClient(transport=server, base_url="http://fake") as http:
            api = Api(http)
            async with World.open(api, "test", fake=server) as world:
                cut, mend = (lambda: server.go(away=True)), (lambda: server.go(away=False))
                yield ApiServerCase(api, world.namespace, world.nodes[0], cut, mend, forget)


@pytest.mark.cluster
class TestRealApiServer(ApiServerContract):
    @pytest.fixture
    async def case(self, control_plane: Path, tmp_path: Path, anyio_backend: str) -> AsyncIterator[ApiServerCase]:
        config = yaml.safe_load(control_plane.read_text())
        cluster = config["clusters"][0]["cluster"]
        async with (
            Line.to(urlsplit(cluster["server"]).port) as line,
            Api.open(control_plane) as direct,
            World.open(direct, f"t-{secrets.token_hex(3)}") as world,
        ):
            cluster["server"] = f"https://127.0.0.1:{line.port}"
            other = tmp_path / "kubeconfig"
            other.write_text(yaml.safe_dump(config))
            async with Api.open(other) as api:
                yield ApiServerCase(api, world.namespace, world.nodes[0], line.cut, line.mend, lambda: "1")
