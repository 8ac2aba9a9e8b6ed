"""The controller, on a fake API server and on the real one, with the agents played: every phase, every way out, every restart."""

from __future__ import annotations

import datetime
from dataclasses import replace
from functools import partial

import anyio
import pytest
import structlog

from podferry.controller import failures
from podferry.controller.metrics import ControllerMetrics
from podferry.controller.pods import PLACEHOLDER
from podferry.kube.api_errors import Conflict
from podferry.kube.client import EVENTS, JOBS, MIGRATIONS, NODES, PODS, Json
from podferry.kube.events import Events
from podferry.kube.migration import (
    HANDED_OVER,
    NAME_ANNOTATION,
    ROLE_LABEL,
    TARGET_READY,
    TARGET_REQUESTED,
    UID_LABEL,
    EnginePhases,
    Migration,
)

from .world import QUICK, World

pytestmark = pytest.mark.anyio


async def pods(world: World) -> list[Json]:
    return (await world.api.list(PODS, world.namespace))[0]


async def only_pod(world: World) -> Json:
    """The pod that is left once all of ours is gone."""

    async def one() -> bool:
        left = await pods(world)
        return len(left) == 1 and not {UID_LABEL, ROLE_LABEL} & set(left[0]["metadata"].get("labels") or {})

    await world.until(one)
    (pod,) = await pods(world)
    return pod


def said(migration: Migration, type: str) -> tuple[str, str]:
    condition = migration.status.condition(type)
    assert condition is not None, f"no condition {type}"
    return condition.status, condition.reason


async def test_a_pod_moves(world: World) -> None:
    source = await world.pod(labels={"app": "train"})
    world.controller()
    await world.migrate()
    await world.agents_move()
    migration = await world.ended()
    assert (migration.status.phase, said(migration, "Completed")) == ("Completed", ("True", "Moved"))
    assert (migration.status.source_node, migration.status.target_node) == tuple(world.nodes)
    left = await only_pod(world)
    assert left["metadata"]["uid"] != source["metadata"]["uid"]
    assert left["metadata"]["labels"] == {"app": "train"}
    assert left["metadata"]["annotations"][NAME_ANNOTATION] == "move"
    assert "ownerReferences" not in left["metadata"]
    assert (left["spec"]["nodeName"], left["spec"]["hostname"]) == (world.nodes[1], "train")
    await world.reached(lambda one: not one.metadata.get("finalizers"))


