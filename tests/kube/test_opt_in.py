"""Opting in by a label, and what is said on each pod that opted in, on a fake API server and on the real one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml

from podferry.controller.movability import MOVABLE, OPT_IN, Movability, OptedIn
from podferry.kube.api_errors import Forbidden
from podferry.kube.client import EVENTS, MERGE, MIGRATION_POLICIES, NAMESPACES, PODS, Api, Json

from .rights import DEPLOY, KINDS, apply, as_account
from .world import World

pytestmark = pytest.mark.anyio


async def condition(world: World, name: str) -> Json | None:
    pod = await world.api.get(PODS, name, world.namespace)
    return next((one for one in pod["status"].get("conditions") or [] if one["type"] == MOVABLE), None)


async def test_each_pod_that_opted_in_says_whether_it_can_move(world: World) -> None:
    await world.pod()
    await world.pod("tied", volumes=[{"name": "h", "hostPath": {"path": "/srv"}}])
    await world.pod("plain", runtimeClassName=None)
    look = Movability(world.api)
    await look.sweep()
    train, tied = await condition(world, "train"), await condition(world, "tied")
    assert train is not None
    assert tied is not None
    assert (train["status"], train["reason"]) == ("True", "NothingInTheWay")
    assert (tied["status"], tied["reason"], "/srv" in tied["message"]) == ("False", "HostPath", True)
    assert await condition(world, "plain") is None
    ready = next(
        one
        for one in (await world.api.get(PODS, "train", world.namespace))["status"]["conditions"]
        if one["type"] == "Ready"
    )
    assert ready["status"] == "True", "what the kubelet says stays"
    before = (await world.api.get(PODS, "train", world.namespace))["metadata"]["resourceVersion"]
    await look.sweep()
    assert (await world.api.get(PODS, "train", world.namespace))["metadata"]["resourceVersion"] == before
    assert look.counted[OptedIn.MOVABLE] >= 1
    assert look.counted[OptedIn.HELD] >= 1

    name = f"{world.namespace}-fixed"
    labels = {"of": world.namespace}
    await world.patch(NAMESPACES, world.namespace, {"metadata": {"labels": labels}})
    spec = {"namespaceSelector": {"matchLabels": labels}, "movable": False}
    await world.api.create(MIGRATION_POLICIES, {"metadata": {"name": name}, "spec": spec})
    world.also.append((MIGRATION_POLICIES, name))
    await look.sweep()
    train = await condition(world, "train")
    assert train is not None
    assert (train["status"], train["reason"]) == ("False", "ForbiddenByPolicy")


async def test_a_pod_that_asked_and_was_missed_is_told_once_and_counted(world: World) -> None:
    await world.patch(NAMESPACES, world.namespace, {"metadata": {"labels": {OPT_IN: "true"}}})
    await world.pod("missed", runtimeClassName=None)
    await world.pod("out", labels={OPT_IN: "false"}, runtimeClassName=None)
    look = Movability(world.api)
    await look.sweep()
    first = look.counted[OptedIn.MISSED]
    await look.sweep()
    events = [one for one in (await world.api.list(EVENTS, world.namespace))[0] if one["reason"] == "NotOptedIn"]
    assert [one["regarding"]["name"] for one in events] == ["missed"]
    assert first == look.counted[OptedIn.MISSED] >= 1


@asynccontextmanager
async def opting_in(world: World) -> AsyncIterator[None]:
    """deploy/opt-in, in effect."""
    for body in yaml.safe_load_all((DEPLOY / "opt-in" / "opt-in.yaml").read_text()):
        await world.api.create(KINDS[body["kind"]], body)
        world.also.append((KINDS[body["kind"]], body["metadata"]["name"]))

    async def in_effect() -> bool:
        return await runtime_of(world, labels={OPT_IN: "true"}) == "podferry"

    await world.until(in_effect)
    yield


async def runtime_of(world: World, labels: Json | None = None, **about: object) -> str | None:
    """The RuntimeClass with which a pod would be made."""
    owners = about.pop("owners", None)
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "tried", "labels": labels or {}, **({"ownerReferences": owners} if owners else {})},
        "spec": {"containers": [{"name": "main", "image": "x"}], **about},
    }
    path = PODS.path(world.namespace)
    made = await world.api._call("POST", path, {"dryRun": "All"}, body=body, what="cannot try")
    found: str | None = made["spec"].get("runtimeClassName")
    return found


@pytest.mark.cluster
async def test_a_label_on_pod_or_namespace_sets_the_runtime_class(real_world: World) -> None:
    world = real_world
    asks = {OPT_IN: "true"}
    async with opting_in(world):
        assert await runtime_of(world) is None
        assert await runtime_of(world, {OPT_IN: "false"}) is None
        others: dict[str, Json] = {
            "another runtime": {"runtimeClassName": "podferry"},
            "host network": {"hostNetwork": True},
            "host path": {"volumes": [{"name": "h", "hostPath": {"path": "/srv"}}]},
            "one process namespace": {"shareProcessNamespace": True},
            "privileged": {"containers": [{"name": "x", "image": "x", "securityContext": {"privileged": True}}]},
            "devices": {"containers": [{"name": "x", "image": "x", "resources": {"limits": {"example.com/gpu": "1"}}}]},
            "a DaemonSet": {
                "owners": [{"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "d", "uid": "u", "controller": True}]
            },
        }
        found = {name: await runtime_of(world, asks, **about) for name, about in others.items()}
        assert found == {name: "podferry" if name == "another runtime" else None for name in others}
        limits = {"resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}
        assert await runtime_of(world, asks, containers=[{"name": "x", "image": "x", **limits}]) == "podferry"
        await world.patch(NAMESPACES, world.namespace, {"metadata": {"labels": asks}})

        async def of_namespace() -> bool:
            return await runtime_of(world) == "podferry"

        await world.until(of_namespace)
        assert await runtime_of(world, {OPT_IN: "false"}) is None


@pytest.mark.cluster
async def test_the_controller_may_say_it_of_any_pod_that_opted_in_and_nothing_else(
    real_world: World, control_plane: Path
) -> None:
    world = real_world
    await apply(world.api)
    await world.pod()
    async with as_account(world, control_plane, "podferry-controller", None) as api:

        async def held() -> bool:
            """A policy takes effect a moment after it was made."""
            try:
                await change(api, world, [{"type": "Ready", "status": "False"}])
            except Forbidden:
                return True
            return False

        await world.until(held)
        await Movability(api).sweep()
        said = await condition(world, "train")
        assert said is not None
        assert said["status"] == "True"


async def change(api: Api, world: World, conditions: list[Json]) -> None:
    """Try to write a pod's conditions."""
    path = PODS.path(world.namespace, "train", "status")
    body = {"status": {"conditions": conditions}}
    headers = {"Content-Type": MERGE}
    await api._call("PATCH", path, {"dryRun": "All"}, body=body, headers=headers, what="cannot change")
