"""Reconcile one Migration: read the objects as they are now, and take the next step.

Nothing is remembered between steps. A controller that was killed anywhere, or runs twice, finds the same objects and does the same;
every write is a compare-and-swap or names the uid that it means.

The file is long because the phases of one Migration follow each other in it; what several of them use is in modules of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from podferry.controller import failures, placement, pods, verifying
from podferry.controller.entrance import Entrance
from podferry.controller.handover import HandOver
from podferry.controller.patience import ControllerSettings
from podferry.controller.peer_addresses import with_peers
from podferry.controller.status_writer import StatusWriter, clock
from podferry.controller.surroundings import Surveyor
from podferry.controller.target_pods import TargetPods
from podferry.controller.turns import Turns
from podferry.controller.verdicts import blame, decided_for, decided_once_for
from podferry.controller.whereabouts import address_of, kept_up
from podferry.core.migration import MIGRATION_ENDS, UNDONE, MigrationEvent, MigrationPhase
from podferry.core.phases import SourcePhase, TargetPhase
from podferry.kube import status as store
from podferry.kube.api_errors import ApiFailed, Conflict, ObjectAlreadyExists, transient
from podferry.kube.client import NODES, PODS, Api, Json
from podferry.kube.migration import (
    HANDED_OVER,
    RESUMED,
    ROLE_LABEL,
    SCHEDULED,
    SOURCE_REPLACED,
    TARGET_CREATED,
    TARGET_REQUESTED,
    UID_LABEL,
    VERIFIED,
    Ending,
    EnginePhases,
    Migration,
)
from podferry.kube.paths import NameRefused
from podferry.model import Outcome

E, P = MigrationEvent, MigrationPhase

POLL_AGAIN = 2.0
REMADE_IN = VERIFY_AGAIN = 0.5
CONFLICT = 0.1
"""Seconds after which to look again where somebody was faster: the watch has to bring it."""
SPENT = frozenset({SourcePhase.COMMIT, SourcePhase.DRAIN, SourcePhase.COMPLETED})
"""The source's phases in which the target has all that it needs of it: before, in post-copy, its memory is still being fetched."""
DEADLINE_SLACK = 30.0