async def test_each_line_of_the_log_names_the_migration(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the uid, too, by which the agents know it."""
    seen: list[Json] = []
    monkeypatch.setattr(
        ControllerMetrics, "ended", lambda self, _: seen.append(structlog.contextvars.get_contextvars())
    )
    await world.pod()
    world.controller()
    await world.migrate()
    await world.agents_move()
    migration = await world.ended()
    named = {"migration": migration.name, "namespace": world.namespace, "uid": migration.uid}
    assert [{name: one.get(name) for name in named} for one in seen] == [named]


async def test_a_wait_that_runs_out_of_time_shows_how_everything_looks(world: World) -> None:
    await world.pod(labels={"app": "train"})
    await world.migrate()

    async def pigs_fly() -> bool:
        return False

    with pytest.raises(AssertionError) as waited:
        await world.until(pigs_fly, 0.1)
    shown = str(waited.value)
    for words in ("pigs_fly", "return False", "Pod {'name': 'train'", "'app': 'train'", "is Running", "Migration {"):
        assert words in shown


async def handed_over(world: World, source: str, target: str, **spec: object) -> Json:
    """A move whose owner has the target while the halves of the engine are in these phases. Returns the target pod."""
    await world.pod()
    world.controller()
    await world.migrate(**spec)
    await world.agents_prepare_target()
    await world.agents_resume(source=source)
    migration = await world.reached(lambda one: one.status.holds(HANDED_OVER))
    assert migration.status.target_pod is not None

    def phases(now: Migration) -> bool:
        now.status.engine = EnginePhases(source=source, target=target)
        return True

    await world.set(phases)
    return await world.api.get(PODS, migration.status.target_pod.name, world.namespace)


@pytest.mark.parametrize("source", ["serve", "lost-contact"])
async def test_a_job_that_died_before_it_had_its_memory_has_not_moved(world: World, source: str) -> None:
    await handed_over(world, source, "died", mode="postcopy")
    migration = await world.ended()
    assert (migration.status.phase, said(migration, "Failed")) == ("Failed", ("True", "JobDied"))
    assert said(migration, "Completed") == ("False", "JobDied")


@pytest.mark.parametrize("source", ["serve", "lost-contact"])
async def test_a_target_pod_that_goes_before_the_job_has_its_memory_has_not_moved_it(world: World, source: str) -> None:
    target = await handed_over(world, source, "fill", mode="postcopy")
    about = target["metadata"]
    await world.api.delete(PODS, about["name"], world.namespace, uid=about["uid"], grace=0)
    migration = await world.ended()
    assert (migration.status.phase, said(migration, "Failed")) == ("Failed", ("True", "TargetPodGone"))


@pytest.mark.parametrize("source", ["serve", "lost-contact"])
async def test_a_sources_node_that_is_lost_before_the_job_has_its_memory_takes_the_job_along(
    world: World, source: str
) -> None:
    await handed_over(world, source, "fill", mode="postcopy")
    fence = [{"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute", "value": "nodeshutdown"}]
    await world.patch(NODES, world.nodes[0], {"spec": {"taints": fence}})
    migration = await world.ended()
    assert (migration.status.phase, said(migration, "Failed")) == ("Failed", ("True", "SourceNodeLost"))


@pytest.mark.parametrize(("source", "target"), [("lost-contact", "done"), ("serve", "done"), ("drain", "fill")])
async def test_a_job_that_has_all_its_memory_has_moved_though_the_sources_agent_says_nothing(
    world: World, source: str, target: str
) -> None:
    await handed_over(world, source, target, mode="postcopy")
    migration = await world.ended()
    assert migration.status.phase == "Completed"
    assert "has not said" in (migration.status.message or "")


async def test_a_job_that_was_resolved_to_go_on_at_the_source_keeps_its_pod_there(world: World) -> None:
    await handed_over(world, "lost-contact", "resume", mode="postcopy")
    await world.agents_end("rolled-back", message="a person decided")
    migration = await world.ended()
    assert migration.status.phase == "RolledBack"
    assert "deletionTimestamp" not in (await world.api.get(PODS, "train", world.namespace))["metadata"]


@pytest.mark.parametrize(
    ("spec", "threshold", "phase"),
    [
        ({"mode": "stop"}, 1, "Refused"),
        ({"mode": "postcopy"}, 1, "Refused"),
        ({"allowPostCopy": True}, 1, "Refused"),
        ({"mode": "stop"}, 2, "Scheduling"),
        ({"mode": "live"}, 1, "Scheduling"),
    ],
)
async def test_a_probe_whose_first_failure_restarts_the_container_is_refused_where_the_pod_may_stand_still_for_long(
    world: World, spec: Json, threshold: int, phase: str
) -> None:
    probe = {"exec": {"command": ["true"]}, "failureThreshold": threshold}
    await world.pod(containers=[{"name": "main", "image": "train", "livenessProbe": probe}])
    world.controller()
    await world.migrate(**spec)
    migration = await world.reached(lambda one: one.status.phase != "Pending")
    assert (migration.status.phase in ("Scheduling", "Running")) is (phase == "Scheduling")
    if phase == "Refused":
        assert said(migration, "Eligible") == ("False", "ImpatientProbe")


async def test_it_moves_back_under_a_name_of_the_same_family(world: World) -> None:
    await world.pod()
    world.controller()
    for turn in range(2):
        name = (await pods(world))[0]["metadata"]["name"]
        await world.migrate(name, f"move-{turn}")
        await world.agents_move(f"move-{turn}")
        assert (await world.ended(f"move-{turn}")).status.phase == "Completed"
        await only_pod(world)
    (pod,) = await pods(world)
    assert pod["metadata"]["name"].count("-") == 1
    assert pod["metadata"]["name"].startswith("train-")
    assert pod["spec"]["nodeName"] == world.nodes[0]


async def test_a_source_that_its_owner_does_not_let_go_is_taken_from_it(world: World) -> None:
    if world.fake is None:
        pytest.skip("on the real one owners have controllers, which let it go: test_owners")
    await world.pod(labels={"app": "train"})
    owner = await world.api.create(JOBS, {"metadata": {"name": "train"}, "spec": {}}, world.namespace)
    reference = {"apiVersion": JOBS.api, "kind": JOBS.kind, "name": "train", "uid": owner["metadata"]["uid"]}
    about = {"ownerReferences": [{**reference, "controller": True}], "finalizers": ["batch.kubernetes.io/job-tracking"]}
    source = await world.patch(PODS, "train", {"metadata": about}, world.namespace)
    world.controller(replace(QUICK, release=0.5))
    await world.migrate()
    await world.agents_move()
    assert (await world.ended()).status.phase == "Completed"
    left = await only_pod(world)
    assert left["metadata"]["uid"] != source["metadata"]["uid"]
    assert {name: left["metadata"][name] for name in about} == about


async def test_the_target_has_its_labels_before_the_job_runs_in_it_and_is_nobodys_yet(world: World) -> None:
    """NetworkPolicies and Services select by labels; owners go by the controller's reference."""
    await world.pod(labels={"app": "train", "tier": "batch"})
    world.controller()
    await world.migrate()
    await world.agents_prepare_target()
    seen = (await world.api.list(PODS, world.namespace, labels={"app": "train", "tier": "batch"}))[0]
    (target,) = [one for one in seen if one["metadata"]["name"] != "train"]
    assert [one["kind"] for one in target["metadata"]["ownerReferences"] if one.get("controller")] == ["Migration"]
    assert not target["metadata"].get("finalizers")
    ours = {one["metadata"]["labels"].get(ROLE_LABEL) for one in await pods(world)}
    assert ours == {None, "target"}, "the placeholder has gone by then"


async def test_a_controller_that_died_before_the_target_had_its_labels_is_made_good(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.pod(labels={"app": "train"})
    died = anyio.Event()

    def die(source: object, target: object) -> None:
        scope.cancel()
        died.set()
        raise Conflict("killed here")

    monkeypatch.setattr("podferry.controller.pods.wear_labels", die)
    scope = world.controller()
    await world.migrate()

    world.tasks.start_soon(world.agents_prepare_target)
    await died.wait()
    monkeypatch.undo()
    world.controller()
    await world.reached(lambda one: one.status.holds(TARGET_READY))
    assert len((await world.api.list(PODS, world.namespace, labels={"app": "train"}))[0]) == 2


async def test_a_pod_that_may_not_move_is_refused_with_reason_and_remedy(world: World) -> None:
    await world.pod(runtimeClassName=None, volumes=[{"name": "host", "hostPath": {"path": "/srv"}}])
    world.controller()
    await world.migrate()
    migration = await world.ended()
    assert migration.status.phase == "Refused"
    assert said(migration, "Eligible") == ("False", "RuntimeClassMissing")
    assert said(migration, "Failed") == ("True", "RuntimeClassMissing")
    assert migration.status.ending is not None
    assert "/srv" in migration.status.ending.message
    assert "runtimeClassName: podferry" in migration.status.ending.remedy
    await only_pod(world)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"podName": "nobody"}, "PodNotFound"),
        ({"targetNode": "nowhere"}, "NodeNotFound"),
        ({"targetNode": "@source"}, "AlreadyThere"),
    ],
)
async def test_what_makes_no_sense_is_refused(world: World, spec: dict[str, str], reason: str) -> None:
    await world.pod()
    world.controller()
    spec = {name: world.nodes[0] if value == "@source" else value for name, value in spec.items()}
    await world.migrate(spec.pop("podName", "train"), **spec)
    migration = await world.ended()
    assert (migration.status.phase, said(migration, "Eligible")) == ("Refused", ("False", reason))


