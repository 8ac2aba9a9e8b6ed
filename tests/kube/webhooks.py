"""Webhooks that stand in the way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.abc

from podferry.kube.client import PODS, ResourceKind

from .world import World

WEBHOOKS = ResourceKind(
    "admissionregistration.k8s.io/v1",
    "ValidatingWebhookConfiguration",
    "validatingwebhookconfigurations",
    namespaced=False,
)
TAKEN_UP = 1.5
"""Seconds after which the API server asks a webhook that was made."""


@asynccontextmanager
async def slow_deletes(world: World, pod: str) -> AsyncIterator[anyio.Event]:
    """What controllers delete takes a second longer: a webhook is asked first that never answers, and is ignored then.

    Yields what is set once the first such request is on its way. Controllers leave a pod the time that its spec says, 30 s;
    kubelets and podferry leave it less. That the API server asks is tried with `pod`, which stays.
    """
    asked = anyio.Event()
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as nobody, anyio.create_task_group() as tasks:

        async def listen(_: object) -> None:
            asked.set()
            await anyio.sleep_forever()

        tasks.start_soon(nobody.serve, listen)
        port = nobody.extra(anyio.abc.SocketAttribute.local_port)
        body = {
            "metadata": {"name": world.namespace},
            "webhooks": [
                {
                    "name": "slow.example.com",
                    "clientConfig": {"url": f"https://127.0.0.1:{port}/"},
                    "rules": [
                        {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["DELETE"], "resources": ["pods"]}
                    ],
                    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": world.namespace}},
                    "matchConditions": [
                        {"name": "by-a-controller", "expression": "request.options.gracePeriodSeconds == 30"}
                    ],
                    "failurePolicy": "Ignore",
                    "sideEffects": "None",
                    "admissionReviewVersions": ["v1"],
                    "timeoutSeconds": 1,
                }
            ],
        }
        await world.api.create(WEBHOOKS, body)

        async def taken_up() -> bool:
            only_try = {"dryRun": "All"}
            await world.api._call(
                "DELETE", PODS.path(world.namespace, pod), only_try, what=f"cannot try to delete {pod}"
            )
            return asked.is_set()

        try:
            await world.until(taken_up)
            asked = anyio.Event()
            yield asked
        finally:
            await world.api.delete(WEBHOOKS, world.namespace)
            tasks.cancel_scope.cancel()
