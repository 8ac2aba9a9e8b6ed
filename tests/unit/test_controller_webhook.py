"""The eviction webhook's server: real TLS clients ask it, as the API server does."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Any

import anyio.to_thread
import pytest

from podferry.controller import webhook
from podferry.errors import Failed
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