async def test_a_pod_whose_claim_is_gone_is_refused(world: World) -> None:
    await world.pod(volumes=[{"name": "data", "persistentVolumeClaim": {"claimName": "absent"}}])
    world.controller()
    await world.migrate()
    migration = await world.ended()
    assert (migration.status.phase, said(migration, "Eligible")) == ("Refused", ("False", "VolumeMissing"))
    assert "absent" in (migration.status.message or "")
    await only_pod(world)


async def test_a_pod_that_its_own_rules_tie_to_its_node_is_refused_at_once(world: World) -> None:
    host = "kubernetes.io/hostname"
    await world.patch(NODES, world.nodes[0], {"metadata": {"labels": {host: "here"}}})
    await world.pod(nodeSelector={host: "here"})
    world.controller(replace(QUICK, scheduling=1000.0))
    await world.migrate()
    migration = await world.ended()
    assert (migration.status.phase, said(migration, "Eligible")) == ("Refused", ("False", "PinnedToNode"))
    assert migration.status.ending is not None
    assert "nodeSelector kubernetes.io/hostname: here" in migration.status.ending.message
    await only_pod(world)


@pytest.mark.parametrize("whose", ["pod", "migration"])
async def test_a_named_node_that_the_rules_do_not_allow_is_refused_at_once(world: World, whose: str) -> None:
    await world.patch(NODES, world.nodes[0], {"metadata": {"labels": {"disk": "fast"}}})
    await world.pod(**({"nodeSelector": {"disk": "fast"}} if whose == "pod" else {}))
    world.controller(replace(QUICK, scheduling=1000.0))
    asked = {"nodeSelector": {"disk": "fast"}} if whose == "migration" else {}
    await world.migrate(targetNode=world.nodes[1], **asked)
    migration = await world.ended()
    assert (migration.status.phase, said(migration, "Eligible")) == ("Refused", ("False", "NodeNotAllowed"))


