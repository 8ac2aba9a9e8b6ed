"""Evictions become moves, on the real API server: its eviction API, and `kubectl drain` itself."""

from __future__ import annotations

import base64
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import anyio
import httpx2
import pytest
import yaml

from podferry.controller import evictions, webhook
from podferry.controller.evictions import Evictions
from podferry.controller.webhook import CONFIGURATIONS, certify, path_of, publish, serve
from podferry.kube.api_errors import ApiFailed
from podferry.kube.client import MIGRATIONS, NODES, PODS, Json
from podferry.kube.migration import CAUSE_LABEL, DEADLINE_ANNOTATION, Migration
from podferry.wire.pki import Authority

from .real import BINARIES
from .rights import DEPLOY, SYSTEM, apply, as_account
from .test_drain import agents
from .world import World

pytestmark = [pytest.mark.cluster, pytest.mark.anyio]


@dataclass
class Webhook:
    """The server, and what is known of it."""

    world: World
    authority: Authority
    port: int

    async def asked(self) -> None:
        """Wait until the API server asks: a webhook takes effect a moment after it was made. A dry run changes nothing."""
        await self.world.pod("probe")

        async def refused() -> bool:
            return await evict(self.world, "probe", dry=True) == 429

        await self.world.until(refused)
        await self.world.api.delete(PODS, "probe", self.world.namespace, grace=0)


def configuration() -> Json:
    _, body = yaml.safe_load_all((DEPLOY / "evictions" / "evictions.yaml").read_text())
    found: Json = body
    return found


@asynccontextmanager
async def answering(world: World, account: str = "nobody") -> AsyncIterator[Webhook]:
    """deploy/'s webhook, of this namespace alone; the API server reaches us by an address, there is no Service here."""
    authority, context = Authority.new(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certify(context, authority, "podferry-controller.podferry-system.svc", ["127.0.0.1"])
    path, review = path_of(authority), Evictions(world.api, account).review
    async with serve(review, lambda: path, context, host="127.0.0.1", port=0) as port:
        body = configuration()
        body["metadata"]["name"] = world.namespace
        bundle = base64.b64encode(authority.to_pem()[0]).decode()
        for one in body["webhooks"]:
            one["clientConfig"] = {"url": f"https://127.0.0.1:{port}{path}", "caBundle": bundle}
            one["namespaceSelector"] = {"matchLabels": {"kubernetes.io/metadata.name": world.namespace}}
        await world.api.create(CONFIGURATIONS, body)
        try:
            answers = Webhook(world, authority, port)
            await answers.asked()
            yield answers
        finally:
            with anyio.CancelScope(shield=True):
                await world.api.delete(CONFIGURATIONS, world.namespace)


@pytest.fixture
async def world(real_world: World) -> World:
    return real_world


async def evict(world: World, name: str, *, dry: bool = False) -> int:
    """The status that the eviction API answers."""
    body: Json = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": name, "namespace": world.namespace},
        **({"deleteOptions": {"dryRun": ["All"]}} if dry else {}),
    }
    path = PODS.path(world.namespace, name, "eviction")
    try:
        await world.api._call("POST", path, {"dryRun": "All"} if dry else None, body=body, what=f"cannot evict {name}")
    except ApiFailed as refused:
        said.append(refused.why)
        return refused.status
    return 201


said: list[str] = []


async def the_move(world: World) -> Migration:
    found = (await world.api.list(MIGRATIONS, world.namespace))[0]
    (made,) = [Migration.from_json(one) for one in found]
    return made


