"""Events on pods and Migrations: what happened, as `kubectl describe` shows it.

They are a courtesy: none of them may fail a migration."""

from __future__ import annotations

import secrets

import structlog

from podferry.errors import PodferryError
from podferry.kube.client import EVENTS, Api, Json
from podferry.kube.lease import micro_time
from podferry.kube.migration import GROUP

NORMAL, WARNING = "Normal", "Warning"
LONGEST = 1000


class Events:
    """Says things about objects, in the name of one program."""

    def __init__(self, api: Api, component: str, host: str = "") -> None:
        self._api, self._component, self._host = api, component, host

    async def publish(self, about: Json, reason: str, message: str, *, warning: bool = False) -> None:
        """An event on `about`, an object with apiVersion, kind and metadata."""
        metadata = about["metadata"]
        namespace = metadata.get("namespace", "default")
        event: Json = {
            "metadata": {"name": f"{metadata['name'][:230]}.{secrets.token_hex(8)}", "namespace": namespace},
            "regarding": {
                "apiVersion": about["apiVersion"],
                "kind": about["kind"],
                "name": metadata["name"],
                "namespace": namespace,
                "uid": metadata["uid"],
            },
            "eventTime": micro_time(),
            "type": WARNING if warning else NORMAL,
            "reason": reason,
            "action": "Migrate",
            "note": message[:LONGEST],
            "reportingController": f"{GROUP}/{self._component}",
            "reportingInstance": self._host or self._component,
        }
        try:
            await self._api.create(EVENTS, event, namespace)
        except PodferryError as error:
            structlog.get_logger().info("an event was not taken", reason=reason, error=str(error))