async def gone(world: World, name: str = "move") -> bool:
    return await world.api.find(MIGRATIONS, name, world.namespace) is None


async def test_an_ended_migration_goes_in_its_time_and_the_pod_stays(world: World) -> None:
    await world.pod()
    world.controller()
    await world.migrate(ttlSecondsAfterFinished=2)
    await world.agents_move()
    assert (await world.ended()).status.phase == "Completed"
    left = await only_pod(world)
    await world.until(partial(gone, world))
    assert (await only_pod(world))["metadata"]["uid"] == left["metadata"]["uid"]


async def test_it_goes_at_once_where_it_is_asked_to_however_it_ended(world: World) -> None:
    await world.pod(runtimeClassName=None)
    world.controller()
    await world.migrate(ttlSecondsAfterFinished=0)
    await world.until(partial(gone, world))
    await world.migrate(name="kept")
    await world.ended("kept")
    await anyio.sleep(1.0)
    assert not await gone(world, "kept"), "it stays unless somebody asks for it to go"
    await world.patch(MIGRATIONS, "kept", {"spec": {"ttlSecondsAfterFinished": 0}}, world.namespace)
    await world.until(partial(gone, world, "kept"))


async def test_its_time_may_be_prolonged_as_long_as_it_is_there(world: World) -> None:
    await world.pod(runtimeClassName=None)
    world.controller()
    await world.migrate(ttlSecondsAfterFinished=3)
    await world.ended()
    await world.patch(MIGRATIONS, "move", {"spec": {"ttlSecondsAfterFinished": 1000}}, world.namespace)
    await anyio.sleep(4.0)
    assert not await gone(world)


async def test_the_time_counts_from_the_end_for_a_controller_that_was_away(world: World) -> None:
    await world.pod(runtimeClassName=None)
    scope = world.controller()
    await world.migrate(ttlSecondsAfterFinished=2)
    await world.ended()
    scope.cancel()
    await anyio.sleep(3.0)
    assert not await gone(world)
    world.controller()
    await world.until(partial(gone, world), 1.5)


async def test_it_stays_for_an_agent_that_has_not_heard_the_verdict(world: World) -> None:
    await world.pod()
    world.controller()
    await world.migrate(ttlSecondsAfterFinished=0)
    await world.agents_prepare_target()
    await world.agents_resume()
    ended = await world.ended()
    assert ended.status.phase == "Completed"
    now = datetime.datetime.fromisoformat(ended.status.completion_time or "")
    assert failures.of_age(ended, now) == failures.VERDICT_KEPT
    assert failures.of_age(ended, now + datetime.timedelta(seconds=failures.VERDICT_KEPT)) == 0
    await anyio.sleep(1.0)
    assert not await gone(world)