async def test_an_eviction_begins_a_move_and_waits_for_it(world: World) -> None:
    source = await world.pod(labels={"app": "train"})
    async with answering(world):
        assert not (await world.api.list(MIGRATIONS, world.namespace))[0], "a dry run has no effect"
        assert await evict(world, "train") == 429
        assert "moves to another node instead" in said[-1]
        move = await the_move(world)
        assert (move.spec.pod_name, move.spec.requested_by) == ("train", "admin")
        assert move.metadata["labels"] == {CAUSE_LABEL: "eviction"}
        world.controller()
        await world.reached(lambda one: one.status.phase == "Running", move.name)
        assert await evict(world, "train") == 429
        assert f"Migration {move.name}, Running" in said[-1]
        await world.agents_prepare_target(move.name)
        target = (await world.get(move.name)).status.target_pod
        assert target is not None
        assert await evict(world, target.name) == 429, "it is just arriving"
        await world.agents_resume(move.name)
        await world.agents_part(move.name)
        assert (await world.ended(move.name)).status.phase == "Completed"

        async def gone() -> bool:
            return await evict(world, "train") == 404

        await world.until(gone)
    (left,) = (await world.api.list(PODS, world.namespace))[0]
    assert left["metadata"]["uid"] == target.uid != source["metadata"]["uid"]
    assert left["spec"]["nodeName"] == world.nodes[1]


@pytest.mark.parametrize("why", ["plain", "tied", "by the controller"])
async def test_what_cannot_move_is_evicted_as_ever(world: World, why: str) -> None:
    spec: dict[str, Any] = {"runtimeClassName": None} if why == "plain" else {}
    if why == "tied":
        spec = {"volumes": [{"name": "h", "hostPath": {"path": "/srv"}}]}
    await world.pod(**spec)
    async with answering(world) as answers:
        if why == "by the controller":
            response = await Evictions(world.api, "admin").review(
                {"uid": "u", "namespace": world.namespace, "name": "train", "userInfo": {"username": "admin"}}
            )
            assert response == {"uid": "u", "allowed": True}
            return
        assert await evict(world, "train") == 201
        assert answers.port
    assert not (await world.api.list(MIGRATIONS, world.namespace))[0]


async def test_after_a_failed_move_the_eviction_goes_on(world: World) -> None:
    await world.pod()
    async with answering(world):
        world.controller()
        assert await evict(world, "train") == 429
        move = await the_move(world)
        await world.reached(lambda one: one.status.phase == "Running", move.name)
        await world.agents_end("rolled-back", move.name, "Engine", "the link broke")
        await world.ended(move.name)
        assert await evict(world, "train") == 201


async def test_after_the_deadline_the_eviction_goes_on(world: World) -> None:
    await world.pod()
    wish = {"metadata": {"annotations": {DEADLINE_ANNOTATION: "1ms"}}}
    async with answering(world):
        assert await evict(world, "train") == 429
        await world.patch(PODS, "train", wish, world.namespace)

        async def passes() -> bool:
            return await evict(world, "train") == 201

        await world.until(passes)


async def test_where_nobody_answers_the_eviction_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.pod()

    async def broken(self: Evictions, request: Json) -> Json:
        raise ApiFailed("the API server is away")

    async with answering(world):
        monkeypatch.setattr(evictions.Evictions, "_answer", broken)
        assert await evict(world, "train") == 201


async def test_who_does_not_know_the_path_has_nothing_moved(world: World) -> None:
    await world.pod()
    request = {
        "uid": "u",
        "namespace": world.namespace,
        "name": "train",
        "userInfo": {"username": "system:admin"},
    }
    async with answering(world) as answers, httpx2.AsyncClient(verify=False) as http:
        for path in ("/", "/evictions", "/evictions/", f"/evictions/{'0' * 64}"):
            answer = await http.post(f"https://127.0.0.1:{answers.port}{path}", json={"request": request})
            assert answer.status_code == 404
        url = f"https://127.0.0.1:{answers.port}{path_of(answers.authority)}"
        with suppress(httpx2.HTTPError):  # it may hang up before all has come
            large = await http.post(url, content=b" " * (webhook.LARGEST + 1))
            assert large.status_code == 413
        for body in (b"", b"{}", b"[]", b'{"request": 1}', b'{"request": {"uid": "u"}}'):
            assert (await http.post(url, content=body)).status_code in (413, 500)
        assert (await http.post(url, json={"request": {**request, "name": "none"}})).json()["response"]["allowed"]
    assert not (await world.api.list(MIGRATIONS, world.namespace))[0]


