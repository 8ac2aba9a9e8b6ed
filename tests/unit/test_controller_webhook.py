"""The eviction webhook's server: real TLS clients ask it, as the API server does."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import anyio.to_thread
import pytest

from podferry.controller import webhook
from podferry.errors import Failed
from podferry.kube.client import Api
from podferry.wire.pki import Authority

pytestmark = [pytest.mark.unit, pytest.mark.anyio]
NAME = "podferry-controller.podferry-system.svc"
PATIENCE = 20.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def server(authority: Authority) -> AsyncIterator[int]:
    async def review(request: dict[str, Any]) -> dict[str, Any]:
        if request["uid"] == "broken":
            raise Failed("the API server is away")
        return {"uid": request["uid"], "allowed": True}

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    webhook.certify(context, authority, NAME)
    async with webhook.serve(review, lambda: webhook.path_of(authority), context, host="127.0.0.1", port=0) as port:
        yield port


@pytest.fixture
def authority() -> Authority:
    return Authority.new()


@pytest.fixture
def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority.to_pem()[0].decode())


class Client(http.client.HTTPSConnection):
    """It connects to this machine, and expects the Service's name in the certificate."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        super().__init__(NAME, port, timeout=PATIENCE, context=context)
        self._trust = context

    def connect(self) -> None:
        self.sock = self._trust.wrap_socket(
            socket.create_connection(("127.0.0.1", self.port), PATIENCE), server_hostname=NAME
        )