async def test_a_second_migration_of_one_pod_is_refused_and_the_first_goes_on(world: World) -> None:
    await world.pod()
    world.controller()
    await world.migrate()
    await world.agents_prepare_target()
    await world.migrate(name="second")
    second = await world.ended("second")
    assert (second.status.phase, said(second, "Eligible")[1]) == ("Refused", "AlreadyMigrating")
    await world.agents_resume()
    await world.agents_part()
    assert (await world.ended()).status.phase == "Completed"


async def test_a_target_that_fits_nowhere_is_said_and_leaves_the_source_alone(world: World) -> None:
    source = await world.pod()
    world.controller()
    await world.migrate(nodeSelector={"disk": "fast"})
    migration = await world.ended()
    assert migration.status.phase == "RolledBack"
    assert said(migration, "Scheduled") == ("False", "Unschedulable")
    assert said(migration, "Failed") == ("True", "Unschedulable")
    assert (await only_pod(world))["metadata"]["uid"] == source["metadata"]["uid"]


async def cancelled(world: World, how: str) -> None:
    if how == "deleted":
        await world.api.delete(MIGRATIONS, "move", world.namespace)
    else:
        await world.patch(MIGRATIONS, "move", {"spec": {"cancel": True}}, world.namespace)


@pytest.mark.parametrize("how", ["field", "deleted"])
async def test_it_is_cancelled_while_the_engine_works(world: World, how: str) -> None:
    source = await world.pod()
    world.controller()
    await world.migrate()
    await world.agents_prepare_target()
    await cancelled(world, how)
    asked = await world.reached(lambda one: one.status.abort is not None)
    assert asked.status.phase == "Running", "only the source's agent knows whether it is too late"
    await world.agents_end("cancelled")
    assert (await only_pod(world))["metadata"]["uid"] == source["metadata"]["uid"]
    if how == "field":
        migration = await world.ended()
        assert (migration.status.phase, said(migration, "Cancelled")) == ("Cancelled", ("True", "CancelRequested"))
        assert said(migration, "Failed")[0] == "False"
    else:
        await world.until(partial(gone, world))


async def test_a_cancel_that_comes_too_late_changes_nothing(world: World) -> None:
    await world.pod()
    world.controller()
    await world.migrate()
    await world.agents_prepare_target()
    await cancelled(world, "field")
    await world.reached(lambda one: one.status.abort is not None)
    await world.agents_resume()
    await world.agents_part()
    assert (await world.ended()).status.phase == "Completed"
    assert (await only_pod(world))["spec"]["nodeName"] == world.nodes[1]


async def test_it_is_cancelled_before_any_agent_has_begun(world: World) -> None:
    source = await world.pod()
    world.controller()
    await world.migrate()
    await world.reached(lambda one: one.status.phase == "Running")
    await cancelled(world, "field")
    assert (await world.ended()).status.phase == "Cancelled"
    assert (await only_pod(world))["metadata"]["uid"] == source["metadata"]["uid"]


async def test_the_engine_rolls_back_and_says_why(world: World) -> None:
    source = await world.pod()
    world.controller()
    await world.migrate()
    await world.agents_prepare_target()
    await world.agents_end("rolled-back", reason="Engine", message="the job writes faster than the link carries")
    migration = await world.ended()
    assert (migration.status.phase, said(migration, "Failed")) == ("RolledBack", ("True", "Engine"))
    assert "faster than the link" in (migration.status.message or "")
    assert (await only_pod(world))["metadata"]["uid"] == source["metadata"]["uid"]


async def test_the_pod_is_deleted_during_the_move(world: World) -> None:
    await world.pod()
    world.controller()
    await world.migrate()
    await world.agents_prepare_target()
    await world.api.delete(PODS, "train", world.namespace)
    await world.reached(lambda one: one.status.abort is not None)
    await world.agents_end("failed", message="the container ended during the move")
    migration = await world.ended()
    assert migration.status.phase == "Failed"

    async def none() -> bool:
        return not await pods(world)

    await world.until(none)


