"""The program podferry-controller: leads or waits, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import anyio

from podferry import __version__
from podferry.controller.drains import Drains
from podferry.controller.evictions import Evictions
from podferry.controller.metrics import ControllerMetrics
from podferry.controller.movability import Movability
from podferry.controller.node_trouble import TRIGGERS, NodeTroubles, Trigger, trigger_of
from podferry.controller.patience import ControllerSettings
from podferry.controller.reconcile import Reconciler
from podferry.controller.signer import SIGNER, Signer, authority
from podferry.controller.turns import Turns
from podferry.controller.webhook import answer_evictions
from podferry.core.turns import Limits
from podferry.errors import PodferryError, UsageError
from podferry.kube.cache import Cache, Store
from podferry.kube.client import (
    JOBS,
    MIGRATION_POLICIES,
    MIGRATIONS,
    NAMESPACES,
    NODE_DRAINS,
    NODES,
    PODS,
    REPLICASETS,
    RUNTIME_CLASSES,
    SIGNING_REQUESTS,
    STATEFULSETS,
    Api,
    Json,
)
from podferry.kube.drain import NODE_ANNOTATIONS
from podferry.kube.lease import Leader
from podferry.kube.migration import UID_LABEL
from podferry.kube.watch import Queues, follow
from podferry.node.logs import log_json_lines
from podferry.wire.metrics_server import serve_metrics

DESCRIPTION = """Carry out Migration objects: check the pod, choose the target node, create the target pod, hand the job over.

Several instances may run; a Lease elects the one that acts. Each may be killed at any moment, since all state is in the
cluster's objects. The program finds the cluster as kubectl does, or by the service account of its pod."""

LEASE = ACCOUNT = "podferry-controller"

SIGNERS, DRAINERS = 2, 2

Key = tuple[str, str]


