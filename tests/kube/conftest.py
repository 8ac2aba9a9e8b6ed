"""The same test bodies on a fake API server and on the real one (marker `cluster`)."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
import yaml

from podferry.kube.client import Api

from . import real
from .fake import FakeApiServer
from .line import Line
from .world import World

Cut = Callable[[], None]


@pytest.fixture(scope="package")
def control_plane() -> Iterator[Path]:
    """A real control plane's kubeconfig."""
    if why := real.missing():
        pytest.skip(f"needs a real control plane: {why}")
    with real.control_plane() as kubeconfig:
        yield kubeconfig


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=[pytest.param("fake", marks=pytest.mark.unit), pytest.param("real", marks=pytest.mark.cluster)])
async def world(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[World]:
    """A namespace of its own on either API server, with two nodes whose kubelets the test plays."""
    if request.param == "fake":
        server = FakeApiServer()
        async with (
            httpx2.AsyncClient(transport=server, base_url="http://fake") as http,
            World.open(Api(http), f"t-{secrets.token_hex(3)}", fake=server) as world,
        ):
            yield world
        return
    kubeconfig = request.getfixturevalue("control_plane")
    async with Api.open(kubeconfig) as api, World.open(api, f"t-{secrets.token_hex(3)}") as world:
        yield world


@pytest.fixture
async def real_world(control_plane: Path, anyio_backend: str) -> AsyncIterator[World]:
    """The real one, for what only real controllers show."""
    async with Api.open(control_plane) as api, World.open(api, f"t-{secrets.token_hex(3)}") as world:
        yield world


@asynccontextmanager
async def fake_line() -> AsyncIterator[tuple[Api, FakeApiServer, Cut, Cut]]:
    """The fake API server, and how it goes away and comes back."""
    server = FakeApiServer()
    async with httpx2.AsyncClient(transport=server, base_url="http://fake") as http:
        yield Api(http), server, (lambda: server.go(away=True)), (lambda: server.go(away=False))


@asynccontextmanager
async def real_line(control_plane: Path, directory: Path) -> AsyncIterator[tuple[Api, Cut, Cut]]:
    """The real one, by a line that can be cut and mended."""
    config = yaml.safe_load(control_plane.read_text())
    cluster = config["clusters"][0]["cluster"]
    async with Line.to(urlsplit(cluster["server"]).port) as line:
        cluster["server"] = f"https://127.0.0.1:{line.port}"
        kubeconfig = directory / "kubeconfig"
        kubeconfig.write_text(yaml.safe_dump(config))
        async with Api.open(kubeconfig) as api:
            yield api, line.cut, line.mend