async def test_the_pod_is_deleted_after_the_job_has_left_it(world: World) -> None:
    """Its owner's wish goes before the move: the target goes too, and no copy is left."""
    await world.pod()
    scope = world.controller()
    await world.migrate()
    await world.agents_prepare_target()
    scope.cancel()
    await world.api.delete(PODS, "train", world.namespace)
    await world.agents_resume()
    world.controller()
    await world.agents_part()
    migration = await world.ended()
    assert (migration.status.phase, said(migration, "Failed")) == ("Failed", ("True", "PodDeleted"))

    async def none() -> bool:
        return not await pods(world)

    await world.until(none)


async def test_the_target_pod_is_deleted_before_the_job_has_moved(world: World) -> None:
    source = await world.pod()
    world.controller()
    await world.migrate()
    migration = await world.agents_prepare_target()
    assert migration.status.target_pod is not None
    await world.api.delete(PODS, migration.status.target_pod.name, world.namespace, grace=0)
    await world.reached(lambda one: one.status.abort is not None)
    await world.agents_end("cancelled")
    migration = await world.ended()
    assert (migration.status.phase, said(migration, "Failed")) == ("RolledBack", ("True", "TargetPodGone"))
    assert (await only_pod(world))["metadata"]["uid"] == source["metadata"]["uid"]


async def target_that_waits(world: World) -> Json:
    """The target pod, which its kubelet has not started yet."""
    await world.reached(lambda one: one.status.phase == "Running")

    def asked(now: Migration) -> bool:
        now.status.engine = EnginePhases(source="prepare-target", target="receive")
        now.status.set_condition(TARGET_REQUESTED, True, "Converged")
        return True

    await world.set(asked)
    migration = await world.reached(lambda one: one.status.target_pod is not None)
    assert migration.status.target_pod is not None
    return await world.api.get(PODS, migration.status.target_pod.name, world.namespace)


async def test_a_target_pod_whose_volume_cannot_be_mounted_is_not_waited_for(world: World) -> None:
    source = await world.pod()
    world.controller(replace(QUICK, starting=1.0))
    await world.migrate()
    target = {"apiVersion": PODS.api, "kind": PODS.kind, **await target_that_waits(world)}
    await Events(world.api, "kubelet").publish(
        {**target, "metadata": source["metadata"]}, "Unhealthy", "not this one", warning=True
    )
    await Events(world.api, "kubelet").publish(target, "Pulled", "all is well")
    await anyio.sleep(4.0)
    assert (await world.get()).status.abort is None, "nobody has warned of it"
    said_by_kubelet = 'MountVolume.SetUp failed for volume "settings": configmap "train" not found'
    await Events(world.api, "kubelet").publish(target, "FailedMount", said_by_kubelet, warning=True)
    await world.reached(lambda one: one.status.abort is not None)
    await world.agents_end("cancelled")
    migration = await world.ended()
    assert (migration.status.phase, said(migration, "Failed")) == ("RolledBack", ("True", "VolumeMissing"))
    assert said_by_kubelet in (migration.status.message or "")
    assert (await only_pod(world))["metadata"]["uid"] == source["metadata"]["uid"]


