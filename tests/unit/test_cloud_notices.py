"""What clouds say of a machine that goes away, from a small server that answers like their metadata services."""

from __future__ import annotations

import datetime
import json
from collections.abc import AsyncIterator, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import pytest

from podferry.agent import notices
from podferry.kube import clouds
from podferry.kube.api_errors import ApiFailed
from podferry.kube.client import NODES
from podferry.kube.drain import CLOUD_ANNOTATION

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

Json = dict[str, Any]
NOW = datetime.datetime(2026, 11, 30, 12, 0, tzinfo=datetime.UTC)
TOKEN = "AQAE-token"
EC2_SPOT, EC2_EVENTS = "/latest/meta-data/spot/instance-action", "/latest/meta-data/events/maintenance/scheduled"
GCP_PREEMPTED, GCP_MAINTENANCE = (
    "/computeMetadata/v1/instance/preempted",
    "/computeMetadata/v1/instance/maintenance-event",
)
AZURE_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
AZURE_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"


class Metadata(ThreadingHTTPServer):
    """Answers by path, to those who ask as each cloud demands it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.pages: dict[str, str] = {}


class Answers(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        asked = self.path == "/latest/api/token" and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self._say(200 if asked else 400, TOKEN if asked else "")

    def do_GET(self) -> None:
        if not self._demanded():
            return self._say(401 if self.path.startswith("/latest") else 403, "")
        page = self.server.pages.get(self.path)
        return self._say(404 if page is None else 200, page or "")

    def _demanded(self) -> bool:
        if self.path.startswith("/latest"):
            return self.headers.get("X-aws-ec2-metadata-token") == TOKEN
        if self.path.startswith("/computeMetadata"):
            return self.headers.get("Metadata-Flavor") == "Google"
        return self.headers.get("Metadata") == "true"

    def _say(self, code: int, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
async def http(metadata: Metadata, anyio_backend: str) -> AsyncIterator[httpx2.AsyncClient]:
    base = f"http://127.0.0.1:{metadata.server_address[1]}"
    async with clouds.metadata(base) as client:
        yield client


def event(**more: Any) -> Json:
    return {"NotBefore": "30 Nov 2026 12:30:00 GMT", "Code": "system-reboot", "State": "active", **more}


def azure_event(**more: Any) -> Json:
    return {
        "EventId": "1",
        "EventType": "Preempt",
        "ResourceType": "VirtualMachine",
        "Resources": ["mine"],
        "EventStatus": "Scheduled",
        "NotBefore": "Mon, 30 Nov 2026 12:00:30 GMT",
        **more,
    }


def at(minute: int, second: int = 0) -> datetime.datetime:
    return NOW.replace(minute=minute, second=second)


EC2: list[tuple[dict[str, str], datetime.datetime | None]] = [
    ({}, None),
    ({EC2_SPOT: json.dumps({"action": "terminate", "time": "2026-11-30T12:02:00Z"})}, at(2)),
    (
        {EC2_SPOT: json.dumps({"action": "stop", "time": "2026-11-30T12:02:00Z"}), EC2_EVENTS: json.dumps([event()])},
        at(2),
    ),
    ({EC2_EVENTS: json.dumps([event(), event(NotBefore="30 Nov 2026 12:20:00 GMT")])}, at(20)),
    ({EC2_EVENTS: json.dumps([event(State="completed"), event(NotBefore="21 Dec 2026 09:00:43 GMT")])}, None),
    ({EC2_EVENTS: "[]"}, None),
    ({EC2_SPOT: "[]", EC2_EVENTS: "{}"}, None),
    ({EC2_SPOT: "nothing that", EC2_EVENTS: json.dumps(["was", {"State": "active"}])}, None),
]
GCP: list[tuple[dict[str, str], datetime.datetime | None]] = [
    ({GCP_PREEMPTED: "FALSE", GCP_MAINTENANCE: "NONE"}, None),
    ({GCP_PREEMPTED: "TRUE", GCP_MAINTENANCE: "NONE"}, at(0, 25)),
    ({GCP_PREEMPTED: "FALSE", GCP_MAINTENANCE: "TERMINATE_ON_HOST_MAINTENANCE"}, at(1)),
    ({GCP_PREEMPTED: "FALSE", GCP_MAINTENANCE: "MIGRATE_ON_HOST_MAINTENANCE"}, None),
    ({}, None),
]
AZURE: list[tuple[Any, datetime.datetime | None]] = [
    ([], None),
    ([azure_event()], at(0, 30)),
    ([azure_event(EventType="Freeze")], None),
    ([azure_event(Resources=["another"])], None),
    ([azure_event(EventStatus="Started", NotBefore="")], NOW),
    ([azure_event(NotBefore="Tue, 01 Dec 2026 12:00:00 GMT")], None),
    ([azure_event(EventType="Terminate", NotBefore="Mon, 30 Nov 2026 12:05:00 GMT"), azure_event()], at(0, 30)),
    ({"not": "a list"}, None),
]


@pytest.mark.parametrize(("pages", "when"), EC2)
async def test_ec2(metadata: Metadata, http: httpx2.AsyncClient, pages: dict[str, str], when: Any) -> None:
    metadata.pages = pages
    assert await clouds.ec2(http, NOW) == when


@pytest.mark.parametrize(("pages", "when"), GCP)
async def test_gcp(metadata: Metadata, http: httpx2.AsyncClient, pages: dict[str, str], when: Any) -> None:
    metadata.pages = pages
    assert await clouds.gcp(http, NOW) == when


@pytest.mark.parametrize(("events", "when"), AZURE)
async def test_azure(metadata: Metadata, http: httpx2.AsyncClient, events: Any, when: Any) -> None:
    metadata.pages = {AZURE_EVENTS: json.dumps({"DocumentIncarnation": 1, "Events": events}), AZURE_NAME: "mine"}
    assert await clouds.azure(http, NOW) == when


@pytest.mark.parametrize(
    ("vendor", "known"),
    [("Amazon EC2\n", True), ("Google\n", True), ("Microsoft Corporation\n", True), ("QEMU\n", False), (None, False)],
)
async def test_the_firmware_says_which_cloud_it_is(tmp_path: Path, vendor: str | None, known: bool) -> None:
    if vendor is not None:
        (tmp_path / "vendor").write_text(vendor)
    assert (clouds.cloud(tmp_path / "vendor") is not None) == known


class Node:
    """The API server, as far as `Notices` asks it."""

    def __init__(self) -> None:
        self.patches: list[Any] = []
        self.allowed = self.works = True

    async def patch(self, kind: object, name: str, patch: Json, namespace: str = "", *, uid: str | None) -> Json:
        assert (kind, name, uid) == (NODES, "node-a", None)
        if not self.works:
            raise ApiFailed("no", why="not now")
        self.patches.append(patch["metadata"]["annotations"][CLOUD_ANNOTATION])
        return {}

    async def create(self, kind: object, body: Json, namespace: str = "") -> Json:
        return {"status": {"allowed": self.allowed}}


async def test_a_notice_is_said_once_and_taken_back_once(metadata: Metadata, http: httpx2.AsyncClient) -> None:
    node = Node()
    api: Any = node
    said = notices.Notices(api, "node-a", partial(clouds.ec2, http))
    await said.step()
    assert node.patches == [None], "what an earlier agent has said is taken back"
    await said.step()
    assert node.patches == [None]
    metadata.pages = {EC2_SPOT: json.dumps({"action": "terminate", "time": "2026-11-30T12:02:00Z"})}
    node.works = False
    await said.step()
    node.works = True
    await said.step()
    await said.step()
    assert node.patches == [None, "2026-11-30T12:02:00Z"], "it is tried again, and said once"
    metadata.pages = {}
    await said.step()
    assert node.patches[2:] == [None]


async def test_a_cloud_that_says_no_time_is_believed_the_first_time(
    metadata: Metadata, http: httpx2.AsyncClient
) -> None:
    node = Node()
    api: Any = node
    metadata.pages = {GCP_PREEMPTED: "TRUE"}
    said = notices.Notices(api, "node-a", partial(clouds.gcp, http))
    for _ in range(3):
        await said.step()
    assert len(node.patches) == 1


async def test_silence_says_nothing_of_a_node(http: httpx2.AsyncClient, metadata: Metadata) -> None:
    node = Node()
    api: Any = node
    async with clouds.metadata("http://127.0.0.1:9") as nobody:
        await notices.Notices(api, "node-a", partial(clouds.gcp, nobody)).step()
    assert node.patches == []

    async def unauthorised(now: datetime.datetime) -> datetime.datetime | None:
        await clouds._text(http, EC2_SPOT, {})
        return now

    await notices.Notices(api, "node-a", unauthorised).step()
    assert node.patches == []
