"""The HTTPS server that the API server asks about evictions.

Its certificate is of podferry's own authority, for a day, and made anew each hour. Who asks is known by the path: a word that
follows from the authority's key, which the controller writes into the webhook's configuration, and which only cluster
administrators can read there. Without it anybody who reaches the port could have pods moved, in any name.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import ssl
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import structlog
from anyio.from_thread import BlockingPortal
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from podferry.controller.signer import authority
from podferry.errors import PodferryError
from podferry.kube.client import Api, ResourceKind
from podferry.wire.few_at_once import FewAtOnce
from podferry.wire.pki import Authority

Json = dict[str, Any]
Review = Callable[[Json], Awaitable[Json]]

CONFIGURATIONS = ResourceKind(
    "admissionregistration.k8s.io/v1",
    "ValidatingWebhookConfiguration",
    "validatingwebhookconfigurations",
    namespaced=False,
)
NAME = "podferry-evictions"
PORT = 9443
LIFE, RENEWED = timedelta(days=1), 3600.0
PUBLISHED, RETRY = 10.0, 5.0
"""Seconds after which the webhook's configuration is looked at again: somebody may have applied it anew."""
LARGEST = 1 << 20
PATIENCE, AT_ONCE = 10.0, 32
"""Seconds for a request to come, and requests at once: what is more is turned away, and its eviction goes on."""


def path_of(authority: Authority) -> str:
    """The path that only the API server knows."""
    key = authority.key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return f"/evictions/{hmac.new(key, b'podferry evictions', hashlib.sha256).hexdigest()}"


def certify(context: ssl.SSLContext, authority: Authority, name: str, addresses: Sequence[str] = ()) -> None:
    """Have the server show a new certificate for `name`."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority.certify(name, addresses, key.public_key(), not_after=datetime.now(UTC) + LIFE)
    pem = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with tempfile.NamedTemporaryFile(dir=_memory()) as file:  # ssl reads files alone
        file.write(pem)
        file.flush()
        context.load_cert_chain(file.name)


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@asynccontextmanager
async def serve(
    review: Review, path: Callable[[], str], context: ssl.SSLContext, *, host: str = "", port: int = PORT
) -> AsyncIterator[int]:
    """Answer reviews while the context lasts. Yields the port."""

    class Handler(BaseHTTPRequestHandler):
        timeout = PATIENCE

        def do_POST(self) -> None:
            """One review."""
            length = int(self.headers.get("Content-Length") or 0)
            if not hmac.compare_digest(self.path.partition("?")[0].encode(), path().encode()):
                self.send_error(404)
            elif not 0 < length <= LARGEST:
                self.send_error(413)
            else:
                self._answer(self.rfile.read(length))

        def _answer(self, body: bytes) -> None:
            try:
                request = json.loads(body)["request"]
                response = portal.call(review, request)
            except (PodferryError, ValueError, KeyError, TypeError) as error:
                structlog.get_logger().warning("an eviction is not answered, and goes on", error=str(error))
                self.send_error(500)
                return
            answer = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: what matters is logged where it is decided."""

    server = _Server((host, port), Handler, context)  # out here, where an error is not wrapped into a group of errors
    async with BlockingPortal() as portal:
        thread = threading.Thread(target=server.serve_forever, name="evictions", daemon=True)
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(server.shutdown)
            server.server_close()


class _Server(FewAtOnce, ThreadingHTTPServer):
    """The handshake is done in the connection's own thread: a silent client holds up no other."""

    daemon_threads, block_on_close = True, False
    at_once = AT_ONCE

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], context: ssl.SSLContext
    ) -> None:
        super().__init__(address, handler)
        self._context = context

    def answer(self, request: Any, client_address: Any) -> None:
        """The handshake first."""
        try:
            request.settimeout(PATIENCE)
            secured = self._context.wrap_socket(request, server_side=True)
        except (OSError, ValueError):
            self.shutdown_request(request)
        else:
            super().answer(secured, client_address)


async def publish(api: Api, authority: Authority) -> bool:
    """Write the path, and by what the server is known, into the webhook's configuration. False where there is none."""
    found = await api.find(CONFIGURATIONS, NAME)
    if found is None:
        return False
    pem, _ = authority.to_pem()
    bundle, path = base64.b64encode(pem).decode(), path_of(authority)
    wanted = [
        {
            **one,
            "clientConfig": {
                **one["clientConfig"],
                "caBundle": bundle,
                "service": {**one["clientConfig"]["service"], "path": path},
            },
        }
        for one in found.get("webhooks") or []
    ]
    if wanted != found.get("webhooks"):
        patch = {"metadata": {"resourceVersion": found["metadata"]["resourceVersion"]}, "webhooks": wanted}
        await api.patch(CONFIGURATIONS, NAME, patch, uid=found["metadata"]["uid"])
    return True


async def answer_evictions(api: Api, namespace: str, review: Review, *, port: int = PORT) -> None:
    """Serve for ever, with the authority that is in the cluster. Where the port is taken, evictions go on unanswered."""
    context, name, log = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        f"podferry-controller.{namespace}.svc",
        structlog.get_logger(),
    )
    found, certified = await _authority(api, namespace), 0.0
    certify(context, found, name)
    try:
        async with serve(review, lambda: path_of(found), context, port=port):
            while True:
                if anyio.current_time() - certified > RENEWED:
                    found, certified = await _authority(api, namespace), anyio.current_time()
                    certify(context, found, name)
                try:
                    await publish(api, found)
                except PodferryError as error:
                    log.warning("the webhook's configuration cannot be written now", error=str(error))
                await anyio.sleep(PUBLISHED)
    except OSError as error:
        log.error("evictions are not answered", port=port, error=str(error))


async def _authority(api: Api, namespace: str) -> Authority:
    while True:
        try:
            return await authority(api, namespace)
        except PodferryError as error:
            structlog.get_logger().warning("the authority cannot be read now", error=str(error))
            await anyio.sleep(RETRY)