def post(port: int, context: ssl.SSLContext, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    client = Client(port, context)
    try:
        client.request("POST", path, body, headers)
        answer = client.getresponse()
        return answer.status, answer.read()
    finally:
        client.close()


def question(uid: str) -> bytes:
    return json.dumps({"request": {"uid": uid}}).encode()


async def ask(
    port: int, context: ssl.SSLContext, path: str, body: bytes, headers: Mapping[str, str] = MappingProxyType({})
) -> tuple[int, bytes]:
    return await anyio.to_thread.run_sync(post, port, context, path, body, headers)


async def test_a_review_is_answered_under_the_name_of_the_service(
    server: int, trusting: ssl.SSLContext, authority: Authority
) -> None:
    status, content = await ask(server, trusting, webhook.path_of(authority) + "?timeout=5s", question("u1"))
    assert status == 200
    assert json.loads(content) == {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "response": {"uid": "u1", "allowed": True},
    }


async def test_a_caller_without_the_secret_path_learns_nothing(server: int, trusting: ssl.SSLContext) -> None:
    other = webhook.path_of(Authority.new())
    assert (await ask(server, trusting, other, question("u1")))[0] == 404
    assert (await ask(server, trusting, "/", question("u1")))[0] == 404


@pytest.mark.parametrize("length", [0, webhook.LARGEST + 1])
async def test_a_request_of_no_size_or_too_large_a_one_is_not_read(
    server: int, trusting: ssl.SSLContext, authority: Authority, length: int
) -> None:
    status, _ = await ask(server, trusting, webhook.path_of(authority), b"", {"Content-Length": str(length)})
    assert status == 413


async def test_a_request_that_is_no_review_gets_an_error(
    server: int, trusting: ssl.SSLContext, authority: Authority
) -> None:
    assert (await ask(server, trusting, webhook.path_of(authority), b"[]"))[0] == 500


async def test_a_review_that_fails_is_an_error_so_that_the_eviction_goes_on(
    server: int, trusting: ssl.SSLContext, authority: Authority
) -> None:
    assert (await ask(server, trusting, webhook.path_of(authority), question("broken")))[0] == 500
    assert (await ask(server, trusting, webhook.path_of(authority), question("u2")))[0] == 200


async def test_a_client_that_trusts_another_authority_does_not_ask(server: int) -> None:
    stranger = ssl.create_default_context(cadata=Authority.new().to_pem()[0].decode())
    with pytest.raises(ssl.SSLCertVerificationError):
        await ask(server, stranger, "/", question("u1"))


async def test_a_client_that_does_not_begin_the_handshake_keeps_no_other_out(
    server: int, trusting: ssl.SSLContext, authority: Authority
) -> None:
    with socket.create_connection(("127.0.0.1", server), PATIENCE):
        assert (await ask(server, trusting, webhook.path_of(authority), question("u1")))[0] == 200


class ConfigurationApi:
    """The webhook's configuration, which may be missing."""

    def __init__(self, found: dict[str, Any] | None) -> None:
        self.found = found
        self.patched: list[tuple[dict[str, Any], str]] = []

    async def find(self, kind: Any, name: str) -> dict[str, Any] | None:
        assert (kind, name) == (webhook.CONFIGURATIONS, webhook.NAME)
        return self.found

    async def patch(self, kind: Any, name: str, patch: dict[str, Any], *, uid: str) -> None:
        self.patched.append((patch, uid))


def configured(**client: Any) -> dict[str, Any]:
    service = {"name": "podferry-controller", "namespace": "podferry-system", "path": "/nobody-knows", "port": 443}
    one = {"name": "evictions.podferry.dev", "failurePolicy": "Ignore", "clientConfig": {"service": service, **client}}
    return {"metadata": {"name": webhook.NAME, "uid": "c1", "resourceVersion": "7"}, "webhooks": [one]}


async def test_without_a_configuration_nothing_is_published(authority: Authority) -> None:
    api = ConfigurationApi(None)
    assert await webhook.publish(cast(Api, api), authority) is False
    assert api.patched == []


async def test_the_path_and_the_authority_are_written_into_the_configuration_that_was_read(
    authority: Authority,
) -> None:
    api = ConfigurationApi(configured())
    assert await webhook.publish(cast(Api, api), authority) is True
    ((patch, uid),) = api.patched
    assert (uid, patch["metadata"]) == ("c1", {"resourceVersion": "7"})
    (one,) = patch["webhooks"]
    assert (one["name"], one["failurePolicy"]) == ("evictions.podferry.dev", "Ignore")
    assert base64.b64decode(one["clientConfig"]["caBundle"]) == authority.to_pem()[0]
    service = {"name": "podferry-controller", "namespace": "podferry-system", "port": 443}
    assert one["clientConfig"]["service"] == {**service, "path": webhook.path_of(authority)}
    api.found = {**configured(), "webhooks": patch["webhooks"]}
    api.patched.clear()
    assert await webhook.publish(cast(Api, api), authority) is True
    assert api.patched == [], "what stands there already is not written again"


async def test_the_server_publishes_again_and_again_and_outlives_an_api_server_that_is_away(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, published, served = [Failed("the API server is away"), authority], list[Authority](), anyio.Event()

    async def found(api: Api, namespace: str) -> Authority:
        one = tries.pop(0) if len(tries) > 1 else tries[0]
        if isinstance(one, Failed):
            raise one
        return one

    async def publish(api: Api, by: Authority) -> bool:
        published.append(by)
        if len(published) == 1:
            raise Failed("the configuration cannot be written now")
        served.set()
        return True

    async def review(request: dict[str, Any]) -> dict[str, Any]:
        return {}

    monkeypatch.setattr(webhook, "authority", found)
    monkeypatch.setattr(webhook, "publish", publish)
    for name in ("RETRY", "PUBLISHED"):
        monkeypatch.setattr(webhook, name, 0.01)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(webhook.answer_evictions, cast(Api, None), "podferry-system", review, port=0))
        with anyio.fail_after(120):
            await served.wait()
        tasks.cancel_scope.cancel()
    assert published[:2] == [authority, authority]


async def test_where_the_port_is_taken_evictions_go_on_unanswered(
    server: int, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def found(api: Api, namespace: str) -> Authority:
        return authority

    async def review(request: dict[str, Any]) -> dict[str, Any]:
        return {}

    monkeypatch.setattr(webhook, "authority", found)
    await webhook.answer_evictions(cast(Api, None), "podferry-system", review, port=server)
