"""A pending Migration: may its pod move, and is it its turn? Nothing is done to the pod before both are so."""

from __future__ import annotations

from podferry.controller import eligibility, failures, pods, resizing, verifying
from podferry.controller.eligibility import PodUnfit
from podferry.controller.policies import Policies, group, known, settle
from podferry.controller.status_writer import StatusWriter
from podferry.controller.surroundings import Surveyor
from podferry.controller.turns import Turns
from podferry.controller.whereabouts import address_of, addresses_of
from podferry.core.migration import MigrationEvent, MigrationPhase
from podferry.core.turns import Wait
from podferry.errors import Refused
from podferry.kube import status as store
from podferry.kube.api_errors import Forbidden
from podferry.kube.client import PODS, Api, Json
from podferry.kube.migration import ELIGIBLE, QUEUED, Migration, OwnerReference, PodReference
from podferry.kube.moved import moved_containers
from podferry.kube.paths import is_subdomain
from podferry.kube.quantities import timestamp
from podferry.kube.settings import MoveSettings
from podferry.model import Outcome

E, P = MigrationEvent, MigrationPhase

QUEUE_POLL_AGAIN = 60.0


class Entrance:
    """Lets Migrations begin, or says why not."""

    def __init__(self, api: Api, writer: StatusWriter, survey: Surveyor, turns: Turns) -> None:
        self._api, self._writer, self._survey, self._turns = api, writer, survey, turns
        self._policies = Policies(api)

    async def step(self, migration: Migration) -> float | None:
        """Take the next step. Returns the seconds until the next look, or None to wait for a change."""
        if not await self._writer.hold_on(migration):
            return 0.0
        if cancelled := failures.of_cancel(migration):
            self._turns.leave(migration.uid)
            await self._writer.fire(migration, E.WITHDRAWN, ending=cancelled)
            return 0.0
        source = await self._named_pod(migration)
        if isinstance(source, PodUnfit):
            return await self.refuse(migration, source.reason, [source])
        policy = await self._policies.of(source)
        settings = settle(migration.spec, policy)
        if found := await self._obstacles(migration, source, settings):
            return await self.refuse(migration, found[0].reason, list(found), known(settings, policy))
        assert isinstance(settings, MoveSettings)
        if waits := self._turns.take(migration, source["spec"]["nodeName"], group(policy)):
            return await self._wait(migration, waits)
        return await self._take_up(migration, source, settings)

    async def _obstacles(self, migration: Migration, source: Json, settings: MoveSettings | PodUnfit) -> list[PodUnfit]:
        """The reasons why this pod cannot move as the Migration asks."""
        if found := eligibility.obstacles(source, await self._survey.around(source, migration)):
            return found
        if isinstance(settings, PodUnfit):
            return [settings]
        wish = migration.spec
        if unlike := [*resizing.misfits(source, wish.resources), *verifying.misfits(source, wish.verify)]:
            return unlike
        impatient = eligibility.impatient_probe(source, settings) or eligibility.late_making(source, settings)
        wrong = impatient or await self._survey.target_node(source, migration)
        return [wrong] if wrong else []

    async def _take_up(self, migration: Migration, source: Json, settings: MoveSettings) -> float:
        """Begin a Migration whose turn it is: claim the pod and have the scheduler choose a node."""
        if not failures.claims(source, migration):
            claim, uid = pods.claim(source, migration), source["metadata"]["uid"]
            try:
                source = await self._api.patch(PODS, migration.spec.pod_name, claim, migration.namespace, uid=uid)
            except Forbidden as refused:
                wrong = eligibility.unfit("ClaimRefused", "the pod may not be marked as on its way", why=refused.why)
                return await self.refuse(migration, wrong.reason, [wrong])
        owner = eligibility.controller_of(source)
        address = await address_of(self._api, source["spec"]["nodeName"])

        def taken_up(now: Migration) -> None:
            now.status.source_node, now.status.source_address = source["spec"]["nodeName"], address
            now.status.source_pod = PodReference(name=source["metadata"]["name"], uid=source["metadata"]["uid"])
            now.status.source_pod_addresses = addresses_of(source)
            now.status.containers = moved_containers(source)
            now.status.owner = OwnerReference(kind=owner["kind"], name=owner["name"]) if owner else None
            now.status.settings = settings
            if eligibility.keeps_name(source):
                now.status.keeps_name = True
                now.status.settings = settings.model_copy(update={"allow_post_copy": False})
            now.status.start_time = timestamp()
            now.status.set_condition(ELIGIBLE, True, "NothingInTheWay")
            if now.status.condition(QUEUED) is not None:
                now.status.set_condition(QUEUED, False, "ItsTurn")

        await self._writer.fire(migration, E.CLAIMED, taken_up, message="looking for a node")
        asked = f", as {migration.spec.requested_by} asked for" if migration.spec.requested_by else ""
        words = f"Migration {migration.name} looks for another node{asked}"
        await self._writer.publish_pod_event(source, "MigrationStarted", words)
        return 0.0

    async def _wait(self, migration: Migration, waits: Wait) -> float:
        """Others have their turn. It is woken when a place is free; what it waits for is said when that is another thing."""
        said = migration.status.condition(QUEUED)
        if said is None or said.reason != waits.reason:

            def queued(now: Migration) -> bool:
                now.status.set_condition(QUEUED, True, waits.reason, waits.message)
                now.status.message = f"waits for its turn: {waits.message}"
                return now.status.phase is P.PENDING

            await store.change(self._api, migration, queued)
        return QUEUE_POLL_AGAIN

    async def _named_pod(self, migration: Migration) -> Json | PodUnfit:
        """The pod that the Migration names; or what is wrong with the names in it."""
        for name in filter(None, (migration.spec.pod_name, migration.spec.target_node)):
            if not is_subdomain(name):  # written before the API server checked names
                return eligibility.unfit("NameInvalid", f"{name[:100]!r} is not the name of an object")
        found = await self._api.find(PODS, migration.spec.pod_name, migration.namespace)
        missing = f"there is no pod {migration.spec.pod_name}"
        return found or eligibility.unfit("PodNotFound", missing, remedy="kubectl get pods")

    async def refuse(
        self, migration: Migration, reason: str, why: list[Refused], settings: MoveSettings | None = None
    ) -> float:
        """It ends here: nothing was done yet. `settings` tell by which policy, and how long the Migration stays."""
        self._turns.leave(migration.uid)
        words = "; ".join(str(one) for one in why)
        remedy = "; ".join(one.remedy for one in why if one.remedy)
        end = failures.ending(Outcome.REFUSED, reason, words, remedy=remedy, code=why[0].code)
        message = f"{words}. What to do: {remedy}" if remedy else words

        def refused(now: Migration) -> None:
            now.status.settings = settings or now.status.settings
            now.status.set_condition(ELIGIBLE, False, reason, message)

        await self._writer.fire(migration, E.REFUSAL, refused, ending=end)
        return 0.0