class Controller:
    """Watches, and has the reconciler and the signer do what is next. What the watches bring is remembered, so that a step asks the
    API server for nothing that it has told already."""

    def __init__(
        self, api: Api, namespace: str, settings: ControllerSettings, metrics: ControllerMetrics | None = None
    ) -> None:
        self._api, self._namespace, self._workers = api, namespace, settings.workers
        stores = (
            Store(MIGRATIONS),
            Store(NODE_DRAINS),
            Store(MIGRATION_POLICIES),
            Store(NODES, prune=partial(pruned_node, triggers=settings.triggers)),
            Store(PODS, labels={UID_LABEL: None}),
        )
        self._cache = Cache(api, stores, briefly=(NAMESPACES, JOBS, REPLICASETS, STATEFULSETS, RUNTIME_CLASSES))
        migrations, drains = self._cache.store(MIGRATIONS), self._cache.store(NODE_DRAINS)
        self._turns = Turns(migrations.all, drains.all, settings.limits)
        self._metrics = metrics or ControllerMetrics()
        self._metrics.watch(self._turns)
        self._reconciler = Reconciler(self._cache, settings, self._turns, self._metrics.ended)
        self._drainer = Drains(self._cache)
        self._movability, self._every = Movability(self._cache), settings.movability
        self._metrics.look(self._movability)
        self._troubles = NodeTroubles(self._cache, settings.triggers)
        self._of_uid: dict[str, Key] = {}
        self._drain_of_uid: dict[str, str] = {}
        self._seen: dict[str, Json] = {}

    async def run(self) -> None:
        """Work until cancelled."""
        signer = Signer(self._api, self._namespace, await authority(self._api, self._namespace))
        await self._cache.prime()
        self._metrics.leading.set(1)
        async with anyio.create_task_group() as tasks:
            migrations = Queues[Key](tasks, lambda key: self._reconciler.step(*key), self._workers)
            requests = Queues[str](tasks, signer.step, SIGNERS)
            drains = Queues[str](tasks, self._drainer.step, DRAINERS)
            tasks.start_soon(self._migrations, migrations, drains)
            nodes = Queues[str](tasks, self._troubles.step, DRAINERS)
            tasks.start_soon(self._drains, drains, migrations, nodes)
            tasks.start_soon(self._pods, migrations)
            tasks.start_soon(self._nodes, nodes)
            tasks.start_soon(self._policies, migrations)
            tasks.start_soon(self._requests, requests)
            if self._every:
                tasks.start_soon(self._movability.run, self._every)

    async def _migrations(self, queue: Queues[Key], drains: Queues[str]) -> None:
        async for what, one in self._cache.follow(MIGRATIONS):
            about = one["metadata"]
            if (drain := self._drain_of(one)) is not None and "completionTime" in (one.get("status") or {}):
                drains.put(drain)
            key = about["namespace"], about["name"]
            if what == "DELETED":
                self._of_uid.pop(about["uid"], None)
                self._seen.pop(about["uid"], None)
                self._turns.leave(about["uid"])
            else:
                self._of_uid[about["uid"]] = key
                self._turns.see(one)
                if self._is_old_news(one):
                    continue
            queue.put(key)
            self._wake(queue)

    def _is_old_news(self, one: Json) -> bool:
        """Whether nothing has changed but how far the engine is, which is told several times a second and decides nothing."""
        about, status = one["metadata"], one.get("status") or {}
        said = {
            "metadata": {name: about.get(name) for name in ("deletionTimestamp", "finalizers")},
            "spec": one.get("spec"),
            "status": {name: value for name, value in status.items() if name != "progress"},
        }
        old = self._seen.get(about["uid"]) == said
        self._seen[about["uid"]] = said
        return old

    def _wake(self, queue: Queues[Key]) -> None:
        for key in self._turns.due():
            queue.put(key)

    async def _drains(self, queue: Queues[str], migrations: Queues[Key], nodes: Queues[str]) -> None:
        async for what, one in self._cache.follow(NODE_DRAINS):
            about = one["metadata"]
            if what == "DELETED":
                self._drain_of_uid.pop(about["uid"], None)
            else:
                self._drain_of_uid[about["uid"]] = about["name"]
                queue.put(about["name"])
            nodes.put(about["name"])
            self._wake(migrations)

    def _drain_of(self, migration: Json) -> str | None:
        """The NodeDrain that made the Migration. Whoever may write Migrations can write any owner's name into one, so the owner is
        known by its uid.
        """
        owners = migration["metadata"].get("ownerReferences") or []
        return next((self._drain_of_uid[one["uid"]] for one in owners if one["uid"] in self._drain_of_uid), None)

    async def _nodes(self, queue: Queues[str]) -> None:
        async for _, node in self._cache.follow(NODES):
            queue.put(node["metadata"]["name"])

    async def _policies(self, queue: Queues[Key]) -> None:
        """What waits may be allowed now, and what is refused is not asked for again."""
        async for _ in self._cache.follow(MIGRATION_POLICIES):
            for key in self._turns.all_waiting():
                queue.put(key)

    async def _pods(self, queue: Queues[Key]) -> None:
        async for _, pod in self._cache.follow(PODS):
            uid = pod["metadata"]["labels"].get(UID_LABEL, "")
            if uid in self._of_uid:
                queue.put(self._of_uid[uid])

    async def _requests(self, queue: Queues[str]) -> None:
        async for what, one in follow(self._api, SIGNING_REQUESTS, fields={"spec.signerName": SIGNER}):
            if what != "DELETED":
                queue.put(one["metadata"]["name"])


def pruned_node(node: Json, triggers: Sequence[Trigger] = ()) -> Json:
    """What the controller asks about a node: the images that a thousand nodes list would fill its memory."""
    about, status = node["metadata"], node.get("status") or {}
    kept = ("name", "uid", "resourceVersion", "labels", "deletionTimestamp")
    conditions = {"Ready", *(one.key for one in triggers if one.kind == "condition")}
    annotations = {*NODE_ANNOTATIONS, *(one.key for one in triggers if one.kind == "annotation")}
    return {
        "metadata": {
            **{name: about[name] for name in kept if name in about},
            "annotations": {
                name: value for name, value in (about.get("annotations") or {}).items() if name in annotations
            },
        },
        "spec": {
            name: value for name, value in (node.get("spec") or {}).items() if name in ("taints", "unschedulable")
        },
        "status": {
            "conditions": [one for one in status.get("conditions") or [] if one["type"] in conditions],
            "addresses": status.get("addresses") or [],
            "nodeInfo": {
                name: value
                for name, value in (status.get("nodeInfo") or {}).items()
                if name == "containerRuntimeVersion"
            },
        },
    }