class Reconciler:
    """Takes Migrations from wherever they are to their end."""

    def __init__(
        self,
        api: Api,
        settings: ControllerSettings,
        turns: Turns,
        ended: Callable[[Migration], object] = lambda _: None,
    ) -> None:
        """`ended` hears of each Migration that ends by this reconciler."""
        self._api, self._settings, self._turns = api, settings, turns
        self._writer = StatusWriter(api, ended)
        self._survey = Surveyor(api)
        self._entrance = Entrance(api, self._writer, self._survey, turns)
        self._targets = TargetPods(api, self._writer, settings.scheduling, self._remove)
        self._hand_over = HandOver(api, settings.readiness, settings.release)
        self._steps: dict[MigrationPhase, Callable[[Migration], Awaitable[float | None]]] = {
            P.PENDING: self._entrance.step,
            P.SCHEDULING: self._scheduling,
            P.RUNNING: self._running,
            P.HANDING_OVER: self._handing_over,
            P.UNDOING: self._undoing,
        }

    async def step(self, namespace: str, name: str) -> float | None:
        """Take the next step. Returns the seconds until the next look, or None to wait for a change."""
        try:
            migration = await self._writer.read(namespace, name)
            if migration is None:
                return None
            # Each Migration has a task of its own. Agents know it by its uid, people by its name.
            structlog.contextvars.bind_contextvars(migration=name, namespace=namespace, uid=migration.uid)
            if migration.status.phase in MIGRATION_ENDS:
                return await self._writer.close(migration)
            try:
                migration = await kept_up(self._api, migration)
                return await self._steps[migration.status.phase](migration)
            except NameRefused as wrong:
                return await self._misnamed(migration, wrong)
        except Conflict:
            return CONFLICT

    async def _misnamed(self, migration: Migration, wrong: NameRefused) -> float:
        """Something that the Migration depends on has a name that no object can have: no later try finds it."""
        end = failures.ending(Outcome.FAILED, "NameInvalid", str(wrong), remedy=wrong.remedy, code=wrong.code)
        match migration.status.phase:
            case P.PENDING:
                return await self._entrance.refuse(migration, "NameInvalid", [wrong])
            case P.RUNNING:
                return await self._abort(migration, end, await self._writer.source(migration))
            case P.SCHEDULING:
                return await self._undo(migration, end)
            case _:  # the job has moved already or everything goes back: what was begun is tried to the end
                raise wrong

    # Scheduling: where to?

    async def _scheduling(self, migration: Migration) -> float | None:
        source = await self._writer.source(migration)
        if failure := await self._beforehand(migration, source):
            return await self._undo(migration, failure)
        assert source is not None
        placeholder = await self._placeholder(migration, source)
        if isinstance(placeholder, Ending):
            return await self._undo(migration, placeholder)
        if node := placeholder["spec"].get("nodeName"):
            if busy := self._turns.enter(migration, node):  # the placeholder keeps the room there
                await self._writer.set_condition(migration, SCHEDULED, False, busy.reason, busy.message)
                return POLL_AGAIN

            address = await address_of(self._api, node)

            def placed(now: Migration) -> None:
                now.status.target_node, now.status.target_address = node, address
                now.status.set_condition(SCHEDULED, True, "NodeChosen", f"the scheduler chose {node}")

            await self._writer.fire(migration, E.PLACED, placed, message=f"moving to {node}")
            await self._writer.publish_event(migration, "Scheduled", f"{migration.spec.pod_name} moves to {node}")
            return 0.0
        if why := failures.unscheduled(placeholder):
            await self._writer.set_condition(migration, SCHEDULED, False, *why)
        if failure := failures.of_waiting(placeholder, "the pod", self._settings.scheduling, clock()):
            return await self._undo(migration, failure)
        return POLL_AGAIN

    async def _placeholder(self, migration: Migration, source: Json) -> Json | Ending:
        """The pod that looks for a node, made if it is not there; or why it cannot be."""
        body = pods.placeholder_pod(source, migration, self._settings.image)
        found = await self._api.find(PODS, body["metadata"]["name"], migration.namespace)
        if found is not None:
            mine = pods.made_by(found, migration)
            return found if mine else failures.of_taken_name(body, "a pod that looks for a node")
        never = placement.of_other_runtimes((await self._api.list(NODES))[0], source["spec"]["nodeName"])
        body = pods.placeholder_pod(source, migration, self._settings.image, never)
        try:
            return await self._api.create(PODS, body, migration.namespace)
        except ObjectAlreadyExists as faster:
            raise Conflict.because("another controller has changed the object meanwhile", faster) from faster
        except ApiFailed as refused:
            if transient(refused) and "webhook" not in refused.why:
                raise
            return failures.of_creation(refused, "a pod that looks for a node")

    # Running: the agents work; here the target pod is made, and whatever may go wrong around is watched.

    async def _running(self, migration: Migration) -> float | None:
        migration = await with_peers(self._api, migration)
        status = migration.status
        if status.holds(RESUMED) and status.arbiter != "source":
            lost = status.engine is not None and status.engine.source == SourcePhase.LOST
            await self._writer.fire(
                migration, E.RESUMED, decided_for("target") if lost else None, message="handing over"
            )
            return 0.0
        source, target = await self._writer.source(migration), await self._writer.target(migration)
        if (over := status.engine_ending) is not None:
            return await self._undo(migration, blame(over, status.abort))
        if (again := await self._arbitrate(migration)) is not None:
            return again
        failure = status.abort
        if not status.holds(SOURCE_REPLACED):  # the source's object is gone after that, and no wish brings it back
            failure = failure or await self._beforehand(migration, source)
            failure = failure or failures.of_silence(migration, self._settings.silence, clock())
        failure = failure or failures.of_target(target, migration, self._settings.scheduling, clock())
        failure = failure or await self._starting(migration, target)
        if failure is None and status.target_node:
            node = await self._api.find(NODES, status.target_node)
            failure = failures.of_target_node(node, status.target_node)
        if failure is not None:
            return await self._abort(migration, failure, source)
        if status.holds(TARGET_REQUESTED) and not status.holds(TARGET_CREATED):
            found = await self._targets.step(migration, source, target)
            return await self._abort(migration, found, source) if isinstance(found, Ending) else found
        return POLL_AGAIN

    async def _starting(self, migration: Migration, target: Json | None) -> Ending | None:
        """The failure that keeps the target pod from starting, once that takes long."""
        if target is None or migration.status.target_is_ready:
            return None
        if failures.age(target["metadata"]["creationTimestamp"], clock()) < self._settings.starting:
            return None
        return failures.of_start(target, await self._survey.warnings(target))

    async def _abort(self, migration: Migration, failure: Ending, source: Json | None) -> float:
        """Before the agents have begun nothing needs asking. Then the source's agent is asked: only it knows whether
        it is too late.
        """

        def asked(now: Migration) -> bool:
            now.status.abort = now.status.abort or failure
            return now.status.phase is P.RUNNING

        migration = await store.change(self._api, migration, asked)
        why = migration.status.abort or failure
        engine = migration.status.engine
        if engine is None or not engine.source:
            return await self._undo(migration, why)
        node = await self._api.find(NODES, migration.status.source_node or "")
        if failures.gone_or_fenced(node):
            lost = failures.ending(
                Outcome.FAILED, failures.SOURCE_NODE_LOST, f"the source's node is gone; {why.message}"
            )
            return await self._undo(migration, lost)
        gave_up = engine.target == TargetPhase.GAVE_UP
        if gave_up and node is not None and not failures.ready(node):
            return await self._undo(
                migration, why
            )  # the source takes its job back when it returns: the target never will
        return POLL_AGAIN

    async def _arbitrate(self, migration: Migration) -> float | None:
        """The nodes lost each other after the right to run had passed: who is certain not to run decides."""
        engine, status = migration.status.engine or EnginePhases(), migration.status
        if status.arbiter is not None or engine.source != SourcePhase.LOST:
            return None
        if failures.gone_or_fenced(await self._api.find(NODES, status.target_node or "")):
            await store.change(self._api, migration, decided_once_for("source"))
            await self._writer.publish_event(
                migration, "Arbitrated", f"{status.target_node} is gone: the job runs on", warning=True
            )
        return POLL_AGAIN

    # HandingOver: the job runs on the target; the cluster follows.

    async def _handing_over(self, migration: Migration) -> float | None:
        source, target = await self._writer.source(migration), await self._writer.target(migration)
        if not migration.status.holds(HANDED_OVER):
            if failure := self._hand_over.failure(migration, source, target):
                await self._writer.set_condition(migration, HANDED_OVER, False, failure.reason, failure.message)
                return await self._undo(migration, failure)
            if (again := await self._verify(migration, target)) is not None:
                return again
            again = await self._hand_over.step(migration, source, target)
            if again is not None:
                return again
            await self._writer.set_condition(migration, HANDED_OVER, True, "OwnerHasTarget")
            return 0.0
        return await self._handed_over(migration, source, target)

    async def _verify(self, migration: Migration, target: Json | None) -> float | None:
        """While the source's pod is still there: does the job do what it must? None once that is known."""
        if migration.spec.verify is None or target is None or migration.status.condition(VERIFIED) is not None:
            return None
        found = verifying.verdict(migration, target, await self._survey.warnings(target), clock())
        if found is None:
            return VERIFY_AGAIN
        await self._writer.set_condition(migration, VERIFIED, found.holds, found.reason, found.words)
        if not found.holds:
            await self._writer.publish_pod_event(target, "MigrationNotVerified", found.words, warning=True)
        return 0.0

    async def _handed_over(self, migration: Migration, source: Json | None, target: Json | None) -> float:
        """What is left is the source's end, and the truth about the job's."""
        over, engine = migration.status.engine_ending, migration.status.engine or EnginePhases()
        if over is not None and over.outcome not in (Outcome.COMPLETED, Outcome.FAILED):
            return await self._undo(migration, over)  # somebody resolved it so: the job runs on in the source's pod
        gone = failures.gone_or_fenced(await self._api.find(NODES, migration.status.source_node or ""))
        lost = failures.of_resumed(migration, target, source_gone=gone) if over is None else None
        silent = gone or self._farewell_is_over(migration)
        if (
            (over or lost or silent or engine.source in SPENT)
            and source is not None
            and "deletionTimestamp" not in source["metadata"]
        ):
            await self._hand_over.dismiss(source)
        if failed := lost or (over if over is not None and over.outcome == Outcome.FAILED else None):
            return await self._undo(migration, failed)
        if over is None and not silent:
            return POLL_AGAIN
        verified = migration.status.condition(VERIFIED)
        if verified is not None and verified.status == "False":
            return await self._undo(migration, verifying.ending(migration, verified.message))
        await self._writer.release(target)
        how = f", stopped for {migration.status.downtime}" if migration.status.downtime else ""
        if over is None:
            how += f"; the agent of {migration.status.source_node} has not said that the original is gone there"
        done = failures.ending(Outcome.COMPLETED, "Moved", f"moved to {migration.status.target_node}{how}")
        await self._writer.fire(migration, E.HANDED_OVER, ending=done)
        return 0.0

    def _farewell_is_over(self, migration: Migration) -> bool:
        """The source's agent has had its time to kill the original and to say so; while the target needs that, all the time."""
        since = migration.status.condition(HANDED_OVER)
        if failures.fetching(migration.status.engine or EnginePhases()) or since is None:
            return False
        return failures.age(since.last_transition_time, clock()) > self._settings.farewell

    # Undoing: what was made goes.

    async def _undoing(self, migration: Migration) -> float | None:
        end = migration.status.ending
        assert end is not None
        source, target = await self._writer.source(migration), await self._writer.target(migration)
        mine, _ = await self._api.list(PODS, migration.namespace, labels={UID_LABEL: migration.uid})
        # Of the API server's pods first: the cache may lag behind an answer that was lost.
        kept = next((one for one in (*mine, target) if one is not None and pods.took_place(one, migration)), None)
        away = [
            one
            for one in mine
            if (one["metadata"]["labels"].get(ROLE_LABEL) in (pods.TARGET, pods.PLACEHOLDER))
            and pods.made_by(one, migration)
            and (kept is None or one["metadata"]["uid"] != kept["metadata"]["uid"])
            and (source is None or one["metadata"]["uid"] != source["metadata"]["uid"])
        ]
        if away:
            await self._remove(migration, away)
            return 0.5
        for one in (source, kept):
            await self._writer.release(one)
        await self._writer.fire(migration, UNDONE[Outcome(end.outcome)], ending=end)
        return 0.0

    async def _remove(self, migration: Migration, away: list[Json]) -> None:
        for one in away:
            about = one["metadata"]
            deleted = about.get("deletionTimestamp")
            late = deleted is not None and failures.age(deleted, clock()) > self._settings.removal
            force = late or (about.get("labels") or {}).get(ROLE_LABEL) == pods.PLACEHOLDER
            if deleted is None or late:
                await self._api.delete(
                    PODS, about["name"], migration.namespace, uid=about["uid"], grace=0 if force else 1
                )

    async def _undo(self, migration: Migration, why: Ending) -> float:
        if why.outcome == Outcome.COMPLETED:
            why = failures.ending(
                Outcome.FAILED, "Inconsistent", f"the engine completed, but nothing resumed: {why.message}"
            )
        await self._writer.fire(
            migration, E.FAILURE, lambda now: setattr(now.status, "ending", why), message=why.message
        )
        return 0.0

    # Common parts.

    async def _beforehand(self, migration: Migration, source: Json | None) -> Ending | None:
        """Reasons to end any migration before the job has resumed: a cancel, a deletion by the owner, a timeout."""
        owner = await self._survey.owner(source) if source is not None else None
        slack = DEADLINE_SLACK if migration.status.phase is P.RUNNING else 0.0
        return (
            failures.of_source(source, owner, migration)
            or await self._survey.namespace_failure(migration)
            or failures.of_cancel(migration)
            or failures.of_time(migration, clock(), slack=slack)
        )