async def test_the_targets_node_is_lost_before_go(world: World) -> None:
    source = await world.pod()
    world.controller()
    await world.migrate()
    await world.agents_prepare_target()
    lost = {"status": {"conditions": [{"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}]}}
    await world.patch(NODES, world.nodes[1], lost, part="status")
    asked = await world.reached(lambda one: one.status.abort is not None)
    assert asked.status.abort is not None
    assert asked.status.abort.reason == "TargetNodeLost"
    await world.agents_end("cancelled")
    assert (await world.ended()).status.phase == "RolledBack"
    assert (await only_pod(world))["metadata"]["uid"] == source["metadata"]["uid"]


async def test_nodes_that_lost_each_other_after_go_are_arbitrated_once_one_is_gone(world: World) -> None:
    source = await world.pod()
    world.controller()
    await world.migrate()
    await world.agents_prepare_target()

    def lost(now: Migration) -> bool:
        assert now.status.engine is not None
        now.status.engine.source = "lost-contact"
        return True

    await world.set(lost)
    await anyio.sleep(2.5)
    assert (await world.get()).status.arbiter is None, "a node that may still run the job decides nothing"
    fence = [{"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute", "value": "nodeshutdown"}]
    await world.patch(NODES, world.nodes[1], {"spec": {"taints": fence}})
    decided = await world.reached(lambda one: one.status.arbiter is not None)
    assert decided.status.arbiter == "source"
    await world.agents_end("rolled-back", message="a person decided")
    assert (await world.ended()).status.phase == "RolledBack"
    assert (await only_pod(world))["metadata"]["uid"] == source["metadata"]["uid"]


async def test_the_target_that_runs_is_right_where_the_source_heard_nothing(world: World) -> None:
    await world.pod()
    world.controller()
    await world.migrate()
    await world.agents_prepare_target()
    await world.agents_resume()

    def lost(now: Migration) -> bool:
        assert now.status.engine is not None
        now.status.engine.source = "lost-contact"
        return True

    await world.set(lost)
    await world.agents_part()
    assert (await world.ended()).status.phase == "Completed"


async def test_a_migration_ends_although_the_sources_agent_never_returns(world: World) -> None:
    await world.pod()
    world.controller()
    await world.migrate()
    await world.agents_prepare_target()
    await world.agents_resume()
    assert (await world.ended()).status.phase == "Completed"


async def test_two_controllers_at_once_do_what_one_does(world: World) -> None:
    await world.pod(labels={"app": "train"})
    for _ in range(2):
        world.controller()
    await world.migrate()
    await world.agents_move()
    assert (await world.ended()).status.phase == "Completed"
    assert (await only_pod(world))["metadata"]["labels"] == {"app": "train"}


async def test_a_node_is_named(world: World) -> None:
    await world.pod()
    world.controller()
    await world.migrate(targetNode=world.nodes[1])
    await world.agents_move()
    assert (await world.ended()).status.target_node == world.nodes[1]


async def test_the_placeholder_asks_for_what_the_pod_needs(world: World) -> None:
    await world.pod()
    world.controller()
    await world.migrate()
    await world.reached(lambda one: one.status.phase == "Running")
    (place,) = (await world.api.list(PODS, world.namespace, labels={ROLE_LABEL: PLACEHOLDER}))[0]
    assert place["spec"]["containers"][0]["resources"]["requests"] == {"cpu": "100m"}
    assert place["spec"]["nodeName"] == world.nodes[1]


async def test_the_target_has_the_resources_that_the_migration_asks_for(world: World) -> None:
    await world.pod()
    world.controller()
    wanted = [{"name": "main", "requests": {"cpu": "200m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}}]
    await world.migrate(resources=wanted)
    await world.agents_move()
    assert (await world.ended()).status.phase == "Completed"
    resources = (await only_pod(world))["spec"]["containers"][0]["resources"]
    assert resources == {"requests": {"cpu": "200m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}}


@pytest.mark.parametrize(
    ("name", "limit", "words"), [("other", "1", "no container other"), ("main", "50m", "beyond the limit 50m")]
)
async def test_resources_that_cannot_be_are_refused(world: World, name: str, limit: str, words: str) -> None:
    await world.pod()
    world.controller()
    await world.migrate(resources=[{"name": name, "limits": {"cpu": limit}}])
    migration = await world.ended()
    assert (migration.status.phase, said(migration, "Eligible")) == ("Refused", ("False", "ResourcesInvalid"))
    assert migration.status.ending is not None
    assert words in migration.status.ending.message


async def test_events_tell_the_story_on_pod_and_migration(world: World) -> None:
    await world.pod()
    world.controller()
    await world.migrate()
    await world.agents_move()
    await world.ended()

    async def told() -> bool:
        events = (await world.api.list(EVENTS, world.namespace))[0]
        seen = {(one["regarding"]["kind"], one["reason"]) for one in events}
        wanted = {("Migration", "Scheduled"), ("Migration", "MigrationCompleted")}
        return wanted | {("Pod", "MigrationStarted"), ("Pod", "MigrationTarget"), ("Pod", "MigrationCompleted")} <= seen

    await world.until(told)


async def test_an_agent_that_never_takes_it_up_is_said(world: World) -> None:
    source = await world.pod()
    world.controller(replace(QUICK, silence=2.0))
    await world.migrate()
    migration = await world.ended()
    assert (migration.status.phase, said(migration, "Failed")) == ("RolledBack", ("True", "SourceAgentSilent"))
    assert (await only_pod(world))["metadata"]["uid"] == source["metadata"]["uid"]
