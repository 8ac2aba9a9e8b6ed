"""MigrationPolicies, on a fake API server and on the real one: which applies, what it changes and forbids, who sees that."""

from __future__ import annotations

import anyio
import pytest

from podferry.cli.kubectl_preview import look
from podferry.controller.evictions import Evictions
from podferry.controller.policies import Policies
from podferry.kube.api_errors import ApiFailed
from podferry.kube.client import MIGRATION_POLICIES, MIGRATIONS, NAMESPACES, NODE_DRAINS, Json
from podferry.kube.drain import NodeDrain
from podferry.kube.migration import ELIGIBLE, QUEUED, Migration

from .world import World

pytestmark = pytest.mark.anyio


async def policy(world: World, name: str, labels: Json | None = None, **spec: object) -> str:
    """A policy of this namespace's pods alone, or of those with `labels`, that goes with the world."""
    name = f"{world.namespace}-{name}"
    await world.patch(NAMESPACES, world.namespace, {"metadata": {"labels": {"of": world.namespace}}})
    selectors = {
        "namespaceSelector": {"matchLabels": {"of": world.namespace}},
        **({"podSelector": {"matchLabels": labels}} if labels else {}),
    }
    await world.api.create(MIGRATION_POLICIES, {"metadata": {"name": name}, "spec": {**selectors, **spec}})
    world.also.append((MIGRATION_POLICIES, name))
    return name


async def test_the_most_specific_policy_settles_how_a_pod_moves(world: World) -> None:
    await policy(world, "all", modes=["stop"], timeout="3h")
    name = await policy(
        world, "train", {"app": "train"}, maxDowntime="300ms", allowPostCopy=True, ttlSecondsAfterFinished=0
    )
    pod = await world.pod(labels={"app": "train"})
    assert (await Policies(world.api).of(pod)).name == name
    world.controller()
    await world.migrate(maxDowntime="2s")
    running = await world.reached(lambda one: one.status.phase == "Running")
    settings = running.status.settings
    assert settings is not None
    assert (settings.policy, settings.mode, settings.max_downtime, settings.allow_post_copy, settings.timeout) == (
        name,
        "live",
        "300ms",
        True,
        "1h",
    )
    assert running.spec.mode is None
    await world.agents_move()

    async def gone() -> bool:
        return await world.api.find(MIGRATIONS, "move", world.namespace) is None

    await world.until(gone)


async def test_a_pod_that_may_not_move_is_refused_in_words(world: World) -> None:
    name = await policy(world, "fixed", movable=False)
    await world.pod()
    world.controller()
    await world.migrate()
    ended = await world.ended()
    said = ended.status.condition(ELIGIBLE)
    assert said is not None
    assert (ended.status.phase, said.reason) == ("Refused", "ForbiddenByPolicy")
    assert name in said.message
    assert ended.status.settings is not None
    assert ended.status.settings.policy == name
    await world.api.delete(MIGRATION_POLICIES, name)
    world.also.remove((MIGRATION_POLICIES, name))

    async def forgotten() -> bool:
        """A controller sees it go a moment later."""
        await world.api.delete(MIGRATIONS, "move", world.namespace)
        await world.migrate()
        return (await world.reached(lambda one: one.status.phase != "Pending")).status.phase != "Refused"

    await world.until(forgotten)


async def test_a_policys_limit_holds_until_it_is_changed(world: World) -> None:
    name = await policy(world, "slow", parallelPerNode=1, bandwidthPerNode="10M")
    for one in ("first", "second"):
        await world.pod(one)
    world.controller()
    for one in ("first", "second"):
        await world.migrate(one, f"move-{one}")

    async def one_waits() -> bool:
        moves = [await world.get(f"move-{one}") for one in ("first", "second")]
        return sorted(one.status.phase == "Running" for one in moves) == [False, True] and any(
            (said := one.status.condition(QUEUED)) is not None and said.reason == "PolicyBusy" for one in moves
        )

    await world.until(one_waits)
    await world.patch(MIGRATION_POLICIES, name, {"spec": {"parallelPerNode": 2}})

    async def both() -> bool:
        return all([(await world.get(f"move-{one}")).status.phase == "Running" for one in ("first", "second")])

    await world.until(both)
    bandwidths = [(await world.get(f"move-{one}")).settings.bandwidth for one in ("first", "second")]
    assert sorted(map(str, bandwidths)) == ["10000000", "5000000"]


async def test_a_drain_leaves_what_a_policy_holds_and_a_dry_run_says_so(world: World) -> None:
    name = await policy(world, "fixed", {"app": "fixed"}, movable=False)
    other = await policy(world, "rest", allowPostCopy=False)
    node = world.nodes[0]
    await world.pod("held", labels={"app": "fixed"})
    rows = [one for one in await look(world.api, node, evict_others=False) if one["namespace"] == world.namespace]
    assert [(one["action"], one["policy"]) for one in rows] == [("leave", name)]
    assert name in rows[0]["refusals"][0]["what"]
    await world.pod("train")
    world.controller()
    await world.api.create(NODE_DRAINS, {"metadata": {"name": node}, "spec": {"allowPostCopy": True}})
    world.also.append((NODE_DRAINS, node))

    async def over() -> bool:
        return NodeDrain.from_json(await world.api.get(NODE_DRAINS, node)).ended

    await world.until(over)
    pods = {one.name: one for one in NodeDrain.from_json(await world.api.get(NODE_DRAINS, node)).status.pods}
    assert {one.state for one in pods.values()} == {"Left"}
    assert name in pods["held"].message
    assert other in pods["train"].message
    assert not (await world.api.list(MIGRATIONS, world.namespace))[0], "none is asked for that would be refused"


async def test_an_eviction_waits_no_longer_than_the_policy_says(world: World) -> None:
    name = await policy(world, "short", evictionDeadline="7m", timeout="5m")
    await world.pod()
    evictions = Evictions(world.api, "nobody")
    request = {"uid": "u", "namespace": world.namespace, "name": "train", "userInfo": {"username": "admin"}}
    assert not (await evictions.review(request))["allowed"]
    (made,) = [Migration.from_json(one) for one in (await world.api.list(MIGRATIONS, world.namespace))[0]]
    assert made.spec.timeout == "7m"
    await world.api.delete(MIGRATIONS, made.name, world.namespace)
    await world.patch(MIGRATION_POLICIES, name, {"spec": {"movable": False}})
    answer = await evictions.review(request)
    assert answer["allowed"]
    assert name in answer["warnings"][0]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"bandwidthPerNode": "1G"}, "parallelPerNode"),
        ({"modes": ["teleport"]}, "modes"),
        ({"maxDowntime": "5"}, "maxDowntime"),
        ({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Like"}]}}, "operator"),
        ({"podAnnotations": ["wish"]}, "podAnnotations"),
    ],
)
@pytest.mark.cluster
async def test_the_api_server_takes_no_policy_that_means_nothing(real_world: World, spec: Json, why: str) -> None:
    with pytest.raises(ApiFailed) as refused:
        await real_world.api.create(
            MIGRATION_POLICIES, {"metadata": {"name": f"{real_world.namespace}-x"}, "spec": spec}
        )
    assert why in refused.value.why
    await anyio.sleep(0)
