"""Leader election by a Lease, so that a controller may run twice and only one of the two acts.

As client-go does it: who holds the lease renews it; others take it once it has not changed for its whole duration by
*their own* clock,
so that clocks need not agree. Every change is a compare-and-swap.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Awaitable, Callable

import anyio
import structlog

from podferry.errors import PodferryError
from podferry.kube.api_errors import Conflict, ObjectAlreadyExists
from podferry.kube.client import LEASES, Api, Json

DURATION, RENEW_WITHIN, RETRY = 15.0, 10.0, 2.0
"""Seconds: how long a lease holds unrenewed, when its holder gives up, how often it is tried. client-go's defaults."""


class Leader:
    """One candidate for the lease `name` in `namespace`."""

    def __init__(self, api: Api, namespace: str, name: str, identity: str) -> None:
        self._api, self._namespace, self._name, self.identity = api, namespace, name, identity
        self._seen: tuple[str, float] = ("", 0.0)
        self._log = structlog.get_logger().bind(lease=name, identity=identity)

    async def lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """Wait until this candidate leads, then do `work`; it is cancelled when the lease is lost. Returns after either.

        On a clean end the lease is given back, so that the next one need not wait.
        """
        while not await self._try():
            await anyio.sleep(RETRY)
        self._log.info("leading")
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._renew, tasks.cancel_scope)
                await work()
                tasks.cancel_scope.cancel()
        finally:
            with anyio.move_on_after(RETRY, shield=True):
                await self._give_back()

    async def _renew(self, scope: anyio.CancelScope) -> None:
        renewed = time.monotonic()
        while time.monotonic() - renewed < RENEW_WITHIN:
            await anyio.sleep(RETRY)
            with anyio.move_on_after(RENEW_WITHIN - (time.monotonic() - renewed)):
                if await self._try():
                    renewed = time.monotonic()
        self._log.error("the lease was lost")
        scope.cancel()

    async def _try(self) -> bool:
        """Take or renew the lease. False where somebody else holds it or the API server does not answer."""
        try:
            return await self._take(await self._api.find(LEASES, self._name, self._namespace))
        except (Conflict, ObjectAlreadyExists):
            return False
        except PodferryError as error:
            self._log.warning("the lease cannot be had now", error=str(error))
            return False

    async def _take(self, lease: Json | None) -> bool:
        spec: Json = {"holderIdentity": self.identity, "leaseDurationSeconds": int(DURATION), "renewTime": micro_time()}
        if lease is None:
            body = {"metadata": {"name": self._name}, "spec": {**spec, "acquireTime": spec["renewTime"]}}
            await self._api.create(LEASES, body, self._namespace)
            return True
        holder = lease["spec"].get("holderIdentity") or ""
        if holder not in ("", self.identity):
            version = lease["metadata"]["resourceVersion"]
            if version != self._seen[0]:
                self._seen = (version, time.monotonic())
            if time.monotonic() - self._seen[1] < float(lease["spec"].get("leaseDurationSeconds") or DURATION):
                return False
        if holder != self.identity:
            spec |= {
                "acquireTime": spec["renewTime"],
                "leaseTransitions": int(lease["spec"].get("leaseTransitions") or 0) + 1,
            }
        await self._api.replace(LEASES, {**lease, "spec": {**lease["spec"], **spec}})
        return True

    async def _give_back(self) -> None:
        try:
            lease = await self._api.find(LEASES, self._name, self._namespace)
            if lease is not None and lease["spec"].get("holderIdentity") == self.identity:
                await self._api.replace(LEASES, {**lease, "spec": {**lease["spec"], "holderIdentity": ""}})
        except PodferryError as error:
            self._log.info("the lease was not given back", error=str(error))


def micro_time() -> str:
    """Now, as a MicroTime."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