def main() -> None:
    """The program. Ends with 0 after SIGTERM, with 1 when it lost the lease (to be started anew), 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="podferry-controller", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kubeconfig", type=Path, help="the cluster; default: in-cluster, $KUBECONFIG, ~/.kube/config")
    parser.add_argument(
        "--namespace",
        default=os.environ.get("POD_NAMESPACE", "podferry-system"),
        help="the namespace of the lease and the certificate authority; default: $POD_NAMESPACE or podferry-system",
    )
    parser.add_argument(
        "--image",
        default=os.environ.get("PODFERRY_IMAGE", ControllerSettings.image),
        help="the image of placeholder pods; it must have `sleep`; default: $PODFERRY_IMAGE or %(default)s",
    )
    parser.add_argument(
        "--scheduling-patience",
        type=float,
        default=ControllerSettings.scheduling,
        metavar="S",
        help="roll a move back when the scheduler found no node for so long; default: %(default)s",
    )
    for flag, number, what in (
        ("--parallel", Limits.cluster, "in the cluster"),
        ("--parallel-per-namespace", Limits.namespace, "in a namespace"),
        ("--parallel-out", Limits.outbound, "out of a node; a NodeDrain's spec.parallel goes before it"),
        ("--parallel-in", Limits.inbound, "into a node"),
    ):
        text = f"moves under way at once {what}; 0: no limit; default: %(default)s"
        parser.add_argument(flag, type=_count, default=number, metavar="N", help=text)
    shown = ", ".join(f"{one.kind}:{one.key}={one.seconds:.0f}s" for one in TRIGGERS)
    parser.add_argument(
        "--node-trouble",
        action="append",
        metavar="KIND:KEY=TIME",
        help="drain a node that gets this taint, condition or annotation, and expect it to go away TIME later; may be repeated; "
        f"none: only for the annotations {' and '.join(NODE_ANNOTATIONS)}; default: {shown}",
    )
    parser.add_argument(
        "--movable-every",
        type=float,
        default=ControllerSettings.movability,
        metavar="S",
        help="seconds between two checks of a pod that opted in, whose result is its condition PodferryMovable; 0: never; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--metrics-port",
        type=_count,
        default=0,
        metavar="PORT",
        help="serve Prometheus metrics at this port; 0: no; default: %(default)s",
    )
    parser.add_argument("--version", action="version", version=__version__)
    arguments = parser.parse_args()
    log_json_lines()
    limits = Limits(arguments.parallel, arguments.parallel_per_namespace, arguments.parallel_out, arguments.parallel_in)
    try:
        asked = arguments.node_trouble
        triggers = TRIGGERS if asked is None else tuple(trigger_of(one) for one in asked if one != "none")
        settings = ControllerSettings(
            image=arguments.image,
            scheduling=arguments.scheduling_patience,
            limits=limits,
            triggers=triggers,
            movability=arguments.movable_every,
        )
        metrics = ControllerMetrics()
        if arguments.metrics_port:
            serve_metrics(f"0.0.0.0:{arguments.metrics_port}", metrics.registry)
        if anyio.run(_work, arguments.kubeconfig, arguments.namespace, settings, metrics):
            sys.exit(1)
    except PodferryError as error:
        print(error.report(), file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise ValueError(text)
    return number


async def _work(
    kubeconfig: Path | None, namespace: str, settings: ControllerSettings, metrics: ControllerMetrics
) -> bool:
    """Lead until told to stop (False) or the lease is lost (True)."""
    lost = True
    # The lease has a client of its own: what waits for a connection to work with must not keep it from being renewed.
    async with Api.open(kubeconfig) as api, Api.open(kubeconfig) as leases, anyio.create_task_group() as tasks:

        async def until_signalled() -> None:
            nonlocal lost
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    lost = False
                    tasks.cancel_scope.cancel()
                    return

        tasks.start_soon(until_signalled)
        account = f"system:serviceaccount:{namespace}:{ACCOUNT}"
        tasks.start_soon(answer_evictions, api, namespace, Evictions(api, account, metrics).review)
        identity = f"{socket.gethostname()}_{secrets.token_hex(4)}"
        await Leader(leases, namespace, LEASE, identity).lead(Controller(api, namespace, settings, metrics).run)
        tasks.cancel_scope.cancel()
    return lost
