"""What the controller answers to one eviction: which go on, which become a move, and what the user is told."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import generate_latest

from podferry.controller.evictions import DEADLINE, EVICTION, KEPT, Evictions, deadline_of
from podferry.controller.metrics import ControllerMetrics
from podferry.controller.pods import TARGET
from podferry.controller.policies import AppliedPolicy
from podferry.kube.client import MIGRATIONS, PODS, Json
from podferry.kube.migration import (
    CAUSE_LABEL,
    DEADLINE_ANNOTATION,
    NAME_ANNOTATION,
    ROLE_LABEL,
    UID_LABEL,
    Ending,
    Migration,
    MigrationPhase,
    MigrationProgress,
    PodReference,
)

from .world import World

pytestmark = pytest.mark.anyio
OWN = "system:serviceaccount:podferry-system:podferry-controller"
TIED = {"volumes": [{"name": "h", "hostPath": {"path": "/srv"}}]}


async def ask(world: World, name: str = "train", *, user: str = "admin", dry: bool = False) -> Json:
    request = {"uid": "r1", "namespace": world.namespace, "name": name, "userInfo": {"username": user}, "dryRun": dry}
    return await Evictions(world.api, OWN).review(request)


def warned(response: Json) -> str:
    """The eviction goes on, and this is said to whoever asked for it."""
    assert response["allowed"] is True
    assert response["uid"] == "r1"
    return str(*response.get("warnings", []))


async def moves(world: World) -> list[Migration]:
    return [Migration.from_json(one) for one in (await world.api.list(MIGRATIONS, world.namespace))[0]]


async def evicted(world: World, **status: Any) -> Migration:
    """A pod whose eviction has become a move, which has come so far."""
    pod = await world.pod()
    await ask(world)
    (move,) = await moves(world)

    def come(now: Migration) -> bool:
        now.status.source_pod = PodReference(name="train", uid=pod["metadata"]["uid"])
        for name, value in status.items():
            setattr(now.status, name, value)
        return True

    return await world.set(come, move.name)


async def test_an_eviction_of_a_pod_that_can_move_is_refused_for_now_and_begins_a_move(world: World) -> None:
    pod = await world.pod()
    response = await ask(world)
    (move,) = await moves(world)
    assert (response["uid"], response["allowed"], response["status"]["code"]) == ("r1", False, 429)
    assert move.name in response["status"]["message"]
    assert (move.spec.pod_name, move.spec.requested_by, move.spec.timeout) == ("train", "admin", DEADLINE)
    assert move.metadata["labels"][CAUSE_LABEL] == EVICTION
    assert move.spec.ttl_seconds_after_finished == KEPT
    assert pod["metadata"]["uid"][:8] in move.name
    again = await ask(world)
    assert (again["allowed"], len(await moves(world))) == (False, 1)
    assert f"Migration {move.name}, Pending" in again["status"]["message"]


async def test_a_dry_run_begins_nothing(world: World) -> None:
    await world.pod()
    assert (await ask(world, dry=True))["allowed"] is False
    assert await moves(world) == []


@pytest.mark.parametrize("why", ["podferry's own", "gone", "another runtime", "being deleted", "ended"])
async def test_what_is_not_for_podferry_is_evicted_without_a_word(world: World, why: str) -> None:
    if why == "another runtime":
        await world.pod(runtimeClassName=None)
    elif why != "gone":
        await world.pod()
    if why == "being deleted":
        keeps = {"metadata": {"finalizers": ["podferry.dev/test"]}}
        await world.patch(PODS, "train", keeps, world.namespace)
        await world.api.delete(PODS, "train", world.namespace)
    if why == "ended":
        await world.finish("train")
    assert warned(await ask(world, user=OWN if why == "podferry's own" else "admin")) == ""
    assert await moves(world) == []
    if why == "being deleted":
        await world.patch(PODS, "train", {"metadata": {"finalizers": None}}, world.namespace)


async def test_a_pod_that_cannot_move_is_evicted_and_the_user_learns_why(world: World) -> None:
    await world.pod(**TIED)
    assert "it cannot move" in warned(await ask(world))
    assert await moves(world) == []


async def test_where_no_move_can_be_begun_the_eviction_goes_on(world: World) -> None:
    if world.fake is None:
        pytest.skip("the real API server has no reason here to refuse a Migration")
    await world.pod()
    quota = {"kind": "Status", "reason": "Forbidden", "message": "exceeded quota: migrations"}
    world.fake.refuse.append(("POST", "/migrations", 403, quota))
    assert "exceeded quota: migrations" in warned(await ask(world))


async def test_after_a_failed_move_the_eviction_goes_on(world: World) -> None:
    over = Ending(outcome="rolled-back", reason="Engine", message="the link broke")
    await evicted(world, phase=MigrationPhase.FAILED, ending=over)
    assert "its move failed: the link broke" in warned(await ask(world))
    assert len(await moves(world)) == 1


@pytest.mark.parametrize(
    ("phase", "goes_on"),
    [
        (MigrationPhase.PENDING, True),
        (MigrationPhase.SCHEDULING, True),
        (MigrationPhase.RUNNING, True),
        (MigrationPhase.HANDING_OVER, False),
        (MigrationPhase.UNDOING, False),
    ],
)
async def test_after_its_deadline_only_a_job_that_has_not_moved_yet_is_evicted(
    world: World, phase: MigrationPhase, goes_on: bool
) -> None:
    await evicted(world, phase=phase, progress=MigrationProgress(summary="round 2, 40%"))
    early = await ask(world)
    assert (early["allowed"], "round 2, 40%" in early["status"]["message"]) == (False, True)

    await world.patch(PODS, "train", {"metadata": {"annotations": {DEADLINE_ANNOTATION: "0s"}}}, world.namespace)
    late = await ask(world)
    assert late["allowed"] is goes_on
    if goes_on:
        assert "has not ended within 0s" in warned(late)


async def test_a_pod_that_is_just_arriving_is_held_by_its_own_migration(world: World) -> None:
    move = await world.migrate("source", "move")
    pod = await world.pod()
    about = {"labels": {ROLE_LABEL: TARGET, UID_LABEL: move.uid}, "annotations": {NAME_ANNOTATION: "move"}}
    await world.patch(PODS, "train", {"metadata": about}, world.namespace)

    def arriving(now: Migration) -> bool:
        now.status.phase = MigrationPhase.HANDING_OVER
        now.status.source_pod = PodReference(name="source", uid="s1")
        now.status.target_pod = PodReference(name="train", uid=pod["metadata"]["uid"])
        return True

    await world.set(arriving)
    response = await ask(world)
    assert (response["allowed"], "Migration move" in response["status"]["message"]) == (False, True)
    assert len(await moves(world)) == 1


async def test_a_migration_of_another_pod_of_that_name_does_not_hold_the_eviction_up(world: World) -> None:
    await world.pod(**TIED)
    await world.migrate("train", "of-the-one-before")

    def taken_up(now: Migration) -> bool:
        now.status.phase, now.status.source_pod = MigrationPhase.RUNNING, PodReference(name="train", uid="another")
        return True

    await world.set(taken_up, "of-the-one-before")
    assert "it cannot move" in warned(await ask(world))


async def test_answers_are_counted(world: World) -> None:
    metrics = ControllerMetrics()
    await world.pod(**TIED)
    request = {"uid": "r1", "namespace": world.namespace, "name": "train", "userInfo": {"username": "admin"}}
    await Evictions(world.api, OWN, metrics).review(request)
    await world.pod("other")
    await Evictions(world.api, OWN, metrics).review(request | {"name": "other"})
    await Evictions(world.api, OWN, metrics).review(request | {"name": "other"})
    shown = [one for one in generate_latest(metrics.registry).decode().splitlines() if "evictions" in one]
    counted = {one.split('"')[1]: one.split()[-1] for one in shown if '"' in one and "created" not in one}
    assert counted == {"evicted": "1.0", "moves": "2.0"}


@pytest.mark.unit
@pytest.mark.parametrize(
    ("most", "wish", "found"),
    [
        (None, None, DEADLINE),
        ("10m", None, "10m"),
        (None, "5m", "5m"),
        ("10m", "5m", "5m"),
        ("10m", "10m", "10m"),
        ("10m", "20m", "10m"),
        ("10m", "soon", "10m"),
        (None, "soon", DEADLINE),
    ],
)
def test_the_shorter_of_both_deadlines_counts(most: str | None, wish: str | None, found: str) -> None:
    policy = AppliedPolicy()
    spec = policy.spec.model_copy(update={"eviction_deadline": most})
    annotations = {} if wish is None else {DEADLINE_ANNOTATION: wish}
    pod: Json = {"metadata": {"name": "p", "annotations": annotations}}
    assert deadline_of(pod, AppliedPolicy("p", spec)) == found