async def test_the_api_server_is_told_the_path_and_the_authority(world: World) -> None:
    authority = Authority.new()
    assert not await publish(world.api, authority)
    await world.api.create(CONFIGURATIONS, {**configuration(), "webhooks": _elsewhere()})
    world.also.append((CONFIGURATIONS, webhook.NAME))
    assert await publish(world.api, authority)
    (one,) = (await world.api.get(CONFIGURATIONS, webhook.NAME))["webhooks"]
    assert one["clientConfig"]["service"]["path"] == path_of(authority)
    assert base64.b64decode(one["clientConfig"]["caBundle"]) == authority.to_pem()[0]
    assert path_of(authority) != path_of(Authority.new())
    assert one["failurePolicy"] == "Ignore"


def _elsewhere() -> list[Json]:
    """Of no namespace that there is: the other tests' evictions are not asked about."""
    (one,) = configuration()["webhooks"]
    return [{**one, "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "none"}}}]


async def test_kubectl_drain_moves_pods(world: World, control_plane: Path) -> None:
    """It asks for each pod until that has gone: those that can move lose nothing, the others are evicted."""
    if not (BINARIES / "kubectl").exists():
        pytest.skip(f"needs kubectl in {BINARIES}")
    for number in range(3):
        await world.pod(f"train-{number}", labels={"app": "train"})
    await world.pod("tied", volumes=[{"name": "h", "hostPath": {"path": "/srv"}}])
    node = world.nodes[0]
    async with answering(world):
        world.controller()
        world.tasks.start_soon(agents, world, set[str]())
        argv = [BINARIES / "kubectl", "drain", node, "--force", "--ignore-daemonsets", "--timeout=90s"]
        environment = {**os.environ, "KUBECONFIG": str(control_plane)}
        ran = await anyio.run_process(
            [str(one) for one in argv], env=environment, check=False, stdout=PIPE, stderr=STDOUT
        )
    shown = ran.stdout.decode()
    assert ran.returncode == 0, shown
    assert "moves to another node" in shown
    left = (await world.api.list(PODS, world.namespace))[0]
    assert {one["spec"]["nodeName"] for one in left} == {world.nodes[1]}
    assert [one["metadata"]["labels"] for one in left] == [{"app": "train"}] * 3
    moved = [Migration.from_json(one) for one in (await world.api.list(MIGRATIONS, world.namespace))[0]]
    assert {one.status.phase for one in moved} == {"Completed"}
    assert (await world.api.get(NODES, node))["spec"]["unschedulable"] is True


async def test_the_controller_serves_by_its_own_rights_and_under_its_services_name(
    world: World, control_plane: Path
) -> None:
    await apply(world.api)
    await world.api.create(CONFIGURATIONS, {**configuration(), "webhooks": _elsewhere()})
    world.also.append((CONFIGURATIONS, webhook.NAME))
    await world.pod()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    async with (
        as_account(world, control_plane, "podferry-controller", None) as api,
        anyio.create_task_group() as tasks,
    ):
        review = Evictions(api, "nobody").review
        tasks.start_soon(partial(webhook.answer_evictions, api, SYSTEM, review, port=port))

        async def published() -> bool:
            (one,) = (await world.api.get(CONFIGURATIONS, webhook.NAME))["webhooks"]
            return "caBundle" in one["clientConfig"]

        await world.until(published)
        (one,) = (await world.api.get(CONFIGURATIONS, webhook.NAME))["webhooks"]
        client = one["clientConfig"]
        trusted = ssl.create_default_context(cadata=base64.b64decode(client["caBundle"]).decode())
        name = f"{client['service']['name']}.{client['service']['namespace']}.svc"
        request = {"uid": "u", "namespace": world.namespace, "name": "train", "userInfo": {"username": "somebody"}}
        async with httpx2.AsyncClient(verify=trusted) as http:
            url = f"https://127.0.0.1:{port}{client['service']['path']}"
            answer = await http.post(url, json={"request": request}, extensions={"sni_hostname": name})
        assert answer.json()["response"]["status"]["code"] == 429
        assert (await the_move(world)).spec.requested_by == "somebody"
        tasks.cancel_scope.cancel()
