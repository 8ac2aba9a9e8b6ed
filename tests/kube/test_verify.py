"""`spec.verify`: what must hold on the target before the source's pod is given up, on a fake API server and on the real one."""

from __future__ import annotations

from typing import Any

import pytest

from podferry.kube.api_errors import ApiFailed
from podferry.kube.client import EVENTS, MIGRATIONS, PODS, Json
from podferry.kube.migration import HANDED_OVER, VERIFIED, Migration

from .world import World

pytestmark = pytest.mark.anyio

HTTP = {"http": {"port": 8080, "path": "/healthz"}}


async def resumed(world: World, **verify: Any) -> Json:
    """A move whose job runs on the target. Returns the target pod."""
    await world.pod()
    world.controller()
    await world.migrate(verify={**HTTP, **verify})
    await world.agents_prepare_target()
    await world.agents_resume()
    migration = await world.get()
    assert migration.status.target_pod is not None
    return await world.api.get(PODS, migration.status.target_pod.name, world.namespace)


def said(migration: Migration) -> tuple[str, str]:
    condition = migration.status.condition(VERIFIED)
    assert condition is not None
    return condition.status, condition.reason


async def test_the_target_is_asked_before_the_source_is_given_up(world: World) -> None:
    world.answers = False
    target = await resumed(world, timeout="5m")
    probe = target["spec"]["containers"][0]["startupProbe"]
    assert probe["httpGet"] == {"port": 8080, "path": "/healthz", "scheme": "HTTP"}
    assert probe["failureThreshold"] * probe["periodSeconds"] > 3600, "the kubelet would restart the job"

    await world.reached(lambda one: one.status.phase == "HandingOver")
    waits = await world.api.get(PODS, "train", world.namespace)
    assert waits["metadata"]["uid"] != target["metadata"]["uid"], "the source's pod is there"
    assert not (await world.get()).status.holds(HANDED_OVER)
    assert (await world.get()).status.condition(VERIFIED) is None

    await world.report(target, "Running", {"running": {"startedAt": "2026-01-01T00:00:00Z"}}, ready=True)
    await world.agents_part()
    migration = await world.ended()
    assert (migration.status.phase, said(migration)) == ("Completed", ("True", "Passed"))


async def test_what_does_not_hold_fails_the_move_and_takes_nothing_back(world: World) -> None:
    world.answers = False
    target = await resumed(world, timeout="1s")
    await world.agents_part()
    migration = await world.ended()
    assert (migration.status.phase, said(migration)) == ("Failed", ("False", "NotVerified"))
    assert migration.status.ending is not None
    assert migration.status.ending.reason == "NotVerified"
    assert "cannot go back" in migration.status.ending.message

    async def only_target() -> bool:
        left = (await world.api.list(PODS, world.namespace))[0]
        return [one["metadata"]["uid"] for one in left] == [target["metadata"]["uid"]]

    await world.until(only_target)
    told = (await world.api.list(EVENTS, world.namespace))[0]
    assert "MigrationNotVerified" in {one["reason"] for one in told}


async def test_a_container_that_does_not_move_is_not_asked(world: World) -> None:
    await world.pod()
    world.controller()
    await world.migrate(verify={**HTTP, "container": "other"})
    migration = await world.ended()
    assert migration.status.phase == "Refused"
    assert migration.status.ending is not None
    assert migration.status.ending.reason == "VerifyInvalid"


@pytest.mark.cluster
@pytest.mark.parametrize(
    "verify",
    [
        {},
        {"http": {"port": 1}, "tcp": {"port": 1}},
        {"http": {"port": 0}},
        {"http": {"port": 1, "path": "x"}},
        {"exec": {"command": []}},
        {"tcp": {"port": 1}, "timeout": "soon"},
    ],
)
async def test_the_api_server_takes_one_way_to_ask(real_world: World, verify: Json) -> None:
    with pytest.raises(ApiFailed, match="verify"):
        await real_world.migrate(verify=verify)


@pytest.mark.cluster
async def test_what_is_asked_stays_as_it_was_asked(real_world: World) -> None:
    await real_world.migrate("a", "with", verify=HTTP)
    await real_world.migrate("b", "without")
    for name, other in (("with", None), ("with", {"http": {"port": 9}}), ("without", HTTP)):
        with pytest.raises(ApiFailed, match="verify cannot be"):
            await real_world.patch(MIGRATIONS, name, {"spec": {"verify": other}}, real_world.namespace)
